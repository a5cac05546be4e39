"""A table of controls from a file: a CSV, with or without a line of names, or an array."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.controls import Control
from anyflow.errors import UserError, first_line

LESS = "; a CSV may begin with a line of names, and leave out the controls of another domain"

Table = np.ndarray[Any, np.dtype[np.float64]]


def read_table(path: Path, controls: Mapping[str, Control]) -> tuple[Table, list[str]]:
    """Numbers of each row, float64 ``[rows, numbers]`` in the order of the controls, and what is to be said of them.

    Args:
        path: a CSV or a ``.npy``. Names may be cut at the front as long as one number alone is meant, and may leave
            out whole controls, which then are not known (NaN), as an empty cell is.
        controls: what a row may hold, by name.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    names = labels(controls)
    table, notes = _read_csv(path, controls) if path.suffix.lower() == ".csv" else (_read_npy(path), [])
    if table.ndim != 2 or table.shape[1] != len(names) or not len(table):
        shape = " x ".join(map(str, table.shape)) if table.size else "empty"
        wanted = f"{len(names)} numbers: {', '.join(names)}{LESS if len(controls) > 1 else ''}"
        raise UserError(f"--controls {path} is {shape}: give a row for each frame, with {wanted}")
    return table, notes


def labels(controls: Mapping[str, Control]) -> list[str]:
    """What each number is called: ``actions.speed``, or the control's name where it has one number without a name."""
    return [label for name, control in controls.items() for label in _labels(name, control)]


def _labels(name: str, control: Control) -> list[str]:
    alone = control.width == 1 and not control.numbers
    return [name if alone else f"{name}.{control.called(number)}" for number in range(control.width)]


def _read_csv(path: Path, controls: Mapping[str, Control]) -> tuple[Table, list[str]]:
    names = labels(controls)
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
    places = _places(path, header, names) if is_named else list(range(len(names)))
    given = {names[place] for place in places}
    absent = [name for name, own in controls.items() if not given & {*_labels(name, own)}]
    wanted = [label for name, own in controls.items() if name not in absent for label in _labels(name, own)]
    if len(wanted) != len(places):
        raise UserError(f"--controls {path}: its columns are {', '.join(header)}: give {', '.join(wanted)}")
    table = np.full((len(rows) - is_named, len(names)), np.nan)
    for number, row in enumerate(rows[is_named:]):
        found = [_number(cell) for cell in row]
        if len(found) != len(places) or None in found:
            columns = ", ".join(header if is_named else names)
            what = f"{path}:{number + 1 + is_named} is {','.join(row)!r}"
            less = LESS if len(controls) > 1 and not is_named else ""
            raise UserError(f"--controls {what}: give {len(places)} numbers: {columns}{less}")
        table[number, places] = found
    return table, [f"--controls {path} does not give {' and '.join(absent)}: not known"] if absent else []


def _places(path: Path, header: Sequence[str], names: Sequence[str]) -> list[int]:
    """The number that each column of a CSV holds, by its name or by the end of it that no other has."""
    found = []
    for column in header:
        ending = [name for name in names if name.endswith(f".{column}")]
        fitting = [column] if column in names else ending
        if len(fitting) > 1:
            raise UserError(f"--controls {path}: its column {column} may be {' or '.join(fitting)}: write one of them")
        if not fitting or names.index(fitting[0]) in found:
            raise UserError(f"--controls {path}: its columns are {', '.join(header)}: give {', '.join(names)}")
        found.append(names.index(fitting[0]))
    return found


def _number(cell: str) -> float | None:
    """A cell's number, NaN if it is empty, None if it is something else."""
    try:
        return float(cell) if cell.strip() else float("nan")
    except ValueError:
        return None


def _read_npy(path: Path) -> Table:
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--controls {path} cannot be read: {first_line(error)}") from error
    if not isinstance(table, np.ndarray) or table.dtype.kind not in "biuf":
        raise UserError(f"--controls {path} is no array of numbers: save one by numpy.save")
    return np.asarray(table, dtype=np.float64)
