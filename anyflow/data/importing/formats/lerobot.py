"""LeRobot data sets, v3.0 (many episodes a file) and v2.0/v2.1 (an episode a file): every camera, actions, state, task.

The layout is that of https://github.com/huggingface/lerobot (``datasets/lerobot_dataset.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.decode import DecodeError
from anyflow.data.importing.recording import Found, Recording, Track, Unusable, VideoFile
from anyflow.data.safety import inside, read_json_object, read_rows
from anyflow.errors import UserError

LOOKS_FOR = "meta/info.json with a codebase_version"
DOMAIN = "robotics"
CONTROLS = {
    "actions": "per frame: the action vector of the robot, as the data set's feature 'action' has it",
    "state": "per frame: the state vector of the robot, as the feature 'observation.state' has it",
}
TRACKS = {"actions": "action", "state": "observation.state"}
CHUNK = 1000


def detect(folder: Path) -> bool:
    """Whether ``meta/info.json`` is LeRobot's."""
    try:
        return "codebase_version" in read_json_object(folder / "meta" / "info.json")
    except DecodeError:
        return False


def recordings(folder: Path) -> Iterator[Found]:
    """Every camera of every episode.

    Raises:
        UserError: an unknown version, no video, or damaged descriptions.
    """
    try:
        info = read_json_object(folder / "meta" / "info.json")
        version = str(info["codebase_version"])
        cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
        held = _held_out(info.get("splits") or {})
        shared = {"robot": str(info.get("robot_type") or "robot")}
        float(info["fps"])
    except (DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{str(folder)!r}: meta/info.json is damaged ({error!r}): fetch it again") from error
    if not version.startswith(("v2.", "v3.")):
        raise UserError(f"{str(folder)!r} is LeRobot {version}: v2.0, v2.1 and v3.0 are read; convert it by lerobot")
    if not cameras:
        raise UserError(f"{str(folder)!r} has no feature of dtype video: pictures in tables are not read; convert it")
    episodes = _episodes_v3(folder) if version.startswith("v3.") else _episodes_v2(folder)
    for number, episode in enumerate(episodes):
        if isinstance(episode, DecodeError):
            yield Unusable(f"episode {number}", str(episode))
            continue
        for camera in cameras:
            place = f"episode_{episode.get('episode_index', number)}"
            try:
                index = int(episode["episode_index"])
                place = f"episode_{index:06d}"
                start, end = 0.0, None
                if version.startswith("v3."):
                    start = float(episode[f"videos/{camera}/from_timestamp"])
                    end = float(episode[f"videos/{camera}/to_timestamp"])
                footage = inside(folder, _path(info["video_path"], episode, f"videos/{camera}/", camera))
                table = inside(folder, _path(info["data_path"], episode, "data/", camera))
                task = "; ".join(str(task) for task in episode["tasks"])
                yield Recording(
                    name=f"{place}/{camera.removeprefix('observation.images.').removeprefix('observation.')}",
                    group=place,
                    footage=VideoFile(str(footage)),
                    start=start,
                    end=end,
                    stated_fps=float(info["fps"]),
                    caption=task,
                    camera=camera.removeprefix("observation.images.").removeprefix("observation."),
                    split=None if held is None else "heldout" if index in held else "train",
                    fields={"task": task, **shared},
                    details={"table": str(table), "episode": index},
                )
            except (DecodeError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                yield Unusable(f"{place}/{camera}", f"its description is damaged ({error!r})"[:300])


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """Actions and state at the episode's time stamps."""
    episode = recording.details["episode"]
    table = _table(recording.details["table"])
    if "timestamp" not in table or "episode_index" not in table:
        raise DecodeError("its table has no column timestamp or episode_index")
    rows = np.flatnonzero(table["episode_index"] == episode)
    times = table["timestamp"][rows].astype(np.float64)
    return {name: Track(times, table[column][rows]) for name, column in TRACKS.items() if column in table}


@lru_cache(maxsize=1)
def _table(path: str) -> dict[str, np.ndarray]:
    """The columns that are needed of a file of rows: vectors as [N, D]. The last file is kept: episodes share one."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            wanted = [name for name in ("timestamp", "episode_index", *TRACKS.values()) if name in names]
            table = file.read(wanted)
    except (OSError, ValueError, LookupError) as error:
        raise DecodeError(f"its table cannot be read ({str(error)[:100]})") from error
    columns = {}
    for name in wanted:
        column = table.column(name).combine_chunks()
        if arrow.types.is_nested(column.type):
            flat = column.flatten().to_numpy(zero_copy_only=False)
            columns[name] = flat.reshape(len(column), -1) if len(column) else flat.reshape(0, 1)
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns


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


def _path(template: str, episode: Mapping[str, Any], prefix: str, camera: str) -> str:
    """A template of info.json filled in; v2 counts chunks of a thousand episodes."""
    index = int(episode["episode_index"])
    values = {
        "episode_index": index,
        "episode_chunk": index // CHUNK,
        "video_key": camera,
        "chunk_index": episode.get(f"{prefix}chunk_index"),
        "file_index": episode.get(f"{prefix}file_index"),
    }
    return template.format_map(values)


def _held_out(splits: Mapping[str, Any]) -> range | None:
    """The episodes of a split that is not called train, such as ``{"train": "0:40", "val": "40:50"}``."""
    for name, text in splits.items():
        if name != "train" and isinstance(text, str):
            first, _, last = text.partition(":")
            return range(int(first), int(last))
    return None
