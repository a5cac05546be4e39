"""Small robot data sets in the layouts that others publish, whose cameras differ; pictures as in ``footage_files``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drive_files import jpeg
from footage_files import CAMERAS, encode, lerobot_v3, picture, put, video

EPISODES, FRAMES, RATE = 4, 24, 5
RAW = 3
"""Rows of a raw stream a frame."""


def states(frames: int, columns: int = 7) -> list[list[float]]:
    """The state of frame t is t in every column."""
    return [[float(frame)] * columns for frame in range(frames)]


def ctrl_world(episode: int, split: str, frames: int) -> dict[str, Any]:
    """An annotation as Ctrl-World writes it: three cameras, a state a frame, raw streams, latents."""
    place = f"videos/{split}/{episode}"
    told = [[frame / RAW] * 6 for frame in range(RAW * frames - 1)]
    return {
        "texts": [f"Task {episode}" if episode else ""],
        "episode_id": episode,
        "success": episode % 2,
        "video_length": frames,
        "videos": [{"video_path": f"{place}/{camera}.mp4"} for camera in range(3)],
        "latent_videos": [{"latent_video_path": f"latent_videos/{split}/{episode}/{camera}.pt"} for camera in range(3)],
        "states": states(frames),
        "action.cartesian_position": told,
        "action.gripper_position": [row[0] for row in told],
        "action.joint_velocity": [[*row, 0.0] for row in told],
    }


def irasim_3d(episode: int, split: str, frames: int) -> dict[str, Any]:
    """As IRASim has Bridge and RT-1: one camera, an action between two frames, the gripper by itself."""
    return {
        "language": f"Task {episode}",
        "episode_id": str(episode),
        "videos": [{"video_path": f"videos/{split}/{episode}/rgb.mp4"}],
        "action": states(frames - 1),
        "state": states(frames, 6),
        "continuous_gripper_state": [float(frame) for frame in range(frames)],
    }


def irasim_2d(episode: int, split: str, frames: int) -> dict[str, Any]:
    """As IRASim has Language-Table: one video_path, two columns."""
    return {
        "texts": f"Task {episode}",
        "actions": states(frames, 2),
        "video_path": f"videos/{split}/{episode:06d}.mp4",
        "episode_id": f"{episode:06d}",
    }


def two_arms(episode: int, split: str, frames: int) -> dict[str, Any]:
    """Paths as a folder above the data set, or another machine, knew them; cameras by name; one is not there."""
    above = "/mnt/somewhere/robots" if episode % 2 else "robots"
    return {
        "language_instruction": ["", f"Task {episode}"],
        "videos": [
            {"camera": "front", "video_path": f"{above}/videos/{split}/{episode}/a.mp4"},
            {"camera": "wrist", "video_path": f"{above}/videos/{split}/{episode}/b.mp4" if episode != 2 else ""},
        ],
        "state": [[[float(frame)] * 7] * 2 for frame in range(frames)],
    }


def bridge(episode: int, split: str, frames: int) -> dict[str, Any]:
    """Four cameras whose places in the list stay where an episode lacks them."""
    here = {0, episode or 3}
    paths = [f"videos/{split}/{episode}/image_{n}.mp4" if n in here else "" for n in range(4)]
    videos = [{"video_path": path} for path in paths]
    return {"texts": [f"Task {episode}"], "videos": videos, "state": states(frames, 7), "episode_id": str(episode)}


Annotation = Callable[[int, str, int], dict[str, Any]]


def annotated(folder: Path, annotation: Annotation = ctrl_world, frames: int = FRAMES) -> Path:
    """Annotations of four episodes, the last one held out, and their videos: camera c shows the grey episode + 3 c."""
    for episode in range(EPISODES):
        split = "val" if episode == EPISODES - 1 else "train"
        document = annotation(episode, split, frames)
        put(folder / f"annotation/{split}/{document.get('episode_id', episode)}.json", document)
        for camera, listed in enumerate(document.get("videos") or [document]):
            if listed["video_path"]:
                below = listed["video_path"].rpartition("videos")[2]
                put(folder / f"videos{below}", video(episode + 3 * camera, frames, RATE))
        for latent in document.get("latent_videos", []):
            put(folder / latent["latent_video_path"], b"\x80\x04cos\nabort\n")
    return folder


def lerobot_unlike(folder: Path, episodes: int = EPISODES, frames: int = FRAMES, fps: int = 12) -> Path:
    """LeRobot v3.0 whose wrist camera is half as large, shows the grey episode + 3, and has a new file half way."""
    lerobot_v3(folder, episodes, frames, fps)
    wrist, half = CAMERAS[1], episodes // 2
    for number, part in enumerate((range(half), range(half, episodes))):
        pictures = [picture(e + 3, t)[::2, ::2] for e in part for t in range(frames)]
        put(folder / f"videos/{wrist}/chunk-000/file-{number:03d}.mp4", encode(pictures, fps))

    def place(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            number, begin = divmod(row["episode_index"], half)
            row[f"videos/{wrist}/file_index"] = number
            row[f"videos/{wrist}/from_timestamp"] = begin * frames / fps
            row[f"videos/{wrist}/to_timestamp"] = (begin + 1) * frames / fps

    change_rows(folder / "meta/episodes/chunk-000/file-000.parquet", place)
    return folder


def change(path: Path, update: Callable[[Any], None]) -> None:
    """Edit a JSON file."""
    document = json.loads(path.read_text())
    update(document)
    put(path, document)


def change_rows(path: Path, update: Callable[[list[dict[str, Any]]], None]) -> None:
    """Edit the rows of a parquet table."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    rows = table.to_pylist()
    update(rows)
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=40)


def in_table(place: Path, data: bytes) -> dict[str, Any]:
    """A cell as LeRobot writes it."""
    return {"bytes": data, "path": place.name}


def as_images(
    folder: Path, cell: Callable[[Path, bytes], Any] = in_table, episodes: int = EPISODES, frames: int = FRAMES
) -> Path:
    """LeRobot whose top camera's pictures are cells of the table instead of a video; no column where a cell is None."""
    lerobot_v3(folder, episodes, frames)
    change(folder / "meta/info.json", lambda info: info["features"][CAMERAS[0]].update(dtype="image"))

    def add(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            episode, frame = row["episode_index"], row["frame_index"]
            place = Path(f"images/{CAMERAS[0]}/episode-{episode:06d}/frame-{frame:06d}.jpg")
            made = cell(place, jpeg(picture(episode, frame)))
            row |= {} if made is None else {CAMERAS[0]: made}

    change_rows(folder / "data/chunk-000/file-000.parquet", add)
    (folder / f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4").unlink()
    return folder
