"""What the controls of a split hold, by its clips: widths and ranges for a card.

A bounded number of clips is read, chosen by their keys alone: the same ones in whatever order the clips were made.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from anyflow.data import remote
from anyflow.data.angles import found_angles, jumped_turns
from anyflow.data.card import DatasetCard
from anyflow.data.controls import Array, Control, fitting_rows, flattened
from anyflow.data.decode import DecodeError
from anyflow.data.reader import ShardReader
from anyflow.data.shards import Sample
from anyflow.data.tar_index import ready

MOST_CLIPS, MOST_ROWS = 2000, 64
"""Clips that are read of a split, and entries of each of them."""
QUANTILES = (0.01, 0.99)

Told = Mapping[str, Control | str]


@dataclass
class Seen:
    """What clips have of one control.

    Attributes:
        rows: numbers a frame -> entries, [N, width] of each clip.
        turns: numbers a frame -> the whole turn that each number was seen to jump by, 0 for none.
        names: of the numbers, where entries are mappings.
        clips: that have it. misfits: those of them that do not fit to the card, or hold no numbers.
        reason: of the first misfit.
    """

    rows: dict[int, list[Array]] = field(default_factory=dict)
    turns: dict[int, Array] = field(default_factory=dict)
    names: set[tuple[str, ...]] = field(default_factory=set)
    clips: int = 0
    misfits: int = 0
    reason: str = ""

    def add(self, name: str, told: Control | str | None, values: Any, frames: int) -> None:
        """One clip's entries; ``frames`` are the clip's, 0 if they are not known."""
        self.clips += 1
        try:
            if isinstance(told, Control):
                rows: Array | None = fitting_rows(name, told, values, frames)
            else:
                rows = flattened(name, values)
        except DecodeError as error:
            self.misfits, self.reason = self.misfits + 1, self.reason or str(error)
            return
        if rows is not None:
            some = np.unique(np.linspace(0, len(rows) - 1, MOST_ROWS).round().astype(int))
            self.rows.setdefault(rows.shape[1], []).append(rows[some])
            self.turns[rows.shape[1]] = np.maximum(self.turns.get(rows.shape[1], 0.0), jumped_turns(rows))
            entry = next(filter(None, values), None)
            self.names.add(tuple(sorted(entry)) if isinstance(entry, Mapping) else ())


def survey_controls(card: DatasetCard, split: str, told: Told) -> tuple[dict[str, Seen], int]:
    """What the clips of a split have of every control, and how many clips were read."""
    folder = card.splits[split]
    ready(folder)
    reader = ShardReader([folder], [card.stand_in or ""], tolerant=True)
    seen: dict[str, Seen] = {}
    read = 0
    for shard, sample in _some(reader):
        try:
            controls = reader.describe(shard, sample).get("controls")
        except DecodeError:
            continue  # `anyflow data check` names it
        read += 1
        for name, values in controls.items() if isinstance(controls, dict) else ():
            if values is not None:
                seen.setdefault(name, Seen()).add(name, told.get(name), values, sample.frames(card.frames))
    return seen, read


def _some(reader: ShardReader) -> Iterator[tuple[int, Sample]]:
    """At most ``MOST_CLIPS`` samples, spread by their keys; the first ones where each is a request."""
    places: Iterator[tuple[int, int]] = (
        (n, place) for n, (_, shard) in enumerate(reader.shards) for place in range(len(shard.samples))
    )
    if any(remote.url_of(path.parent) is not None for path, _ in reader.shards):
        places = islice(places, MOST_CLIPS)
    elif sum(len(shard.samples) for _, shard in reader.shards) > MOST_CLIPS:
        places = iter(sorted(heapq.nsmallest(MOST_CLIPS, places, key=lambda place: _drawn(reader.sample(*place).key))))
    for shard, place in places:
        yield shard, reader.sample(shard, place)


def _drawn(key: str) -> bytes:
    return hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()


def measured_controls(card: DatasetCard, split: str = "train") -> tuple[dict[str, Control | str], list[str]]:
    """A card's controls with the ranges that its clips have, and what is to be told: what was guessed, what misfits.

    A control that the card tells in words alone, or not at all, gets what its entries show. It stays in words where
    clips differ in their width.
    """
    seen, read = survey_controls(card, split, card.controls)
    found: dict[str, Control | str] = {}
    notes: list[str] = []
    for name in dict.fromkeys([*card.controls, *sorted(seen)]):
        told = card.controls.get(name, "one entry a frame")
        of = seen.get(name)
        if of is None:
            found[name] = told
            notes.append(f"control {name!r}: none of {read} clips has it")
            continue
        control = told if isinstance(told, Control) else _guessed(name, told, of)
        if control is None:
            found[name] = told
            widths = f"clips have {min(of.rows)} to {max(of.rows)} numbers a frame" if of.rows else "no numbers"
            notes.append(f"control {name!r} stays in words: {of.reason or widths}")
            continue
        if control is not told:
            notes.append(
                f"control {name!r} was guessed from its entries, correct the card if it is wrong: {control.told()}"
            )
        if of.misfits:
            notes.append(f"control {name!r}: {of.misfits} of {of.clips} clips do not fit ({of.reason})")
        found[name] = ranged = _ranged(control, of.rows.get(control.width, []))
        angle = found_angles(ranged, of.turns.get(control.width), of.rows.get(control.width, []))
        if angle.period != control.period:
            found[name] = angle
            numbers = ", ".join(angle.called(place) for place, turn in enumerate(angle.period) if turn)
            notes.append(
                f"control {name!r} jumps by a whole turn ({max(angle.period):g}) from one entry to the next, so these "
                f"numbers were taken for angles: {numbers} (of one that is none, write 0 into the card's period)"
            )
    return found, notes


def _guessed(name: str, holds: str, seen: Seen) -> Control | None:
    """A control by its entries alone; None if clips differ."""
    if len(seen.rows) != 1 or seen.misfits:
        return None
    width, rows = next(iter(seen.rows.items()))
    names = next(iter(seen.names)) if len(seen.names) == 1 else ()
    is_multi_hot = width > 1 and all(np.isin(some, (0, 1)).all() for some in rows)
    return Control(
        holds,
        width,
        "multi-hot" if is_multi_hot else "continuous",
        numbers=names if len(names) == width else (),
        at="transition" if name.startswith("action") else "frame",
    )


def _ranged(control: Control, rows: list[Array]) -> Control:
    """A control with the quantiles of its entries; without a range where a number is never known."""
    if control.kind == "multi-hot":
        return replace(control, low=(0.0,) * control.width, high=(1.0,) * control.width)
    every = np.concatenate(rows) if rows else np.full((1, control.width), np.nan)
    if np.isnan(every).all(axis=0).any():
        return replace(control, low=(), high=())
    low, high = (tuple(float(f"{number:.6g}") + 0.0 for number in q) for q in np.nanquantile(every, QUANTILES, axis=0))
    return replace(control, low=low, high=high)
