"""When each frame of a video is on show: the one place that decides it.

What may be believed differs. Most containers stamp every frame with its time. AVI stamps packets in the order of coding
alone, so B-frames carry the times of others. Raw streams have no stamps. :func:`decide` chooses by a video's first
packets, and says what it had to guess. :func:`follow` then gives each frame its time. Both are functions of stamps and
rates: they know nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Generic, Literal, NamedTuple, TypeVar

from anyflow.data.faults import DecodeError

T = TypeVar("T")

HEAD = 32
"""Packets by which it is decided what to believe."""
MAX_RATE = 1000
"""Frames a second: a file that claims more would be decoded for ever to fill a clip."""
PAUSE = 5
"""A frame that stays longer than this many usual intervals is followed by another scene: the camera stood still."""
SLACK = 1 / 4
"""Of an interval: a frame takes its place so much early, for containers round their times."""
AGREE = 0.02
"""A header's rate is believed if the stamps' own is no further off than this share."""
USUAL = 2 / 3
"""Share of the first intervals from which on those near the middle one are the usual ones."""
WRAPS = (24, 31, 32, 33)
"""Bits of counters that start again at 0: FLV, RTP, RTMP and MPEG-TS."""
RATES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 12.5, 15, 16, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120, 144, 240)
NTSC = tuple(Fraction(1000 * rate, 1001) for rate in (24, 30, 60, 120))
NEAREST = 0.005

Why = Literal["", "pause", "reset", "damaged", "repeated", "disordered", "missing"]
"""What is odd about a frame's time: it comes after a pause, after a clock that was set back, after a frame that is
damaged, at the time of the frame before it, a little before that one, or without a stamp."""
APART = ("pause", "reset", "damaged")
ODDITIES = {
    "pause": "pauses in the recording: no clip bridges one",
    "reset": "time stamps that are set back: no clip bridges such a place",
    "damaged": "damaged pictures were left out: no clip bridges one",
    "repeated": "repeated time stamps: the later frame is shown",
    "disordered": "time stamps out of order: moved to that of the frame before",
    "missing": "frames without a time stamp: a usual interval after the one before",
}
"""In words."""

IN_ORDER = "times in the order of coding alone: frames taken in the order of showing"


class Stamp(NamedTuple):
    """A packet's time of presentation and of decoding, in ticks."""

    pts: int | None
    dts: int | None


@dataclass(frozen=True)
class Clock:
    """What a video's times are taken from.

    Attributes:
        how: "stamped": each frame's own stamp; "ordered": the frame shown k-th has the k-th smallest of the packets'
            stamps; "counted": frame k is at k / rate.
        rate: frames a second, usually. tick: seconds of a stamp's unit.
        notes: what had to be guessed, in words.
    """

    how: Literal["stamped", "ordered", "counted"]
    rate: Fraction
    tick: Fraction
    notes: tuple[str, ...] = ()


class Shown(NamedTuple, Generic[T]):
    """A frame, the seconds from which and until which it is on show, and what is odd about its start."""

    item: T
    start: float
    until: float
    why: Why = ""


def decide(
    head: Sequence[Stamp],
    tick: Fraction | None,
    claimed: Fraction | None,
    reorders: bool,
    declared: float | None = None,
) -> Clock:
    """Choose what to take a video's times from.

    Args:
        head: its first packets' stamps, in the order of coding.
        tick: seconds of their unit.
        claimed: frames a second, as the header says.
        reorders: whether its decoder shows frames in another order than that of coding.
        declared: frames a second, as whoever published it says; wins over everything in the file.

    Raises:
        DecodeError: nothing tells the rate, or it is one that no camera has.
    """
    claimed = claimed if claimed and claimed > 0 else None
    if declared:
        return _sane(Clock("counted", Fraction(declared).limit_denominator(100_000), Fraction(0)))
    stamps = [stamp.pts for stamp in head if stamp.pts is not None]
    how: Literal["stamped", "ordered"] = "stamped"
    if 2 * len(stamps) < len(head):
        stamps, how = [stamp.dts for stamp in head if stamp.dts is not None], "ordered"
    elif reorders and len(head) > 1 and all(earlier < later for earlier, later in pairwise(stamps)):
        how = "ordered"  # nobody knew the order of showing, or it is that of coding: then both are the same
    different = sorted(set(stamps))
    if not tick or 10 * len(different) < 9 * len(head):
        if claimed is None:
            raise DecodeError("it has neither time stamps nor a frame rate: convert it, to mp4 for example")
        what = "repeat" if tick and 10 * len(stamps) >= 9 * len(head) else "are missing"
        return _sane(
            Clock(
                "counted", claimed, Fraction(0), (f"time stamps {what}: frames counted at {_said(claimed)} a second",)
            )
        )
    notes: tuple[str, ...] = (IN_ORDER,) if how == "ordered" and reorders else ()
    measured = _measured(different, tick)
    if claimed is None and measured is None:
        raise DecodeError("it does not tell its frame rate: convert it, to mp4 for example")
    if claimed and (measured is None or len(different) < 5 or _agrees(different, tick, measured, claimed)):
        return _sane(Clock(how, claimed, tick, notes))
    assert measured is not None
    rate = _nearest(measured)
    if claimed:
        notes += (f"header of {_said(claimed)} frames a second, time stamps of {_said(rate)}: the stamps are believed",)
    return _sane(Clock(how, rate, tick, notes))


def _measured(stamps: Sequence[int], tick: Fraction) -> Fraction | None:
    """Frames a second of ascending stamps, by the mean interval, for ticks may be coarse.

    Of a camera that misses frames, the intervals near the middle one count; where these are too few to be the usual
    ones (50 and 150 ms in turn), all but the pauses.
    """
    steps = sorted(later - earlier for earlier, later in pairwise(stamps))
    if not steps:
        return None
    middle = steps[len(steps) // 2]
    usual = [step for step in steps if middle <= 2 * step <= 3 * middle]
    if len(usual) < USUAL * len(steps):
        usual = [step for step in steps if step <= PAUSE * middle]
    return Fraction(len(usual), sum(usual)) / tick


def _agrees(stamps: Sequence[int], tick: Fraction, measured: Fraction, claimed: Fraction) -> bool:
    """Whether a header's rate is that of the usual intervals, or that of all: where these are long and short by turns,
    the first and last stamps are off by up to half of what intervals differ by.
    """
    if abs(measured / claimed - 1) <= AGREE:
        return True
    steps = [later - earlier for earlier, later in pairwise(stamps)]
    off = abs(sum(steps) * tick * claimed - len(steps))
    uneven = min((max(steps) - min(steps)) * tick * claimed, Fraction(2))
    return off <= AGREE * len(steps) + uneven / 2


def _nearest(rate: Fraction) -> Fraction:
    """The rate that cameras have, if it is near one."""
    best = min((*map(Fraction, RATES), *NTSC), key=lambda known: abs(known - rate))
    return best if abs(best / rate - 1) <= NEAREST else rate.limit_denominator(1000)


def _sane(clock: Clock) -> Clock:
    if clock.rate > MAX_RATE:
        raise DecodeError(f"the video claims {float(clock.rate):.0f} frames a second")
    return clock


def _said(rate: Fraction) -> str:
    return f"{float(rate):.5g}"


def follow(frames: Iterable[tuple[T, int | None]], clock: Clock, zero: int | None = None) -> Iterator[Shown[T]]:
    """Give each frame the seconds during which it is on show.

    Starts never descend. A frame ends where the next one begins. Before a pause, and at the end, it stays as long as
    frames usually do.

    Args:
        frames: in the order of showing, each with its stamp.
        clock: what to believe.
        zero: the stamp that is the time 0; None for that of the first frame that has one.
    """
    interval = float(1 / clock.rate)
    timeline = _Timeline(clock, zero)
    previous: T | None = None
    begun: tuple[float, Why] | None = None
    for frame, stamp in frames:
        time, why = timeline.place(stamp)
        if begun is not None:
            until = begun[0] + interval if why in APART else time
            yield Shown(previous, begun[0], until - SLACK * interval, begun[1])  # type: ignore[arg-type]
        previous, begun = frame, (time, why)
    if begun is not None:
        yield Shown(previous, begun[0], begun[0] + (1 - SLACK) * interval, begun[1])  # type: ignore[arg-type]


class _Timeline:
    """Where on one ascending line the frames' stamps lie."""

    def __init__(self, clock: Clock, zero: int | None) -> None:
        self.counted = clock.how == "counted"
        self.interval, self.tick = float(1 / clock.rate), float(clock.tick)
        self.zero, self.shift = zero, 0.0
        self.number, self.last = 0, 0.0

    def place(self, stamp: int | None) -> tuple[float, Why]:
        """The next frame's time, in seconds."""
        if self.counted:
            time, why = self.number * self.interval, ""
        elif stamp is None:
            time, why = (self.last + self.interval if self.number else 0.0), "missing"
        else:
            time, why = self._stamped(stamp)
        self.number, self.last = self.number + 1, time
        return time, why  # type: ignore[return-value]

    def _stamped(self, stamp: int) -> tuple[float, Why]:
        expected = self.last + self.interval
        if self.zero is None:
            self.zero, self.shift = stamp, expected if self.number else 0.0
        time = (stamp - self.zero) * self.tick + self.shift
        if self.number == 0:
            return time, ""
        step, pause = time - self.last, PAUSE * self.interval
        if 0 < step <= pause:
            return time, ""
        if step > pause:
            return time, "pause"
        if step == 0:
            return time, "repeated"
        for bits in WRAPS:
            around = 2**bits * self.tick
            if 0 < step + around <= pause:
                self.shift += around
                return time + around, ""
        if step > -pause:
            return self.last, "disordered"
        self.shift += expected - time
        return expected, "reset"


class Sample(NamedTuple, Generic[T]):
    """A frame that is on show at so many ``instants`` of a steady rate from ``time`` on; ``apart``: after a pause."""

    item: T
    instants: int
    time: float
    apart: bool


def resampled(shown: Iterable[Shown[T]], fps: float, bridge: bool = False) -> Iterator[Sample[T]]:
    """Bring frames to a steady rate: the frame on show at every instant t0, t0 + 1 / fps, t0 + 2 / fps, ...

    Args:
        shown: frames and their times.
        fps: instants a second.
        bridge: hold a frame through a pause; else t0 is the first frame's start, and after every pause anew.
    """
    origin, written, apart = None, 0, False
    for frame in shown:
        if origin is None or (frame.why in APART and not bridge):
            # A part of a video may begin while its first frame is on show already.
            apart, origin, written = origin is not None, max(frame.start, 0.0), 0
        wanted = math.ceil((frame.until - origin) * fps - 1e-9)
        if wanted > written:
            yield Sample(frame.item, wanted - written, origin + written / fps, apart)
            written, apart = wanted, False
