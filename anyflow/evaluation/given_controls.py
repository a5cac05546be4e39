"""Controls that a user gives: a table with a row for each frame of the clip, in the units of the data set's card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyflow.backbone.control_embedding import periods_of
from anyflow.backbone.controls import LIMIT, ControlSettings
from anyflow.data.controls import control_values
from anyflow.data.faults import DecodeError
from anyflow.data.wanted import described
from anyflow.errors import UserError
from anyflow.evaluation.control_table import labels, read_table


def given_controls(path: Path, settings: ControlSettings | None, frames: int) -> tuple[Tensor, list[str]]:
    """Numbers of every frame, float32 ``[1, F, W]``, and what is to be said of them.

    Args:
        path: a table (:func:`anyflow.evaluation.control_table.read_table`). As in the clips of a data set, row i of
            an action says what leads from frame i to the next.
        settings: what the model is told of each frame.
        frames: of the clip.

    Raises:
        UserError: the model is told nothing, or the file cannot be read or is of another size.
    """
    if settings is None:
        raise UserError("--controls: this model is told none; train one with model.control.names")
    wanted = {name: described(facts) for name, facts in settings.controls.items()}
    table, notes = read_table(path, wanted)
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
    return torch.from_numpy(values)[None], notes + far_outside(values, settings, labels(wanted))


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
