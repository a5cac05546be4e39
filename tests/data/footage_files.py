"""Small data sets in the layouts that others publish: what is seen in a frame tells the episode and the frame.

Every picture is a grey of its episode's level with a white bar whose place is the frame's number, so a test can read
from a clip's pixels which moments it shows, whatever became of them on the way.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from anyflow.data.importing.options import ImportOptions

HEIGHT, WIDTH, STEP = 48, 192, 4
"""A bar moves STEP pixels a frame: 48 frames fit."""
BAR = WIDTH // STEP


def picture(episode: int, frame: int) -> np.ndarray:
    """uint8 [H, W, 3]; the bar starts again after BAR frames."""
    image = np.full((HEIGHT, WIDTH, 3), 20 + 12 * (episode % 10), dtype=np.uint8)
    left = STEP * (frame % BAR)
    image[:, left : left + STEP] = 255
    return image


def read_frame(image: np.ndarray) -> tuple[int, int]:
    """(episode, frame) of a picture, at any size."""
    columns = image.mean(axis=(0, 2))
    return round((float(np.median(columns)) - 20) / 12), int(columns.argmax() * WIDTH / image.shape[1] // STEP)


def encode(
    pictures: Sequence[np.ndarray], fps: float, format: str = "mp4", codec: str = "libx264", gop: int = 12
) -> bytes:
    """A video file's bytes."""
    file = io.BytesIO()
    options = {"g": str(gop), "crf": "12"}
    options |= (
        {"preset": "ultrafast"} if codec == "libx264" else {"x265-params": "log-level=none", "preset": "ultrafast"}
    )
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for image in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def video(episode: int, frames: int, fps: float, **options: Any) -> bytes:
    """An episode's video."""
    return encode([picture(episode, frame) for frame in range(frames)], fps, **options)


def put(path: Path, content: bytes | str | Any) -> Path:
    """Write a file with its folders: bytes, a text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def put_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def put_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def put_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A plain tar, as WebDataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def lenient(**changes: Any) -> ImportOptions:
    """Clips of 4 frames, made in this process, whatever else may be unusable."""
    return ImportOptions(
        **{"frames": 4, "workers": 0, "heldout": 0.0, "default_caption": "Footage.", "error_budget": 1.0, **changes}
    )


# --- robotics ---------------------------------------------------------------------------------------------------------

CAMERAS = ("observation.images.top", "observation.images.wrist")
TASKS = ("Pick up the cube.", "Open the drawer.")


def _features() -> dict[str, Any]:
    camera = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": [2], "names": ["frame", "episode"]}
    numbers = {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index")}
    return {"action": vector, "observation.state": vector, **dict.fromkeys(CAMERAS, camera), **numbers}


def _info(version: str, episodes: int, frames: int, fps: int, **paths: str) -> dict[str, Any]:
    return {
        "codebase_version": version,
        "robot_type": "so100",
        "total_episodes": episodes,
        "total_frames": episodes * frames,
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{episodes}"},
        **paths,
        "features": _features(),
    }


def _rows(episodes: Sequence[int], frames: int, fps: int) -> dict[str, Any]:
    """A table of rows: the action of frame t of episode e is [t, e], the state is [e, t]."""
    pairs = [(episode, frame) for episode in episodes for frame in range(frames)]
    return {
        "action": [[float(t), float(e)] for e, t in pairs],
        "observation.state": [[float(e), float(t)] for e, t in pairs],
        "timestamp": np.array([t / fps for _, t in pairs], dtype=np.float32),
        "frame_index": [t for _, t in pairs],
        "episode_index": [e for e, _ in pairs],
        "index": list(range(len(pairs))),
        "task_index": [e % len(TASKS) for e, _ in pairs],
    }


def _put_parquet(path: Path, columns: Mapping[str, Any]) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(dict(columns)), path)


def lerobot_v3(folder: Path, episodes: int = 4, frames: int = 24, fps: int = 12) -> Path:
    """LeRobot v3.0: all episodes in one table and, camera by camera, in one video."""
    paths = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    put(folder / "meta/info.json", _info("v3.0", episodes, frames, fps, **paths))
    put(folder / "meta/stats.json", {})
    _put_parquet(folder / "meta/tasks.parquet", {"task_index": [0, 1], "__index_level_0__": list(TASKS)})
    numbers = list(range(episodes))
    described: dict[str, Any] = {
        "episode_index": numbers,
        "tasks": [[TASKS[e % len(TASKS)]] for e in numbers],
        "length": [frames] * episodes,
        "data/chunk_index": [0] * episodes,
        "data/file_index": [0] * episodes,
        "dataset_from_index": [e * frames for e in numbers],
        "dataset_to_index": [(e + 1) * frames for e in numbers],
        "stats/action/min": [[0.0, 0.0]] * episodes,
    }
    for camera in CAMERAS:
        described[f"videos/{camera}/chunk_index"] = [0] * episodes
        described[f"videos/{camera}/file_index"] = [0] * episodes
        described[f"videos/{camera}/from_timestamp"] = [e * frames / fps for e in numbers]
        described[f"videos/{camera}/to_timestamp"] = [(e + 1) * frames / fps for e in numbers]
        pictures = [picture(e, t) for e in numbers for t in range(frames)]
        put(folder / f"videos/{camera}/chunk-000/file-000.mp4", encode(pictures, fps))
    _put_parquet(folder / "meta/episodes/chunk-000/file-000.parquet", described)
    _put_parquet(folder / "data/chunk-000/file-000.parquet", _rows(numbers, frames, fps))
    return folder


def lerobot_v2(folder: Path, episodes: int = 4, frames: int = 24, fps: int = 12) -> Path:
    """LeRobot v2.1: a table and a video for every episode (and camera)."""
    paths = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    put(folder / "meta/info.json", _info("v2.1", episodes, frames, fps, **paths))
    put_lines(folder / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(TASKS)])
    rows = [{"episode_index": e, "tasks": [TASKS[e % len(TASKS)]], "length": frames} for e in range(episodes)]
    put_lines(folder / "meta/episodes.jsonl", rows)
    for episode in range(episodes):
        _put_parquet(folder / f"data/chunk-000/episode_{episode:06d}.parquet", _rows([episode], frames, fps))
        for camera in CAMERAS:
            path = folder / f"videos/chunk-000/{camera}/episode_{episode:06d}.mp4"
            put(path, video(episode, frames, fps))
    return folder
