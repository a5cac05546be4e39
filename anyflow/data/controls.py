"""Controls: what was done or measured at a clip's frames, as numbers that a network can be conditioned on.

A clip's metadata has ``controls``: name -> a list with one entry a frame. A card says what the entries hold
(:class:`Control`); :func:`control_values` brings them to the frames that were chosen of a clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from anyflow.data.faults import DecodeError

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Control:
    """One control of a data set.

    Attributes:
        holds: what it holds, in words for people.
        width: numbers a frame.
        kind: "continuous", or "multi-hot": each number is 0 or 1, such as a key held.
        unit: of each number; empty if it is not known.
        numbers: the names of the numbers; empty if they have none. They are the keys of entries that are mappings.
        at: "frame": a state that belongs to frame i; "transition": an action that leads from frame i to frame i + 1.
        skipped: what a step over several frames gets of their actions: "last", "mean" (of a speed) or "sum" (of a
            displacement). A multi-hot number is 1 if any of them is.
        period: of each number that is an angle and goes round, a whole turn in its unit; 0 of any other; empty: none
            does.
        low, high: of each number, the quantiles of 1 % and 99 % over the training split (0 and 1 of a multi-hot
            number); empty if they are not known.

    Raises:
        ValueError: they contradict each other; the words begin with the field's name.
    """

    holds: str
    width: int
    kind: Literal["continuous", "multi-hot"] = "continuous"
    unit: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    at: Literal["frame", "transition"] = "frame"
    skipped: Literal["last", "mean", "sum"] = "last"
    period: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width} must be more than 0")
        for name in ("unit", "numbers", "period", "low", "high"):
            count = len(getattr(self, name))
            if count not in (0, self.width):
                raise ValueError(
                    f"{name} has {count} values where width={self.width}: give one for each number, or none"
                )
        if len(set(self.numbers)) < len(self.numbers):
            raise ValueError(f"numbers={list(self.numbers)} names one twice: give each a name of its own")
        if bool(self.low) != bool(self.high):
            raise ValueError(f"{'high' if self.low else 'low'} is missing: give low and high, or neither")
        for place, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if not -LARGEST <= low <= high <= LARGEST:
                raise ValueError(
                    f"low[{place}]={low:g} and high[{place}]={high:g}: give finite ones, low not above high"
                )
        if not all(0 <= turn <= LARGEST for turn in self.period):
            raise ValueError(
                f"period={list(self.period)}: give the length of a whole turn, 0 of what does not go round"
            )
        if any(self.period) and (self.kind == "multi-hot" or self.skipped != "last"):
            what = f"skipped={self.skipped}" if self.kind == "continuous" else "kind=multi-hot"
            raise ValueError(f"period={list(self.period)} with {what}: what goes round is continuous, skipped 'last'")
        if self.kind == "multi-hot" and self.skipped != "last":
            raise ValueError(
                f"skipped={self.skipped}: a multi-hot control takes 'last' alone, and is 1 if any frame is"
            )

    def to_dict(self) -> dict[str, Any]:
        """Its fields in their order, without those at their defaults: as a card has them."""
        usual = {item.name: item.default for item in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    def told(self) -> str:
        """Its facts in words, without the range."""
        count = f"{self.width} number{'s' if self.width > 1 else ''}"
        if self.at == "frame":
            return f"{count}, {self.kind}, of each frame"
        over = "any" if self.kind == "multi-hot" else self.skipped
        return f"{count}, {self.kind}, from each frame to the next ({over} of those that are skipped)"

    def called(self, number: int) -> str:
        """The name of one of its numbers, or its place."""
        return self.numbers[number] if self.numbers else str(number)


def control_values(
    controls: Any, wanted: Mapping[str, Control], chosen: Sequence[int] | Array, frames: int = 0
) -> Array:
    """The wanted controls at the chosen frames of a clip.

    Args:
        controls: the clip's, name -> a list with one entry a frame; None if it has none.
        wanted: those to give, in the order of their columns.
        chosen: numbers of the clip's frames, ascending; a frame may stand there again.
        frames: how many frames the clip has before the choice; 0 if it is not known.

    Returns:
        float32 [F, sum of widths]; NaN where a clip lacks a control, or an entry or a number of it is null. A state
        stands at its frame. An action stands at the frame that it leads to, so that the first chosen one has NaN.

    Raises:
        DecodeError: a control has another width or length than said, or holds something else than numbers.
    """
    if controls is not None and not isinstance(controls, Mapping):
        raise DecodeError("its controls are malformed")
    places = np.asarray(chosen, dtype=np.int64)
    columns = [np.empty((len(places), 0), dtype=np.float32)]
    for name, control in wanted.items():
        values = (controls or {}).get(name)
        if values is None:
            columns.append(np.full((len(places), control.width), np.nan, dtype=np.float32))
            continue
        rows = control_rows(name, control, values)
        check_length(name, control, len(rows), frames or int(places.max(initial=-1)) + 1, exact=bool(frames))
        found = rows[places] if control.at == "frame" else led_to(rows, control, places)
        columns.append(found.astype(np.float32))
    return np.concatenate(columns, axis=1)


def with_domain(domain: str, controls: Mapping[str, Any]) -> dict[str, Any]:
    """Controls by both of their names, ``actions`` and ``games.actions``: those of several domains are told apart."""
    return {**controls, **({f"{domain}.{name}": told for name, told in controls.items()} if domain else {})}


def check_length(name: str, control: Control, entries: int, frames: int, exact: bool = True) -> None:
    """Compare a control's entries with a clip's frames; actions may lack the one that leads out of the clip.

    Raises:
        DecodeError: there are fewer, or (``exact``) more.
    """
    least = frames - (control.at == "transition")
    if entries < least or (exact and entries > frames):
        raise DecodeError(f"its {name} have {entries} entries, the clip {frames} frames")


def led_to(rows: Array, control: Control, places: Array) -> Array:
    """What led to each chosen frame from the one chosen before, float64 [F, W]; NaN for the first.

    Args:
        rows: all entries, [N, W].
        places: the chosen frames, ascending; one that stands there again is the same picture.
    """
    found = np.full((len(places), control.width), np.nan)
    for place, (begin, end) in enumerate(pairwise(places), start=1):
        if end == begin and control.skipped == "sum":
            found[place] = 0.0  # the picture stands still
            continue
        part = rows[begin : max(end, begin + 1)]  # of a frame that stands there again: what is being done meanwhile
        if not len(part):
            continue  # nothing leads out of the clip
        if control.kind == "multi-hot":
            found[place] = part.max(axis=0)
        elif control.skipped == "last":
            found[place] = np.where(np.isnan(part).any(axis=0), np.nan, part[-1])
        else:
            found[place] = part.sum(axis=0) if control.skipped == "sum" else part.mean(axis=0)
    return found


def control_rows(name: str, control: Control, values: Any) -> Array:
    """All entries of a clip's control, float64 [N, width]; NaN for what is null.

    Raises:
        DecodeError: an entry has another width than said, or holds something else than numbers.
    """
    rows = flattened(name, values, control.numbers)
    if rows is None:
        return np.full((len(values), control.width), np.nan)
    if rows.shape[1] != control.width:
        raise DecodeError(
            f"its {name} have {rows.shape[1]} numbers a frame, not the {control.width} that the card says"
        )
    return rows


def fitting_rows(name: str, control: Control, values: Any, frames: int) -> Array:
    """:func:`control_rows` of a clip whose control is all that its card says.

    Args:
        frames: of the clip; 0 if it is not known.

    Raises:
        DecodeError: it has another width or length, no entries, or (multi-hot) other numbers than 0 and 1.
    """
    rows = control_rows(name, control, values)
    check_length(name, control, len(rows), frames, exact=frames > 0)
    if not len(rows):
        raise DecodeError(f"its {name} have no entries")
    if control.kind == "multi-hot" and not np.isin(rows[~np.isnan(rows)], (0, 1)).all():
        raise DecodeError(f"its {name} hold other numbers than 0 and 1, which the card calls multi-hot")
    return rows


def flattened(name: str, values: Any, numbers: Sequence[str] = ()) -> Array | None:
    """A control's entries as rows of numbers, float64 [N, W]; None if all of them are null.

    Args:
        name: said of it where it is wrong.
        values: a list with one entry a frame: a number, lists of them, or a mapping of names to them.
        numbers: the names, in order; else those of a mapping are taken in their alphabet's order.

    Raises:
        DecodeError: it is no list, its rows have several lengths, or something in it is no number.
    """
    if not isinstance(values, list | tuple | np.ndarray):
        raise DecodeError(f"its {name} are no list with one entry a frame")
    try:
        table = np.asarray(values)
    except (ValueError, OverflowError):
        table = np.empty(0, dtype=object)
    if table.dtype.kind in "biuf" and table.size:
        rows = table.reshape(len(table), -1).astype(np.float64)
    else:
        try:
            listed = [None if entry is None else list(_numbers(name, entry, numbers)) for entry in values]
        except RecursionError as error:
            raise DecodeError(f"its {name} are nested too deeply") from error
        widths = {len(row) for row in listed if row is not None}
        if not widths:
            return None
        if len(widths) > 1:
            raise DecodeError(f"its {name} have {min(widths)} to {max(widths)} numbers a frame")
        if 0 in widths:
            raise DecodeError(f"its {name} hold no numbers")
        missing = [np.nan] * widths.pop()
        rows = np.array([missing if row is None else row for row in listed], dtype=np.float64)
    if (np.abs(rows) > LARGEST).any():
        raise DecodeError(f"its {name} hold a number that is not finite, or too large")
    return rows


def _numbers(name: str, entry: Any, numbers: Sequence[str]) -> Iterator[float]:
    """The numbers of an entry, in order."""
    if isinstance(entry, Mapping):
        further = sorted(map(str, set(entry) - set(numbers))) if numbers else ()
        if further:
            raise DecodeError(f"its {name} hold {further[0]!r} as well, which the card does not name")
        entry = [entry.get(key) for key in numbers or sorted(entry)]
    if isinstance(entry, list | tuple | np.ndarray):
        for item in entry:
            yield from _numbers(name, item, ())
    elif entry is None:
        yield np.nan
    elif isinstance(entry, int | float | np.number):
        try:
            yield float(entry)
        except OverflowError:
            yield np.inf
    else:
        raise DecodeError(f"its {name} hold {str(entry)[:40]!r}, which is no number")
