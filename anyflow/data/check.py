"""Reading a whole data set before anybody trains on it: every shard, every description, every frame."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data import remote
from anyflow.data.card import DatasetCard, check_shards, load_card
from anyflow.data.controls import Control, fitting_rows
from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.reader import ShardReader
from anyflow.data.shapes import note_file
from anyflow.data.shards import Sample, load_index
from anyflow.errors import UserError
from anyflow.system.console import OnProgress
from anyflow.system.pool import batches, run_jobs

CLIPS_PER_JOB = 50
FAR = 10
"""Widths of a card's range by which a value may lie beyond it: the range is that of 98 % of the values."""


def check_card(
    card: str | Path, *, decode: bool = True, workers: int = 0, on_progress: OnProgress | None = None
) -> list[str]:
    """Verify the shards against their index, and every clip against the card.

    Args:
        card: name or path.
        decode: decode every frame as well, which finds what no hash can: clips that were bad before they were written.
        workers: processes that decode; 0 decodes in this one.
        on_progress: called with (clips done, clips in all, split).

    Returns:
        One sentence a problem, all of them; an empty list if all is well.
    """
    loaded = load_card(card, require_shards=False)
    problems = check_shards(loaded)
    for split, folder in loaded.splits.items():
        try:
            count = load_index(folder).count
        except UserError:
            continue  # reported already
        job = partial(_check_clips, str(card), split, decode)
        runs = batches(count, CLIPS_PER_JOB)
        for run, found in zip(
            runs, run_jobs(job, runs, workers) if len(runs) > workers > 0 else map(job, runs), strict=True
        ):
            problems += found
            if on_progress is not None:
                on_progress(run.stop, count, split)
    return problems


def _check_clips(card: str, split: str, decode: bool, numbers: range) -> list[str]:
    """The problems of some of a split's clips, given by number."""
    loaded = load_card(card, require_shards=False)
    reader = ShardReader([loaded.splits[split]], [loaded.stand_in], tolerant=True)
    places = [(number, sample) for number, (_, shard) in enumerate(reader.shards) for sample in shard.samples]
    problems = []
    for number in numbers:
        shard, sample = places[number]
        path = reader.shards[shard][0]
        if remote.url_of(path.parent) is None and not path.is_file():
            continue  # told once, of the shard
        for reason in _reasons(reader, shard, sample, loaded, decode):
            problems.append(f"{split}: clip {sample.key[:200]!r} in {reader.shards[shard][1].name!r}: {reason}")
    return problems


def shape_of(card: DatasetCard, video: bytes) -> ClipShape:
    """All of a clip: as its card says of every clip, else as the video itself says.

    Raises:
        DecodeError: neither does.
    """
    if card.frames and card.height and card.width:
        return ClipShape(card.frames, card.height, card.width)
    noted = note_file(io.BytesIO(video))
    if not noted:
        raise DecodeError("the video cannot be read, or does not say how long it is")
    frames, height, width = (int(side) for side in noted[:3])
    return ClipShape(frames, height, width)


def _reasons(reader: ShardReader, shard: int, sample: Sample, card: DatasetCard, decode: bool) -> Iterator[str]:
    """Why a clip does not hold what its card says."""
    try:
        description = reader.describe(shard, sample)
        fps, controls = description.get("fps"), description.get("controls") or {}
        if card.fps and (not isinstance(fps, int | float) or abs(fps - card.fps) > 1e-3 * card.fps):
            yield f"its rate is {fps!r}, the card says {card.fps:g}"
        frames = sample.frames(card.frames)
        yield from _misfits(card.controls, controls if isinstance(controls, dict) else {}, frames)
    except DecodeError as error:
        yield str(error)
    if decode and ("mp4" in sample.parts or reader.shards[shard][1].place):
        try:
            video = reader.video(shard, sample)
            decode_clip(video, shape_of(card, video))
        except DecodeError as error:
            yield str(error)


def _misfits(told: Mapping[str, Control | str], controls: Mapping[str, Any], frames: int) -> Iterator[str]:
    """Why a clip's controls do not fit to its frames, or to what the card tells of them."""
    for name, values in controls.items():
        control = told.get(name)
        if not isinstance(control, Control):
            if isinstance(values, list) and len(values) < frames:
                yield f"its {name} have {len(values)} values, fewer than its {frames} frames"
        elif values is not None:
            try:
                rows = fitting_rows(name, control, values, frames)
            except DecodeError as error:
                yield str(error)
            else:
                yield from _far(name, control, rows)


def _far(name: str, control: Control, rows: np.ndarray) -> Iterator[str]:
    """Which numbers of a control lie far beyond the card's range."""
    for number, (low, high) in enumerate(zip(control.low, control.high, strict=True)):
        column = rows[:, number]
        if control.period and control.period[number]:
            continue
        far = column[np.maximum(low - column, column - high) > FAR * (high - low)] if high > low else column[:0]
        if len(far):
            yield (
                f"its {name} lie far outside of the card's range in {len(far)} of {len(rows)} entries: "
                f"{control.called(number)} is {far[0]:g}, the range {low:g} to {high:g}"
            )
