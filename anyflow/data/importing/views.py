"""What several cameras saw of one moment as one picture: side by side or in a grid, synchronised by time.

A format only names the cameras of its recordings. Here those of one group are put together over the stretch of time
that all of them saw. Each camera fills a box of its own: all boxes have one height, no picture is stretched, and where
a box has another shape than its camera's picture, that picture alone is cropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from anyflow.data.decode import DecodeError
from anyflow.data.importing import footage
from anyflow.data.importing.footage import Facts, Moment
from anyflow.data.importing.recording import Found, ImageFiles, LeftOut, Recording, Unusable, Views, by_number
from anyflow.errors import UserError

APART, WIDE, GRID = "apart", "wide", "grid"
NoteOf = Callable[[str, str], None]
"""Is told a recording's name and what was guessed or converted in it."""
LATE = 0.5
"""Seconds by which a camera may end before the others: more is a damaged recording, not a rounded clock."""
SMALLEST = 4
"""Pixels of a camera's box: less shows nothing."""
SHORTEST = 0.05
"""Seconds that cameras must share: less is the border between two stretches of one of them."""


def together(found: Iterable[Found], views: str, cameras: Sequence[str]) -> Iterator[Found]:
    """The recordings of each moment as one, if ``views`` asks for it.

    Args:
        found: a source's.
        views: ``apart``, ``wide``, ``grid`` or cameras joined by ``+``, which then lie side by side in that order.
        cameras: the only ones, in their order; empty takes all.

    Raises:
        UserError: an unknown camera, or recordings that name none.
    """
    if views == APART:
        yield from found
        return
    moments: dict[str, dict[str, list[Recording]]] = {}
    damaged: dict[str, list[Unusable]] = {}
    for item in found:
        if isinstance(item, Recording):
            moments.setdefault(item.group, {}).setdefault(item.camera, []).append(item)
        elif isinstance(item, Unusable):
            damaged.setdefault(item.name.rpartition("/")[0] or item.name, []).append(item)
        else:
            yield item
    names, columns = _layout(views, cameras, _all_cameras(moments.values()))
    everything = views in (WIDE, GRID) and not cameras
    for moment, seen in moments.items():
        bad = damaged.pop(moment, [])
        made = list(_moment(moment, seen, names, columns, bad))
        yield from made
        if everything and not any(isinstance(item, Unusable) for item in made):  # a camera that is damaged everywhere
            yield from bad
    for items in damaged.values():
        yield from items


def _all_cameras(moments: Iterable[Mapping[str, list[Recording]]]) -> list[str]:
    """The cameras of all moments: in the order of a moment that has all, so that no damaged one shapes the others; by
    name where none has.
    """
    fullest: list[str] = []
    known: set[str] = set()
    for seen in moments:
        known.update(seen)
        fullest = list(seen) if len(seen) > len(fullest) else fullest
    if known <= set(fullest):
        return fullest
    return sorted(known, key=by_number)


def _layout(views: str, cameras: Sequence[str], known: Sequence[str]) -> tuple[list[str], int]:
    """(the cameras in the picture's order, how many lie side by side)."""
    if views not in (WIDE, GRID) and cameras:
        raise UserError(f"--views {views!r} names cameras itself: leave --cameras out, or write --views {WIDE}")
    names = list(cameras or known) if views in (WIDE, GRID) else views.split("+")
    if not any(known):
        raise UserError(f"--views {views!r}: this source's recordings name no cameras; leave --views out")
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UserError(
            f"--views {views!r}: there is no camera {unknown!r}; the source has {', '.join(sorted(known))} "
            f"(write {APART}, {WIDE}, {GRID}, or names joined by +)"
        )
    if len(set(names)) < len(names):
        raise UserError(f"--views {views!r} names a camera twice: give each one once")
    return names, math.ceil(math.sqrt(len(names))) if views == GRID else len(names)


def _moment(
    moment: str, seen: Mapping[str, list[Recording]], names: list[str], columns: int, damaged: list[Unusable]
) -> Iterator[Found]:
    """The stretches of a moment that all cameras saw; what is not among them is told."""
    for camera, others in seen.items():
        if camera not in names:
            yield from (LeftOut(part.name, f"another camera ({camera})", part.footage) for part in others)
    if len(names) == 1 and names[0] in seen:
        yield from seen[names[0]]
        return
    asked = tuple(part for name in names for part in seen.get(name, ()))
    missing = [name for name in names if name not in seen]
    if missing:
        why = f" ({damaged[0].reason})" if damaged else ""
        yield Unusable(
            moment,
            f"camera {', '.join(missing)} is missing{why}; --views can name those that are there",
            Views(asked, 1),
        )
        return
    stretches = _shared([seen[name] for name in names])
    if not stretches:
        yield Unusable(moment, f"its cameras {', '.join(names)} saw no moment together", Views(asked, 1))
        return
    used = {part.name for _, _, parts in stretches for part in parts}
    alone = (part for part in asked if part.name not in used)
    yield from (LeftOut(part.name, "seen by one camera alone", part.footage) for part in alone)
    for number, (start, end, parts) in enumerate(stretches):
        yield replace(
            parts[0],
            name=moment if len(stretches) == 1 else f"{moment}/{number:03d}",
            footage=Views(tuple(_within(part, start, end) for part in parts), columns),
            start=start - parts[0].clock,  # for the controls, whose times begin with the first camera's own
            end=None,
            fps=None,
            camera="+".join(names),
            clock=start,
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        )


def _shared(cameras: Sequence[list[Recording]]) -> list[tuple[float, float, tuple[Recording, ...]]]:
    """(first second, last second, a recording a camera) of every stretch that all cameras saw."""
    spans: list[tuple[float, float, tuple[Recording, ...]]] = [(-math.inf, math.inf, ())]
    least = SHORTEST if any(len(stretches) > 1 for stretches in cameras) else 0.0
    for stretches in cameras:
        spans = [
            (max(low, part.clock), min(high, part.clock + _seconds(part)), (*parts, part))
            for low, high, parts in spans
            for part in stretches
            if min(high, part.clock + _seconds(part)) - max(low, part.clock) > least
        ]
    return spans


def _seconds(part: Recording) -> float:
    """How long a recording is, as far as its description says."""
    if part.end is not None:
        return part.end - part.start
    if isinstance(part.footage, ImageFiles) and len(part.footage.times) > 1:
        times = part.footage.times
        return times[-1] + float(np.median(np.diff(times))) - part.start
    return math.inf


def _within(part: Recording, low: float, high: float) -> Recording:
    """A camera's part of a stretch: its pictures alone."""
    start = part.start + (low - part.clock)
    end = part.end if math.isinf(high) or part.clock + _seconds(part) <= high + 1e-6 else start + (high - low)
    return replace(part, start=start, end=end, caption=None, fields={}, details={})


@dataclass(frozen=True)
class Box:
    """Where a camera's picture lies in the whole: pixels."""

    top: int
    left: int
    height: int
    width: int


def boxes(sizes: Sequence[tuple[int, int]], columns: int, height: int, width: int) -> list[Box]:
    """A box a camera, in rows of ``columns``, each row in the middle.

    Args:
        sizes: (height, width) of every camera's own pictures.
        height, width: of the whole.
    """
    rows = [sizes[first : first + columns] for first in range(0, len(sizes), columns)]
    whole = max(sum(wide / tall for tall, wide in row) for row in rows)  # of the widest row, in heights
    found = []
    for number, row in enumerate(rows):
        top, below = round(height * number / len(rows)), round(height * (number + 1) / len(rows))
        edge = (whole - sum(wide / tall for tall, wide in row)) / 2
        for tall, wide in row:
            left, edge = round(width * edge / whole), edge + wide / tall
            found.append(Box(top, left, below - top, round(width * edge / whole) - left))
    return found


def described(recordings: Iterable[Recording]) -> str:
    """How cameras lie in the pictures, by the first recording that can be read; empty where they are apart."""
    for recording in recordings:
        if not isinstance(recording.footage, Views):
            return ""
        parts, columns = recording.footage.parts, recording.footage.columns
        names = [part.camera for part in parts]
        rows = [" | ".join(names[first : first + columns]) for first in range(0, len(names), columns)]
        try:
            sizes = [_size(part) for part in parts]
        except DecodeError:
            continue
        words = " / ".join(rows)
        if len(set(sizes)) > 1:
            each = ", ".join(f"{name} {wide}x{tall}" for name, (tall, wide) in zip(names, sizes, strict=True))
            words += f", scaled to one height ({each})"
        return words
    return ""


def probe(recording: Recording) -> Facts:
    """What a recording's pictures are; of several cameras, the picture of all at the lowest one's height.

    Raises:
        DecodeError: a camera's footage cannot be read.
    """
    if not isinstance(recording.footage, Views):
        return footage.probe(recording)
    parts, columns = recording.footage.parts, recording.footage.columns
    facts = [_probed(part) for part in parts]
    tall = min(fact.height for fact in facts)
    widths = [fact.width * tall / fact.height for fact in facts]
    rows = [sum(widths[first : first + columns]) for first in range(0, len(widths), columns)]
    lengths = [fact.seconds for fact in facts if fact.seconds is not None]
    fps = max(fact.fps for fact in facts)
    return Facts(fps, tall * len(rows), round(max(rows)), min(lengths) if lengths else None)


def frames_at(
    recording: Recording, fps: float, height: int, width: int, note: NoteOf = lambda name, text: None
) -> Iterator[Moment]:
    """As :func:`anyflow.data.importing.footage.frames_at`; several cameras each in its box.

    Raises:
        DecodeError: while iterating: as there, or a camera ends long before the others.
    """
    if not isinstance(recording.footage, Views):
        yield from footage.frames_at(recording, fps, height, width, partial(note, recording.name))
        return
    parts = recording.footage.parts
    places = boxes([_size(part) for part in parts], recording.footage.columns, height, width)
    for part, box in zip(parts, places, strict=True):
        if min(box.height, box.width) < SMALLEST:
            tiny = f"{box.width}x{box.height} of the {width}x{height} pixels"
            raise DecodeError(f"camera {part.camera} would have {tiny}: give a larger --size")
    streams = [_frames(part, fps, box, note) for part, box in zip(parts, places, strict=True)]
    for pictures, time, apart in synchronised([part.camera for part in parts], streams, fps):
        whole = np.zeros((height, width, 3), dtype=np.uint8)
        for picture, box in zip(pictures, places, strict=True):
            whole[box.top : box.top + box.height, box.left : box.left + box.width] = picture
        yield Moment(whole, time, apart)


def _frames(part: Recording, fps: float, box: Box, note: NoteOf) -> Iterator[Moment]:
    """A camera's pictures at the size of its box."""
    with _named(part):
        yield from footage.frames_at(part, fps, box.height, box.width, partial(note, part.name))


def synchronised(
    cameras: Sequence[str], streams: Sequence[Iterator[Moment]], fps: float
) -> Iterator[tuple[list[np.ndarray], float, bool]]:
    """The moments that all cameras saw: a picture a camera, their time, and whether what came before is apart.

    Pictures belong together if they are less than half a picture's time apart. Where a camera paused, what the others
    saw meanwhile is passed over.

    Raises:
        DecodeError: while iterating: a camera ends long before the others.
    """
    near, passed_over = 0.5 / fps, False
    heads = [next(stream, None) for stream in streams]
    while True:
        seen = [head for head in heads if head is not None]
        if len(seen) < len(heads):
            break
        latest = max(time for _, time, _ in seen)
        late = [place for place, (_, time, _) in enumerate(seen) if time < latest - near]
        if not late:
            yield [picture for picture, _, _ in seen], seen[0][1], passed_over or any(apart for _, _, apart in seen)
        passed_over = bool(late)
        for place in late or range(len(heads)):
            heads[place] = next(streams[place], None)
    ended = [camera for camera, head in zip(cameras, heads, strict=True) if head is None]
    most = math.ceil(LATE * fps)
    for stream, head in zip(streams, heads, strict=True):
        if head is not None and sum(1 for _ in islice(stream, most)) == most:
            raise DecodeError(f"camera {', '.join(ended)} ends more than {LATE:g} s before the others")


def _size(part: Recording) -> tuple[int, int]:
    facts = _probed(part)
    return facts.height, facts.width


def _probed(part: Recording) -> Facts:
    with _named(part):
        return footage.probe(part)


@contextmanager
def _named(part: Recording) -> Iterator[None]:
    """Errors name the camera, and stay of their kind."""
    try:
        yield
    except DecodeError as error:
        raise type(error)(f"camera {part.camera}: {error}") from error
