"""Recordings to clips: length, stride and rate; scene cuts, still clips and duplicates are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyflow.data.clip import Clip, encode_mp4
from anyflow.data.importing.footage import shard_ready_bytes
from anyflow.data.importing.labels import NoLabelError, check_tracks, controls_at
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
TELLING_CELLS = 8
"""Cells that are compared before all others are."""
LOOKED_AT = 4096
"""Prints by which it is seen which cells these are, about."""


@dataclass(frozen=True)
class Cutting:
    """How clips are cut.

    Attributes:
        frames: of a clip. fps: of a clip. height, width: of a clip.
        stride: frames from the beginning of one clip to that of the next.
        cut_threshold: mean change of a picture, in levels of 255, from which a scene cut is seen; 0 sees none.
        min_motion: mean change of picture to picture below which a clip counts as still; 0 keeps all.
        most: clips of one recording at most; 0 for all.
        seed: of which of several captions a clip takes.
    """

    frames: int
    fps: float
    height: int
    width: int
    stride: int
    cut_threshold: float = 30.0
    min_motion: float = 0.0
    most: int = 0
    seed: int = 0

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
    """What became of footage besides clips.

    Attributes:
        dropped: clips left out, counted by reason. scenes: cuts seen.
        notes: what had to be guessed or converted -> the recordings that it was.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    scenes: int = 0
    notes: dict[str, dict[str, None]] = field(default_factory=dict)

    def note(self, name: str, text: str) -> None:
        """Remember what was guessed or converted in a recording, once."""
        self.notes.setdefault(text, {})[name] = None


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
    check_tracks(tracks)
    for text in recording.notes:
        report.note(recording.name, text)
    number, left_out = 0, 0
    for window, times, thumbs in _windows(recording, cutting, report):
        motion = float(np.abs(np.diff(thumbs, axis=0)).mean())
        try:
            if motion < cutting.min_motion:
                raise NoLabelError("still")
            controls = controls_at(tracks, times)
        except NoLabelError as error:
            left_out += 1
            report.dropped[str(error)] += 1
            continue
        key = f"{recording.key}-{number:04d}"
        clip = Clip(
            key=key,
            caption=recording.caption_of(key, cutting.seed),
            fps=cutting.fps,
            domain=domain,
            mp4=_mp4(recording, cutting, times[0], window),
            controls=controls,
            attributes=_attributes(recording),
            licence=licence,
        )
        yield CutClip(clip, _print(window))
        number += 1
        if cutting.most and number == cutting.most:
            return
    if number + left_out == 0:
        report.dropped["too short"] += 1


def _windows(
    recording: Recording, cutting: Cutting, report: CutReport
) -> Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
    """(frames, their times, their thumbnails) of every clip that lies within one scene, and bridges no pause."""
    window: list[np.ndarray] = []
    times: list[float] = []
    thumbs: list[np.ndarray] = []
    changes: list[float] = []
    skip = 0  # frames up to the next clip
    for frame, time, apart in frames_at(recording, cutting.fps, cutting.height, cutting.width, report.note):
        thumb = _thumbnail(frame)
        if apart:
            window, times, thumbs, skip = [], [], [], 0
        elif thumbs and cutting.cut_threshold:
            change = float(np.abs(thumb - thumbs[-1]).mean())
            # A median: an earlier cut among them says nothing. The first steps have nothing to be compared with.
            usual = float(np.median(changes)) if len(changes) >= 2 else np.inf
            changes = [*changes[1 - CUT_MEMORY :], change]
            if change >= cutting.cut_threshold and change >= CUT_RATIO * usual:
                report.scenes += 1
                window, times, thumbs, skip = [], [], [], 0
        if skip:  # the stride is longer than the clip: only what cuts are seen by is kept
            skip -= 1
            thumbs = [thumb]
            continue
        if not window:
            thumbs = []
        window.append(frame)
        times.append(time)
        thumbs.append(thumb)
        if len(window) == cutting.frames:
            yield window, np.array(times), np.stack(thumbs)
            skip = max(0, cutting.stride - cutting.frames)
            window, times = window[cutting.stride :], times[cutting.stride :]
            thumbs = thumbs[cutting.stride :] or thumbs[-1:]


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
    recompression moves single cells. Of the prints of about the same mean, those are compared whole that are alike in
    the few cells that differ most from clip to clip: of a million clips hardly any.
    """
    sums = prints.sum(axis=1, dtype=np.int64)
    order = np.argsort(sums, kind="stable")
    lows = np.searchsorted(sums[order], sums - prints.shape[1], side="left")
    highs = np.searchsorted(sums[order], sums + prints.shape[1], side="right")
    some = prints[:: 1 + len(prints) // LOOKED_AT]
    telling = np.argsort(-some.std(axis=0), kind="stable")[:TELLING_CELLS]
    cells = np.ascontiguousarray(prints[:, telling][order].T, dtype=np.int16)
    kept = np.ones(len(prints), dtype=bool)
    repeats = []
    for clip in range(len(prints)):
        near = order[_alike(cells, prints[clip, telling], lows[clip], highs[clip])]
        near = near[(near < clip) & kept[near]]
        if len(near):
            apart = np.abs(prints[near].astype(np.int16) - prints[clip]).max(axis=1)
            same = near[apart <= SAME_LEVELS]
            if len(same):
                kept[clip] = False
                repeats.append((clip, int(same.min())))
    return repeats


def _alike(cells: np.ndarray, wanted: np.ndarray, low: int, high: int) -> np.ndarray:
    """Places from ``low`` to ``high`` of cells [K, N] that are like those of one print [K], cell after cell."""
    near = low + np.flatnonzero(np.abs(cells[0, low:high] - wanted[0]) <= SAME_LEVELS)
    for row, level in zip(cells[1:], wanted[1:], strict=True):
        near = near[np.abs(row[near] - level) <= SAME_LEVELS]
    return near


def _mp4(recording: Recording, cutting: Cutting, start: float, window: list[np.ndarray]) -> bytes:
    """The clip's file: the source's own where that is just the clip already, so that no quality is lost."""
    if start == 0:
        data = shard_ready_bytes(recording, cutting.frames, cutting.fps, cutting.height, cutting.width)
        if data is not None:
            return data
    return encode_mp4(np.stack(window), cutting.fps, preset=PRESET)


def _attributes(recording: Recording) -> dict[str, Any]:
    attributes = {name: plain(value) for name, value in recording.fields.items()}
    if recording.camera:
        attributes["camera"] = recording.camera
    return attributes
