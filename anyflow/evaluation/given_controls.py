"""Controls that a user gives: a table with a row for each frame of the clip, in the units of the data set's card."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyflow.backbone.control_embedding import periods_of
from anyflow.backbone.controls import LIMIT, ControlSettings
from anyflow.data.controls import Control, control_values
from anyflow.data.faults import DecodeError
from anyflow.data.wanted import described
from anyflow.errors import UserError, first_line


def given_controls(path: Path, settings: ControlSettings | None, frames: int) -> tuple[Tensor, list[str]]:
    """Numbers of every frame, float32 ``[1, F, W]``, and what is to be said of them.

    Args:
        path: a CSV, with or without a line of names, or an array ``[F, W]``. An empty cell or NaN is not known. As in
            the clips of a data set, row i of an action says what leads from frame i to the next.
        settings: what the model is told of each frame.
        frames: of the clip.

    Raises:
        UserError: the model is told nothing, or the file cannot be read or is of another size.
    """
    if settings is None:
        raise UserError("--controls: this model is told none; train one with model.control.names")
    wanted = {name: described(facts) for name, facts in settings.controls.items()}
    names = labels(wanted)
    table = _read_csv(path, names) if path.suffix.lower() == ".csv" else _read_npy(path)
    if table.ndim != 2 or table.shape[1] != len(names):
        shape, wanted_row = " x ".join(map(str, table.shape)), f"{len(names)} numbers: {', '.join(names)}"
        raise UserError(f"--controls {path} is {shape}: give a row for each frame, with {wanted_row}")
    notes = []
    if len(table) > frames:
        notes.append(f"--controls has {len(table)} rows, the clip {frames} frames: the rest is left out")
    columns, start = {}, 0
    for name, control in wanted.items():
        own = table[:frames, start : start + control.width]
        columns[name] = [[None if np.isnan(number) else float(number) for number in row] for row in own]
        start += control.width
    try:
        values = control_values(columns, wanted, range(frames), frames)
    except DecodeError as error:
        raise UserError(f"--controls {path}: {error}: give a row for each of the {frames} frames") from error
    return torch.from_numpy(values)[None], notes + far_outside(values, settings, names)


def labels(controls: dict[str, Control]) -> list[str]:
    """What each number is called: ``actions.speed``, or the control's name where it has one number without a name."""
    return [
        name if control.width == 1 and not control.numbers else f"{name}.{control.called(number)}"
        for name, control in controls.items()
        for number in range(control.width)
    ]


def far_outside(values: np.ndarray[Any, Any], settings: ControlSettings, names: Sequence[str]) -> list[str]:
    """A sentence for each number that is so far outside its range in the training data that it is cut off."""
    notes = []
    periods = periods_of(settings.controls)
    for name, column, low, high, turn in zip(names, values.T, *settings.ranges(), periods, strict=True):
        if turn:
            continue
        known = column[~np.isnan(column)]
        reach = (LIMIT - 1) / 2 * ((high - low) or 2.0)
        strange = known[(known < low - reach) | (known > high + reach)]
        if len(strange):
            notes.append(
                f"{name}={strange[np.abs(strange - (low + high) / 2).argmax()]:g} is far outside {low:g} to {high:g}, "
                f"where the model learnt it: {len(strange)} of {len(known)} values are cut off"
            )
    return notes


def _read_csv(path: Path, names: Sequence[str]) -> np.ndarray[Any, Any]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        comma = max(",;\t", key=text.partition("\n")[0].count)
        lines = io.StringIO(text, newline="")
        rows = [row for row in csv.reader(lines, delimiter=comma) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--controls {path} cannot be read: {first_line(error)}") from error
    header = [cell.strip() for cell in rows[0]] if rows else []
    is_named = any(_number(cell) is None for cell in header)
    short = [name.rpartition(".")[2] for name in names]
    if sorted(header) == sorted(short) != sorted(names) and len(set(short)) == len(short):
        names = short
    if is_named and sorted(header) != sorted(names):
        raise UserError(f"--controls {path}: its columns are {', '.join(header)}: give {', '.join(names)}")
    order = [header.index(name) for name in names] if is_named else range(len(names))
    table = []
    for number, row in enumerate(rows[is_named:], start=1 + is_named):
        found = [_number(cell) for cell in row]
        if len(found) != len(names) or None in found:
            raise UserError(
                f"--controls {path}:{number} is {','.join(row)!r}: give {len(names)} numbers: {', '.join(names)}"
            )
        table.append([found[place] for place in order])
    return np.array(table, dtype=np.float64)


def _number(cell: str) -> float | None:
    """A cell's number, NaN if it is empty, None if it is something else."""
    try:
        return float(cell) if cell.strip() else float("nan")
    except ValueError:
        return None


def _read_npy(path: Path) -> np.ndarray[Any, Any]:
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--controls {path} cannot be read: {first_line(error)}") from error
    if not isinstance(table, np.ndarray) or table.dtype.kind not in "biuf":
        raise UserError(f"--controls {path} is no array of numbers: save one by numpy.save")
    return np.asarray(table, dtype=np.float64)
