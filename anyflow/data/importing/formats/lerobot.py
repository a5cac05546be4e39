"""LeRobot data sets, v3.0 (many episodes a file) and v2.0/v2.1 (one a file): colour cameras, actions, state, task.

The layout is that of https://github.com/huggingface/lerobot (``datasets/lerobot_dataset.py``).
"""

from __future__ import annotations

import logging
import math
import re
import string
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.labels import rows_of
from anyflow.data.importing.recording import (
    Found,
    ImageFiles,
    LeftOut,
    ParquetImages,
    Recording,
    Track,
    Unusable,
    VideoFile,
)
from anyflow.data.safety import inside, read_json_object
from anyflow.data.tables import read_rows
from anyflow.errors import UserError

LOOKS_FOR = "meta/info.json with a codebase_version"
DOMAIN = "robotics"
CONTROLS: dict[str, Control | str] = {
    "actions": "per frame: the action vector of the robot, as the data set's feature 'action' has it",
    "state": "per frame: the state vector of the robot, as the feature 'observation.state' has it",
}
TRACKS = {"actions": ("action", "actions"), "state": ("observation.state", "state")}
"""Control -> its feature, as LeRobot's own data sets name it and as others do."""
AT: dict[str, Literal["frame", "transition"]] = {"actions": "transition", "state": "frame"}
COLUMNS = ("timestamp", "episode_index", "task_index", *(name for names in TRACKS.values() for name in names))
CHUNK = 1000
"""Episodes of a chunk in v2, unless info.json has ``chunks_size``."""
PICTURES = ("video", "image")
DAMAGED = (DecodeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
JOINED = "several tasks, and no task_index of the rows that tells which is when: every clip has all of them"

PLAIN_FORMAT = re.compile(r"0?\d{0,2}d?")
"""Of a number in a path: ``03d``."""

log = logging.getLogger(__name__)


def detect(folder: Path) -> bool:
    """Whether ``meta/info.json`` is LeRobot's."""
    try:
        return "codebase_version" in read_json_object(folder / "meta" / "info.json")
    except DecodeError:
        return False


def recordings(folder: Path) -> Iterator[Found]:
    """Every camera of every episode.

    Raises:
        UserError: an unknown version, no pictures, or damaged descriptions.
    """
    layout = _layout(folder)
    episodes = _episodes_v3(folder) if layout.version.startswith("v3.") else _episodes_v2(folder)
    for number, episode in enumerate(episodes):
        if isinstance(episode, DecodeError):
            yield Unusable(f"episode {number}", str(episode))
            continue
        for camera in (*layout.cameras, *layout.depth):
            place = f"episode_{episode.get('episode_index', number)}"
            try:
                place = f"episode_{int(episode['episode_index']):06d}"
                recording = _recording(folder, layout, episode, place, camera)
                if camera in layout.depth:
                    yield LeftOut(recording.name, "a depth map", recording.footage)
                else:
                    yield from _by_task(folder, recording, episode["tasks"])
            except DAMAGED as error:
                yield Unusable(f"{place}/{_plain(camera)}", f"its description is damaged ({error!r})"[:300])


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """Actions and state at the times of the pictures that their rows belong to."""
    rows, times = _rows_of(recording)
    first, last = recording.details.get("rows", (0, len(rows)))
    taken = _table(recording.details["table"]).take(rows[first:last])
    times = times[first:last] - (times[first] if first else 0.0)
    present = _present(taken.column_names)
    return {name: Track(times, rows_of(column, taken.column(column).to_pylist())) for name, column in present.items()}


def _rows_of(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of an episode's rows in its table, their seconds).

    Raises:
        DecodeError: rows are missing, or are not of the video's frames one by one.
    """
    table = _table(recording.details["table"])
    for name in ("timestamp", "episode_index"):
        if name not in table.column_names:
            raise DecodeError(f"its table has no column {name}")
    rows = np.flatnonzero(table.column("episode_index").to_numpy() == recording.details["episode"])
    length = recording.details["length"]
    if isinstance(length, int) and len(rows) != length:
        raise DecodeError(f"its table has {len(rows)} rows, its description {length} frames")
    times = rows_of("timestamp", table.column("timestamp").take(rows).to_pylist())
    bad = np.flatnonzero(~np.isfinite(times))
    if len(bad):
        raise DecodeError(f"its timestamp is no number in {len(bad)} of {len(rows)} rows, first in row {bad[0]}")
    fps = recording.details["fps"]
    if fps is None:  # each row has a picture of its own
        return rows, times
    steady = np.arange(len(rows)) / fps
    apart = np.flatnonzero(np.abs(times - steady) >= 0.5 / fps)
    if len(apart):
        row = apart[0]
        raise DecodeError(
            f"its timestamp is {times[row]:.6g} in row {row}, which at {fps:g} rows a second is at {steady[row]:.6g}: "
            "which row belongs to which frame cannot be told"
        )
    return rows, steady


def _by_task(folder: Path, recording: Recording, tasks: Sequence[Any]) -> Iterator[Recording]:
    """A recording for every stretch of one task, where the episode has several."""
    if len(tasks) < 2:
        yield recording
        return
    try:
        names = _task_names(folder)
        rows, times = _rows_of(recording)
        given = _table(recording.details["table"]).column("task_index").take(rows).to_pylist()
        spoken = [names[number] for number in given]
    except DAMAGED:
        yield replace(recording, notes=(JOINED,))
        return
    begins = [row for row in range(len(spoken)) if row == 0 or spoken[row] != spoken[row - 1]]
    for number, (first, last) in enumerate(zip(begins, [*begins[1:], len(spoken)], strict=True)):
        stretch = replace(recording, caption=spoken[first], fields={**recording.fields, "task": spoken[first]})
        if len(begins) > 1:
            begin, end = (times[first] if first else 0.0), recording.end
            if last < len(times):
                end = recording.start + float(times[last])
            stretch = replace(
                stretch,
                name=f"{recording.name}/{number:03d}",
                start=recording.start + float(begin),
                end=end,
                clock=float(begin),
                details={**recording.details, "rows": (first, last)},
            )
        yield stretch


@lru_cache(maxsize=1)
def _task_names(folder: Path) -> dict[int, str]:
    """The tasks by their numbers: ``meta/tasks.parquet`` of v3, ``meta/tasks.jsonl`` of v2.

    Raises:
        DecodeError: there is no such table. LookupError, TypeError: it has other columns.
    """
    path = folder / "meta" / "tasks.parquet"
    rows = (row for _, row in read_rows(path if path.is_file() else folder / "meta" / "tasks.jsonl"))
    named = {}
    for row in rows:
        if isinstance(row, DecodeError):
            raise row
        text = row["task"] if "task" in row else row["__index_level_0__"]
        named[int(row["task_index"])] = str(text)
    return named


def described_controls(folder: Path) -> dict[str, Control | str]:
    """The controls with the width, the names and the rate that ``meta/info.json`` gives them."""
    info = read_json_object(folder / "meta" / "info.json")
    told: dict[str, Control | str] = {}
    for control, column in _present(info["features"]).items():
        feature, words = info["features"][column], str(CONTROLS[control])
        names, shape = feature.get("names"), feature.get("shape")
        if isinstance(names, dict):
            names = next(iter(names.values()), None)
        numbers: tuple[str, ...] = ()
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            listed = ", ".join(names)[:500]
            words = f"{words} ({listed}; {float(info['fps']):g} a second in the source)"
            numbers = tuple(names) if len(set(names)) == len(names) else ()
        told[control] = words
        if isinstance(shape, list) and all(isinstance(side, int) and side > 0 for side in shape):
            width, at = math.prod(shape), AT[control]
            told[control] = Control(words, width, numbers=numbers if len(numbers) == width else (), at=at)
    return told


def _present(columns: Container[str]) -> dict[str, str]:
    """Control -> its feature, of those that are there."""
    found = {control: next((name for name in names if name in columns), None) for control, names in TRACKS.items()}
    return {control: name for control, name in found.items() if name is not None}


@dataclass(frozen=True)
class _Layout:
    """What ``meta/info.json`` says of all episodes.

    Attributes:
        cameras: colour cameras, feature -> dtype (video or image). depth: those that see depth.
        held_out: episodes of splits that are not train.
    """

    version: str
    cameras: Mapping[str, str]
    depth: Mapping[str, str]
    video_path: str
    data_path: str
    chunk: int
    fps: float
    robot: str
    held_out: frozenset[int] | None


def _layout(folder: Path) -> _Layout:
    """Read ``meta/info.json``; cameras that see depth are left out, and named."""
    try:
        info = read_json_object(folder / "meta" / "info.json")
        version, features = f"v{str(info['codebase_version']).lower().removeprefix('v')}", info["features"]
        cameras = {name: feature["dtype"] for name, feature in features.items() if feature["dtype"] in PICTURES}
        depth = [name for name in cameras if _is_depth(features[name])]
        depth += _named_depth([name for name in cameras if name not in depth])
        layout = _Layout(
            version,
            {name: dtype for name, dtype in cameras.items() if name not in depth},
            {name: cameras[name] for name in depth},
            _plain_path(str(info.get("video_path") or "")),
            _plain_path(str(info["data_path"])),
            int(info.get("chunks_size") or CHUNK),
            float(info["fps"]),
            str(info.get("robot_type") or "robot"),
            _held_out(info.get("splits") or {}),
        )
        if not layout.fps > 0:
            raise ValueError(f"fps {layout.fps:g}")
    except (DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = error if isinstance(error, DecodeError) else repr(error)
        raise UserError(f"{str(folder)!r}: meta/info.json is damaged ({reason}): fetch it again") from error
    if not version.startswith(("v2.", "v3.")):
        raise UserError(f"{str(folder)!r} is LeRobot {version}: v2.0, v2.1 and v3.0 are read; convert it by lerobot")
    if not layout.cameras:
        also = f", but for the depth maps {', '.join(depth)}" if depth else ""
        raise UserError(f"{str(folder)!r} has no feature of dtype video or image{also}: there is nothing to see")
    if depth:
        log.warning("depth maps are no colour and were left out: %s", ", ".join(map(_plain, depth)))
    return layout


def _is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether a camera's feature says that it is a depth map; where it does so has changed between versions."""
    said = {**feature, **(feature.get("video_info") or {}), **(feature.get("info") or {})}
    flagged = said.get("is_depth_map") or said.get("video.is_depth_map")
    return bool(flagged) or str(said.get("video.pix_fmt")).startswith("gray1")  # gray10, gray12, gray16


def _named_depth(cameras: Sequence[str]) -> list[str]:
    """The cameras whose names say that they see depth: many data sets colour such maps, and flag none of them.

    None of them if no other camera is left: then it is but a name.
    """
    words = {name: set(re.split(r"[^a-z]+", _plain(name).lower())) for name in cameras}
    found = [name for name in cameras if "depth" in words[name] and not words[name] & {"rgb", "color", "colour"}]
    return found if len(found) < len(cameras) else []


def _plain(camera: str) -> str:
    return camera.removeprefix("observation.images.").removeprefix("observation.")


def _recording(folder: Path, layout: _Layout, episode: Mapping[str, Any], place: str, camera: str) -> Recording:
    """One camera of one episode."""
    index, start, end = int(episode["episode_index"]), 0.0, None
    table = str(inside(folder, _path(layout.data_path, episode, "data/", camera, layout.chunk)))
    footage: VideoFile | ImageFiles | ParquetImages
    if {**layout.cameras, **layout.depth}[camera] == "image":
        files = sorted((folder / "images" / camera).glob(f"episode[_-]{index:06d}/frame[_-]*"))
        if len(files) == episode.get("length"):
            footage = ImageFiles(tuple(map(str, files)), tuple(place / layout.fps for place in range(len(files))))
        else:
            footage = ParquetImages(table, camera, str(folder), ("episode_index", index), "timestamp")
    else:
        path = _path(layout.video_path, episode, f"videos/{camera}/", camera, layout.chunk)
        footage = VideoFile(str(inside(folder, path)))
        if layout.version.startswith("v3."):
            start = float(episode[f"videos/{camera}/from_timestamp"])
            end = float(episode[f"videos/{camera}/to_timestamp"])
    task = "; ".join(str(task) for task in episode["tasks"])
    counted = None if isinstance(footage, ParquetImages) else layout.fps
    return Recording(
        name=f"{place}/{_plain(camera)}",
        group=place,
        footage=footage,
        start=start,
        end=end,
        stated_fps=layout.fps,
        caption=task,
        camera=_plain(camera),
        split=None if layout.held_out is None else "heldout" if index in layout.held_out else "train",
        fields={"task": task, "robot": layout.robot},
        details={"table": table, "episode": index, "length": episode.get("length"), "fps": counted},
    )


@lru_cache(maxsize=1)
def _table(path: str) -> Any:
    """The columns that are needed of a file of rows. The last file is kept: episodes share one."""
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            return file.read([name for name in COLUMNS if name in names])
    except (OSError, ValueError, LookupError) as error:
        raise DecodeError(f"its table cannot be read ({str(error)[:100]})") from error


def _episodes_v3(folder: Path) -> Iterator[dict[str, Any] | DecodeError]:
    """Rows of ``meta/episodes/chunk-*/file-*.parquet``, less their statistics."""
    import pyarrow.parquet as parquet

    files = sorted((folder / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise UserError(f"{str(folder)!r} has no meta/episodes/chunk-*/file-*.parquet: fetch the data set whole")
    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
                rows = file.read(names).to_pylist()
        except (OSError, ValueError, LookupError) as error:
            yield DecodeError(f"{path.name} cannot be read ({str(error)[:100]})")
            continue
        yield from rows


def _episodes_v2(folder: Path) -> Iterator[dict[str, Any] | DecodeError]:
    """Lines of ``meta/episodes.jsonl``."""
    try:
        for _, row in read_rows(folder / "meta" / "episodes.jsonl"):
            yield row
    except DecodeError as error:
        raise UserError(f"{str(folder)!r}: meta/{error}: fetch the data set whole") from error


def _path(template: str, episode: Mapping[str, Any], prefix: str, camera: str, chunk: int) -> str:
    """A template of info.json filled in; v2 counts chunks of ``chunk`` episodes."""
    index = int(episode["episode_index"])
    values = {
        "episode_index": index,
        "episode_chunk": index // chunk,
        "video_key": camera,
        "chunk_index": episode.get(f"{prefix}chunk_index"),
        "file_index": episode.get(f"{prefix}file_index"),
    }
    return template.format_map(values)


def _plain_path(template: str) -> str:
    """A template of info.json.

    Raises:
        DecodeError: it asks for more than the value of a field. ValueError: it is malformed.
    """
    for _, field, format, converted in string.Formatter().parse(template):
        if field is not None and (converted or not field.isidentifier() or not PLAIN_FORMAT.fullmatch(format or "")):
            raise DecodeError(f"in the path {template[:200]!r} {field!r} is no plain field")
    return template


def _held_out(splits: Mapping[str, Any]) -> frozenset[int] | None:
    """The episodes of all splits that are not called train, such as ``{"train": "0:40", "val": "40:50"}``."""
    others = [text for name, text in splits.items() if name != "train" and isinstance(text, str)]
    ranges = [range(*(int(bound) for bound in text.split(":"))) for text in others]
    return frozenset(index for numbers in ranges for index in numbers) if ranges else None
