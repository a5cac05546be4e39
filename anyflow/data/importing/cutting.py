"""Recordings to clips: length, stride and rate; scene cuts, still clips and duplicates are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyflow.data.clip import Clip, encode_mp4
from anyflow.data.decode import DecodeError
from anyflow.data.importing.footage import shard_ready_bytes
from anyflow.data.importing.recording import Recording, Track
from anyflow.data.importing.views import frames_at
from anyflow.data.safety import plain
from anyflow.errors import UserError

PRESET = "veryfast"
"""At crf 18 the files are as large as those of slower presets were seen to be, in half the time."""
THUMB_ROWS = 32
CUT_RATIO = 3.0
CUT_MEMORY = 8
"""A cut changes the picture this many times more than the steps before it did: fast motion is no cut."""
PRINT_CELLS = 16
SAME_LEVELS = 6
"""Two clips are one if no cell of their prints differs by more levels: recompression changes 2 or 3."""


@dataclass(frozen=True)
class Cutting:
    """How clips are cut.

    Attributes:
        frames: of a clip. fps: of a clip. height, width: of a clip.
        stride: frames from the beginning of one clip to that of the next.
        cut_threshold: mean change of a picture, in levels of 255, from which a scene cut is seen; 0 sees none.
        min_motion: mean change of picture to picture below which a clip counts as still; 0 keeps all.
        most: clips of one recording at most; 0 for all.
    """

    frames: int
    fps: float
    height: int
    width: int
    stride: int
    cut_threshold: float = 30.0
    min_motion: float = 0.0
    most: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "stride", "fps"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name):g}: give more than 0")
        if self.height % 2 or self.width % 2:
            raise UserError(f"--size {self.width}x{self.height}: H.264 needs an even width and height")

    def expected(self, seconds: float) -> int:
        """Clips of a recording of that length without cuts: at least 0."""
        room = int(seconds * self.fps + 1e-6) - self.frames
        count = room // self.stride + 1 if room >= 0 else 0
        return min(count, self.most) if self.most else count


@dataclass
class CutReport:
    """What became of footage besides clips: ``dropped`` counts those left out by reason, ``scenes`` the cuts."""

    dropped: Counter[str] = field(default_factory=Counter)
    scenes: int = 0


@dataclass(frozen=True)
class CutClip:
    """A clip with its print, by which duplicates are found: uint8 [3 x PRINT_CELLS x PRINT_CELLS]."""

    clip: Clip
    print: np.ndarray


def cut(
    recording: Recording, cutting: Cutting, domain: str, licence: str, tracks: Mapping[str, Track], report: CutReport
) -> Iterator[CutClip]:
    """The clips of a recording, in order.

    Args:
        domain, licence: of the clips.
        tracks: the recording's controls.
        report: is added to.

    Raises:
        DecodeError: while iterating, where the footage is damaged; the clips before it are good.
    """
    number, still = 0, 0
    for first, window, thumbs in _windows(recording, cutting, report):
        motion = float(np.abs(np.diff(thumbs, axis=0)).mean())
        if motion < cutting.min_motion:
            still += 1
            report.dropped["still"] += 1
            continue
        clip = Clip(
            key=f"{recording.key}-{number:04d}",
            caption=recording.caption or "",
            fps=cutting.fps,
            domain=domain,
            mp4=_mp4(recording, cutting, first, window),
            controls=_controls(tracks, first / cutting.fps + np.arange(cutting.frames) / cutting.fps),
            attributes=_attributes(recording),
            licence=licence,
        )
        yield CutClip(clip, _print(window))
        number += 1
        if cutting.most and number == cutting.most:
            return
    if number + still == 0:
        report.dropped["too short"] += 1


def _windows(
    recording: Recording, cutting: Cutting, report: CutReport
) -> Iterator[tuple[int, list[np.ndarray], np.ndarray]]:
    """(number of the first frame, frames, their thumbnails) of every clip that lies within one scene."""
    window: list[np.ndarray] = []
    thumbs: list[np.ndarray] = []
    changes: list[float] = []
    first = 0  # of the next clip
    for number, frame in enumerate(frames_at(recording, cutting.fps, cutting.height, cutting.width)):
        thumb = _thumbnail(frame)
        if thumbs and cutting.cut_threshold:
            change = float(np.abs(thumb - thumbs[-1]).mean())
            # A median: an earlier cut among them says nothing. The first steps have nothing to be compared with.
            usual = float(np.median(changes)) if len(changes) >= 2 else np.inf
            changes = [*changes[1 - CUT_MEMORY :], change]
            if change >= cutting.cut_threshold and change >= CUT_RATIO * usual:
                report.scenes += 1
                window, thumbs, first = [], [], number
        if number < first:  # the stride is longer than the clip: only what cuts are seen by is kept
            thumbs = [thumb]
            continue
        if number == first:
            thumbs = []
        window.append(frame)
        thumbs.append(thumb)
        if len(window) == cutting.frames:
            yield first, window, np.stack(thumbs)
            first += cutting.stride
            window, thumbs = window[cutting.stride :], thumbs[cutting.stride :] or thumbs[-1:]


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    """float32 [h, w, 3] of about THUMB_ROWS rows: each the mean of a square (samples would flicker)."""
    side = max(1, frame.shape[0] // THUMB_ROWS)
    height, width = frame.shape[0] // side, frame.shape[1] // side
    cut = frame[: height * side, : width * side]
    rows = cut.reshape(height, side, -1).sum(axis=1, dtype=np.uint32)  # along memory first: most of the work, quickly
    return rows.reshape(height, width, side, 3).sum(axis=2, dtype=np.uint32).astype(np.float32) / side**2


def _print(window: list[np.ndarray]) -> np.ndarray:
    """Brightness in PRINT_CELLS x PRINT_CELLS cells of the first, middle and last frame."""
    cells = []
    for frame in (window[0], window[len(window) // 2], window[-1]):
        grey = frame.mean(axis=-1, dtype=np.float32)
        rows = np.add.reduceat(grey, _edges(grey.shape[0]), axis=0)
        sums = np.add.reduceat(rows, _edges(grey.shape[1]), axis=1)
        cells.append(sums / np.outer(_widths(grey.shape[0]), _widths(grey.shape[1])))
    return np.rint(np.stack(cells)).astype(np.uint8).reshape(-1)


def _edges(size: int) -> np.ndarray:
    return np.minimum(np.arange(PRINT_CELLS) * size // PRINT_CELLS, size - 1)


def _widths(size: int) -> np.ndarray:
    return np.maximum(np.diff(np.append(_edges(size), size)), 1)


def find_duplicates(prints: np.ndarray) -> list[tuple[int, int]]:
    """(clip, the earlier clip that it repeats), for every repeat among prints [N, D]: the earliest stays.

    They are the same if no cell differs by more than ``SAME_LEVELS`` and the mean of all cells by no more than one:
    recompression moves single cells. Only prints of about the same mean are compared, so few are.
    """
    sums = prints.sum(axis=1, dtype=np.int64)
    order = np.argsort(sums, kind="stable")
    sorted_sums = sums[order]
    kept = np.ones(len(prints), dtype=bool)
    repeats = []
    for clip in range(len(prints)):
        low = np.searchsorted(sorted_sums, sums[clip] - prints.shape[1], side="left")
        high = np.searchsorted(sorted_sums, sums[clip] + prints.shape[1], side="right")
        near = order[low:high]
        near = near[(near < clip) & kept[near]]
        if len(near):
            apart = np.abs(prints[near].astype(np.int16) - prints[clip]).max(axis=1)
            same = near[apart <= SAME_LEVELS]
            if len(same):
                kept[clip] = False
                repeats.append((clip, int(same.min())))
    return repeats


def _mp4(recording: Recording, cutting: Cutting, first: int, window: list[np.ndarray]) -> bytes:
    """The clip's file: the source's own where that is just the clip already, so that no quality is lost."""
    if first == 0:
        data = shard_ready_bytes(recording, cutting.frames, cutting.fps, cutting.height, cutting.width)
        if data is not None:
            return data
    return encode_mp4(np.stack(window), cutting.fps, preset=PRESET)


def _controls(tracks: Mapping[str, Track], times: np.ndarray) -> dict[str, Any]:
    """Every control at a clip's frames: {name: [value, ...]}, one value a frame."""
    controls = {}
    for name, track in tracks.items():
        if len(track.times) == 0 or len(track.times) != len(track.values):
            raise DecodeError(f"its {name} have {len(track.values)} values at {len(track.times)} times")
        values = _interpolated(track, times) if track.linear else _held(track, times)
        controls[name] = plain(_seen_from_start(np.asarray(values)) if track.relative else values)
    return controls


def _held(track: Track, times: np.ndarray) -> list[Any]:
    """The value that holds at each time; half a millisecond is forgiven, for clocks are rounded."""
    places = np.clip(np.searchsorted(track.times, times + 5e-4, side="right") - 1, 0, len(track.times) - 1)
    return [track.values[place] for place in places]


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


def _attributes(recording: Recording) -> dict[str, Any]:
    attributes = {name: plain(value) for name, value in recording.fields.items()}
    if recording.camera:
        attributes["camera"] = recording.camera
    return attributes
