"""A recording's controls at the moments of a clip's frames. A clip that they do not cover wholly is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anyflow.data.controls import Control, control_rows, led_to
from anyflow.data.faults import DecodeError
from anyflow.data.frame_times import PAUSE
from anyflow.data.importing.recording import Track
from anyflow.data.safety import plain

CLOCK_ERROR = 5e-4
"""Seconds that are forgiven: clocks are rounded."""


class NoLabelError(Exception):
    """Frames of a clip have no label; the message is why the clip is left out."""


def rows_of(name: str, values: Sequence[Any]) -> np.ndarray:
    """A control's rows as numbers, [N, ...]: NaN where a row or one of its numbers is missing.

    Raises:
        DecodeError: rows of several lengths, or of anything but numbers.
    """
    try:
        shape = next((np.shape(row) for row in values if row is not None), ())
        missing = np.full(shape, np.nan)
        return np.array([missing if row is None else row for row in values], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DecodeError(f"its {name} has rows that are no numbers or of several lengths") from error


def check_tracks(tracks: Mapping[str, Track]) -> None:
    """Compare what a source says of its controls with itself.

    Raises:
        DecodeError: there are no values, or not one for each time, or the times do not ascend.
    """
    for name, track in tracks.items():
        if len(track.times) == 0 or len(track.times) != len(track.values):
            raise DecodeError(f"its {name} have {len(track.values)} values at {len(track.times)} times")
        if not np.isfinite(track.times).all() or (np.diff(track.times) < 0).any():
            raise DecodeError(f"the times of its {name} do not ascend")


def controls_at(tracks: Mapping[str, Track], times: np.ndarray) -> dict[str, Any]:
    """Every control at a clip's frames: {name: [value, ...]}, one value a frame.

    Args:
        tracks: of the recording, checked.
        times: of the clip's frames, in seconds after the recording's start, ascending.

    Raises:
        NoLabelError: a control begins after the clip does, ends before it, pauses in it, or lacks a value.
    """
    controls: dict[str, Any] = {}
    for name, track in tracks.items():
        first, last = _span(track, times)
        if _lacks(track.values[first : last + 1]):
            raise NoLabelError("with a label missing")
        values: Sequence[Any] | np.ndarray
        if track.action:
            values = _combined(name, track, track.action, times)
        else:
            values = _interpolated(track, times) if track.linear else _held(track, times)
        controls[name] = plain(_seen_from_start(np.asarray(values)) if track.relative else values)
    return controls


def _span(track: Track, times: np.ndarray) -> tuple[int, int]:
    """Places of the first and last value that a clip needs.

    A value holds until the next one; before a pause, and at the end, as long as it usually is to the next one.
    """
    steps = np.diff(track.times)
    usual = max(float(np.median(steps)) if len(steps) else 0.0, 2 * CLOCK_ERROR)
    begin, end = float(times[0]), float(times[-1])
    first = int(np.searchsorted(track.times, begin + CLOCK_ERROR, side="right")) - 1
    last = int(np.searchsorted(track.times, end - CLOCK_ERROR if track.linear else end + CLOCK_ERROR, side="right"))
    last = min(last, len(track.times) - 1) if track.linear else last - 1
    if begin <= track.times[0] - usual + CLOCK_ERROR or end >= track.times[-1] + usual - CLOCK_ERROR:
        raise NoLabelError("beyond the labels")
    first, last = max(first, 0), max(last, 0)
    pauses = steps > PAUSE * usual + CLOCK_ERROR
    outlived = pauses[last : last + 1].any() and end >= track.times[last] + usual - CLOCK_ERROR
    if pauses[first:last].any() or outlived:
        raise NoLabelError("across a pause of the labels")
    return first, last


def _lacks(value: Any) -> bool:
    """Whether a value is none, or holds a number that is none."""
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return any(map(_lacks, value.tolist()))
        return value.dtype.kind == "f" and not np.isfinite(value).all()
    if isinstance(value, float | np.floating):
        return not math.isfinite(value)
    if isinstance(value, list | tuple):
        return any(map(_lacks, value))
    if isinstance(value, dict):
        return any(_lacks(item) for item in value.values() if item is not None)
    return value is None


def _held(track: Track, times: np.ndarray) -> list[Any]:
    """The value that holds at each time."""
    return [track.values[place] for place in _places(track, times)]


def _places(track: Track, times: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(track.times, times + CLOCK_ERROR, side="right") - 1, 0, len(track.times) - 1)


def _combined(name: str, track: Track, action: Control, times: np.ndarray) -> np.ndarray:
    """What leads from each frame to the next one: all of a movement, wherever the rates differ."""
    after = times[-1] + (times[-1] - times[-2] if len(times) > 1 else 0.0)
    places = _places(track, np.append(times, after))
    if after > track.times[-1] + CLOCK_ERROR:
        places[-1] = len(track.times)  # the last value leads there
    begin = places[0]
    rows = control_rows(name, action, track.values[begin : places[-1] + 1])
    return led_to(rows, action, places - begin)[1:]


def _interpolated(track: Track, times: np.ndarray) -> np.ndarray:
    values = np.asarray(track.values, dtype=np.float64)
    columns = values.reshape(len(values), -1)
    drawn = np.stack([np.interp(times, track.times, column) for column in columns.T], axis=-1)
    return drawn.reshape(len(times), *values.shape[1:])


def _seen_from_start(path: np.ndarray) -> np.ndarray:
    """[F, 3] of (x, y, heading in degrees), as seen from the first: x ahead, y to the left, metres stay metres."""
    angle = np.radians(path[0, 2])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    heading = (path[:, 2:] - path[0, 2] + 180) % 360 - 180
    return np.concatenate([(path[:, :2] - path[0, :2]) @ turn.T, heading], axis=1)
