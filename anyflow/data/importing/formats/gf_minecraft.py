"""GF-Minecraft of GameFactory: annotation.csv (video, start, end, prompt), metadata/*.json (actions), video/*.mp4.

The layout is that of the data set's card (https://huggingface.co/datasets/KwaiVGI/GameFactory-Dataset) and of a public
reader of data_2003: ``biome``, ``initial_weather``, ``start_time`` and ``actions``, whose keys are the frames' numbers.
The annotation's columns are found by the words in their names; a file of the release itself was not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.footage import probe
from anyflow.data.importing.recording import PLAYER, Found, Recording, Track, Unusable, VideoFile
from anyflow.data.safety import inside, read_json_object
from anyflow.data.tables import read_rows

LOOKS_FOR = "annotation.csv beside the folders video and metadata, here or in data_*"
DOMAIN = "games"
KEYS = {
    "forward": ("ws", 1),
    "back": ("ws", 2),
    "left": ("ad", 1),
    "right": ("ad", 2),
    "jump": ("scs", 1),
    "sneak": ("scs", 2),
    "sprint": ("scs", 3),
}
"""What is done -> the field that codes it, and its code."""
HELD = Control("per frame: keys held", len(KEYS), "multi-hot", numbers=tuple(KEYS), at="transition")
CAMERA = Control(
    "per frame: how the view turns (pitch, yaw) up to the next frame, as the data set codes it",
    2,
    numbers=("pitch_delta", "yaw_delta"),
    at="transition",
    skipped="sum",
)
CONTROLS: dict[str, Control | str] = {
    "actions": "per frame: ws (1 forward, 2 back), ad (1 left, 2 right), scs (1 jump, 2 sneak, 3 sprint), "
    "pitch_delta and yaw_delta as the data set codes them",
    "keys": HELD,
    "camera": CAMERA,
    "trajectory": PLAYER,
}


def detect(folder: Path) -> bool:
    """Whether a part of the data set lies here."""
    return bool(_parts(folder))


def recordings(folder: Path) -> Iterator[Found]:
    """The annotated stretches of every video."""
    for part in _parts(folder):
        for number, row in read_rows(part / "annotation.csv"):
            place = f"{part.name}/annotation.csv:{number}"
            try:
                if isinstance(row, DecodeError):
                    raise row
                yield _recording(folder, part, row)
            except (DecodeError, KeyError, TypeError, ValueError, OverflowError) as error:
                yield Unusable(
                    place, str(error)[:200] if isinstance(error, DecodeError) else f"a damaged row ({error!r})"
                )


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """Actions and pose of the stretch's frames."""
    numbers, actions, poses = _actions(recording.details["metadata"])
    first, last, rate = (recording.details[name] for name in ("first", "last", "fps"))
    start, end = np.searchsorted(numbers, [first, last])
    if start == end:
        raise DecodeError(f"it has no actions for the frames {first} to {last}")
    times, own = (numbers[start:end] - first) / rate, actions[start:end]
    return {
        "actions": Track(times, own),
        "keys": Track(times, np.array([_held(action) for action in own]), action=HELD),
        "camera": Track(times, np.array([_turned(action) for action in own]), action=CAMERA),
        "trajectory": Track(times, poses[start:end]),
    }


def _held(action: Mapping[str, Any]) -> list[int]:
    """Of each of ``KEYS``, whether it is held."""
    return [int(action[field] == code) for field, code in KEYS.values()]


def _turned(action: Mapping[str, Any]) -> list[float]:
    """The view's turn.

    Raises:
        DecodeError: it is no number.
    """
    try:
        return [float(action["pitch_delta"]), float(action["yaw_delta"])]
    except (TypeError, ValueError) as error:
        raise DecodeError(f"its pitch_delta or yaw_delta is no number ({error})") from error


def _parts(folder: Path) -> list[Path]:
    places = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    return [
        place
        for place in places
        if (place / "annotation.csv").is_file() and (place / "video").is_dir() and (place / "metadata").is_dir()
    ]


def _recording(folder: Path, part: Path, row: Mapping[str, Any]) -> Recording:
    """A row; its columns are told apart by the words in their names, which differ between the releases."""
    name = Path(_column(row, "name")).stem
    first, last = int(float(_column(row, "start"))), int(float(_column(row, "end")))
    video = inside(part, f"video/{name}.mp4")
    metadata = inside(part, f"metadata/{name}.json")
    if not video.is_file():
        raise DecodeError(f"there is no video/{name}.mp4")
    if not 0 <= first < last:
        raise DecodeError(f"frames {first} to {last} are no stretch")
    fps = _rate(str(video))
    described = _described(str(metadata))
    group = (part.relative_to(folder) / name).as_posix()
    return Recording(
        name=f"{group}/{first:06d}",
        group=group,
        footage=VideoFile(str(video)),
        start=first / fps,
        end=last / fps,
        caption=_column(row, "prompt"),
        fields={key: described[key] for key in ("biome", "initial_weather", "start_time") if key in described},
        details={"metadata": str(metadata), "first": first, "last": last, "fps": fps},
    )


def _column(row: Mapping[str, Any], word: str) -> str:
    for name, value in row.items():
        if word in str(name).lower():
            return str(value)
    raise DecodeError(f"no column with {word!r} in its name")


@lru_cache(maxsize=64)
def _rate(video: str) -> float:
    return probe(Recording("", "", VideoFile(video))).fps


@lru_cache(maxsize=64)
def _described(metadata: str) -> dict[str, Any]:
    """The metadata's plain values."""
    document = read_json_object(Path(metadata))
    return {name: value for name, value in document.items() if isinstance(value, str | int | float)}


@lru_cache(maxsize=1)
def _actions(metadata: str) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray]:
    """(frames' numbers [N], ascending; each one's action; [N, 5] poses). The last file is kept."""
    document = read_json_object(Path(metadata))
    frames = document.get("actions")
    if not isinstance(frames, dict):
        raise DecodeError(f"{Path(metadata).name} has no actions")
    actions: list[dict[str, Any]] = []
    poses: list[list[float]] = []
    try:
        numbers = {int(key): key for key in frames}
        for number in sorted(numbers):
            frame = frames[numbers[number]]
            actions.append({name: frame.get(name, 0) for name in ("ws", "ad", "scs", "pitch_delta", "yaw_delta")})
            position = [float(value) for value in frame.get("pos") or (0, 0, 0)][:3]
            poses.append([*position, float(frame.get("yaw", 0)), float(frame.get("pitch", 0))])
        return np.array(sorted(numbers), dtype=np.int64), actions, np.array(poses).reshape(-1, 5)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DecodeError(f"{Path(metadata).name}: frame {len(actions)} is damaged ({error!r})") from error
