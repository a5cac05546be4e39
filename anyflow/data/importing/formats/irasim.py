"""Robot episodes as IRASim, Ctrl-World and Cosmos' action-conditioned post-training keep them: a json an episode.

``annotation/SPLIT/ID.json`` names the videos of an episode's cameras, its text and its numbers: a row of the robot's
state a video frame, actions, and sometimes raw streams of a higher rate. The fields' names differ between the projects;
those of github.com/bytedance/IRASim (2D and 3D data sets) and of Ctrl-World's DROID excerpt are read. Latents are
pickles: they are never opened.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.footage import starts_of
from anyflow.data.importing.formats.folder import split_of
from anyflow.data.importing.labels import rows_of
from anyflow.data.importing.recording import Found, Recording, Track, Unusable, VideoFile, by_number
from anyflow.data.safety import find_pickles, inside, read_json_object

LOOKS_FOR = "annotation/[SPLIT/]ID.json with videos or a video_path"
DOMAIN = "robotics"
POSE = "x, y, z in metres, roll, pitch, yaw in radians"
NUMBERS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
UNITS = ("m", "m", "m", "rad", "rad", "rad", "")
CONTROLS: dict[str, Control | str] = {
    "state": f"per frame: the robot's state; with 6 or 7 columns {POSE}, gripper (in DROID 0 is open, 1 closed)",
    "gripper": "per frame: the gripper's state, as the annotation's continuous_gripper_state has it",
    "actions": f"per frame: what the robot was told; 7 columns of DROID: {POSE}, gripper; an episode's last one holds",
}
FOLDERS = ("annotation", "annotations")
TEXTS = ("texts", "text", "language_instruction", "language", "instruction", "task", "caption", "prompt")
NAMES = {"states": "state", "action": "actions", "continuous_gripper_state": "gripper"}
"""Control, where its field has another name."""
TOLD = ("action.cartesian_position", "action.gripper_position")
"""What a robot was told, where there is no field for its actions: Ctrl-World's streams in DROID."""
NO_LABELS = ("video_path", "latent_video_path", "video_length", "state_length", "raw_length", *TEXTS)
LOOKED_AT = 8
"""Annotations that ``detect`` opens: a damaged one among them does not hide the rest."""

log = logging.getLogger(__name__)


def detect(folder: Path) -> bool:
    """Whether one of the first annotations names a video."""
    for path in islice(_annotations(folder), LOOKED_AT):
        try:
            if _videos(read_json_object(path)):
                return True
        except DecodeError:
            continue
    return False


def recordings(folder: Path) -> Iterator[Found]:
    """Every camera of every episode."""
    pickles = find_pickles(folder)
    if pickles:
        log.warning("%d pickles were not opened, for they can run code (%s, ...)", len(pickles), pickles[0])
    for path in sorted(_annotations(folder)):
        yield from _episode(folder, path)


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """State, actions and every other stream of numbers, at the times of the video's frames, however these are apart."""
    rate, starts = starts_of(VideoFile(recording.details["video"]))
    tracks = {}
    for name, (rows, every) in _streams(recording, len(starts)).items():
        places = np.arange(len(rows)) / every
        beyond = (places - len(starts) + 1).clip(0) / rate
        tracks[name] = Track(np.interp(places, np.arange(len(starts)), starts) + beyond, rows)
    return tracks


def described_controls(folder: Path) -> dict[str, Control | str]:
    """The streams of the first annotations of every split, with their widths and rates."""
    told: dict[str, Control | str] = {}
    for _, paths in groupby(sorted(_annotations(folder)), key=lambda path: path.parent):
        for path in islice(paths, LOOKED_AT):
            recording = next((item for item in _episode(folder, path) if isinstance(item, Recording)), None)
            if recording is None:
                continue
            try:
                rate, starts = starts_of(VideoFile(recording.details["video"]))
                streams = _streams(recording, len(starts))
            except DecodeError:
                continue
            for name, (rows, every) in streams.items():
                plain = f"per frame: {' x '.join(map(str, rows.shape[1:])) or 1} numbers as the annotation has them"
                words = f"{CONTROLS.get(name, plain)}; {rate * every:g} rows a second in the source"
                told.setdefault(name, _control(name, words, math.prod(rows.shape[1:])) if rows.size else words)
            if streams:
                break
    return told


def _control(name: str, words: str, width: int) -> Control:
    """A stream by its name: what was told leads to the next state; velocities are averaged."""
    is_pose = name in ("state", "actions") and width in (6, 7)
    return Control(
        words,
        width,
        unit=UNITS[:width] if is_pose else (),
        numbers=NUMBERS[:width] if is_pose else (),
        at="transition" if name.startswith("action") else "frame",
        skipped="mean" if "velocity" in name else "last",
    )


def _episode(folder: Path, path: Path) -> Iterator[Found]:
    """The cameras of an episode, by its annotation."""
    relative = path.relative_to(folder)
    episode = PurePosixPath(*relative.with_suffix("").parts[1:]).as_posix()
    try:
        annotation = read_json_object(path)
        videos = _videos(annotation)
        if not videos:
            raise DecodeError(f"{path.name} names no video")
    except DecodeError as error:
        yield Unusable(episode, str(error))
        return
    labels = {name: value for name, value in annotation.items() if name not in NO_LABELS and _is_label(value)}
    for camera, video in _cameras(videos, {path.stem, str(annotation.get("episode_id"))}).items():
        name = f"{episode}/{camera}" if camera else episode
        try:
            file = _find(folder, video)
        except DecodeError as error:
            yield Unusable(name, str(error))
            continue
        yield Recording(
            name=name,
            group=episode,
            footage=VideoFile(str(file)),
            caption=_text(annotation),
            camera=camera,
            split=split_of(relative),
            fields=labels,
            details={"annotation": str(path), "video": str(file)},
        )


def _streams(recording: Recording, frames: int) -> dict[str, tuple[np.ndarray, int]]:
    """Control -> (its rows, rows a frame).

    Raises:
        DecodeError: the annotation cannot be read, or states or actions do not fit to the video, of so many frames.
    """
    annotation = read_json_object(Path(recording.details["annotation"]))
    streams = {}
    for field, values in annotation.items():
        name = NAMES.get(field, field)
        if not (isinstance(values, list) and (name in CONTROLS or _is_stream(values))):
            continue
        every = _rows_a_frame(len(values), frames)
        if every is None:
            if name in CONTROLS:
                raise DecodeError(f"its {field} has {len(values)} rows, its video {frames} frames")
            continue
        rows = rows_of(field, values)
        if len(rows) == frames - 1:
            rows = np.concatenate([rows, rows[-1:]])
        streams[name] = rows, every
    if "actions" not in streams and all(name in streams for name in TOLD):
        told = [streams.pop(name) for name in TOLD]
        count = min(len(rows) for rows, _ in told)
        streams["actions"] = np.concatenate([rows[:count].reshape(count, -1) for rows, _ in told], axis=1), told[0][1]
    return streams


def _annotations(folder: Path) -> Iterator[Path]:
    for name in FOLDERS:
        yield from (folder / name).glob("**/*.json")


def _videos(annotation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """{video_path, perhaps camera} of every camera, however the annotation lists them."""
    videos = annotation.get("videos") or annotation.get("video_path")
    listed = videos if isinstance(videos, list) else [videos] if videos else []
    found = [{"video_path": video} if isinstance(video, str) else video for video in listed]
    return found if all(isinstance(video, dict) for video in found) and any(map(_path_of, found)) else []


def _path_of(video: Mapping[str, Any]) -> str:
    path = video.get("video_path")
    return path if isinstance(path, str) else ""


def _cameras(videos: list[Mapping[str, Any]], episode: set[str]) -> dict[str, str]:
    """Camera -> its video's path, of those that the episode has, by name; the others keep their place in the list.

    A camera's name is the annotation's, else what its path has behind the episode or before it, else its place.
    """
    here = {place: video for place, video in enumerate(videos) if _path_of(video)}
    names = []
    for video in here.values():
        path = _below_videos(_path_of(video))
        own = [part for part in (*path.parent.parts, path.stem) if split_of(Path(part, "x")) is None]
        place = next((place for place, part in enumerate(own) if part in episode), 0)
        around = own[place + 1 :] or own[:place]
        names.append(str(video.get("camera") or "_".join([part for part in around if part != "rgb"] or around)))
    if len(videos) > 1 and len({*names, ""}) <= len(names):
        names = [str(place) for place in here]
    paths = {name: _path_of(video) for name, video in zip(names, here.values(), strict=True)}
    return {name: paths[name] for name in sorted(paths, key=by_number)}


def _below_videos(name: str) -> PurePosixPath:
    """What a path has behind its last folder ``videos``; all of it, where it has none."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return PurePosixPath(*parts[max((place + 1 for place, part in enumerate(parts) if part == "videos"), default=0) :])


def _find(folder: Path, name: str) -> Path:
    """A video by the path that its annotation gives, which may have been written for a folder above the data set's.

    Raises:
        DecodeError: it leads out, or there is no such file.
    """
    below = inside(folder / "videos", _below_videos(name).as_posix())  # bridge/videos/0.mp4, /home/me/videos/0.mp4
    file = below if below.is_file() else inside(folder, name)
    if not file.is_file():
        raise DecodeError(f"there is no {name[:200]}")
    return file


def _text(annotation: Mapping[str, Any]) -> str | None:
    """The first text that is not empty."""
    for field in TEXTS:
        value = annotation.get(field)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.strip():
                return text
    return None


def _is_label(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 200)


def _is_stream(values: list[Any]) -> bool:
    """Whether a list holds a row of numbers a moment."""
    first = values[0] if len(values) > 1 else None
    while isinstance(first, list) and first:
        first = first[0]
    return isinstance(first, int | float) and not isinstance(first, bool)


def _rows_a_frame(rows: int, frames: int) -> int | None:
    """How many rows of a stream there are for a frame; None if the stream does not fit to the video."""
    every = max(1, round(rows / frames)) if frames else 1
    return every if abs(-(-rows // every) - frames) <= 1 else None
