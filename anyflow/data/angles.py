"""Numbers of a control that are angles: where one goes round, it jumps by a whole turn from one entry to the next.

A robot's roll near 180 degrees is 3.14 at one frame and -3.14 at the next, and the arm has hardly moved. Told as a
number from -1 to 1 it would say the opposite. A card's ``period`` says which numbers go round; here they are found by
their jumps, for cards that do not say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from anyflow.data.controls import Array, Control

TURNS = (2 * np.pi, 360.0)
"""Whole turns, in radians and in degrees."""
FEWEST_VALUES = 5
"""A number with fewer is a switch."""


def jumped_turns(rows: Array) -> Array:
    """The whole turn that each number of a clip's entries ``[N, width]`` jumps by; 0: none, ``[width]``.

    An angle comes from one end of a turn to the other, near the place where it was, and moves little otherwise.
    """
    found = np.zeros(rows.shape[1])
    for number, values in enumerate(rows.T):
        values = values[~np.isnan(values)]
        if len(np.unique(values)) < FEWEST_VALUES:
            continue
        steps = np.abs(np.diff(values))
        for turn in TURNS:
            is_jump = steps > 7 / 8 * turn
            if is_jump.any() and _is_within(values, turn) and _is_smooth(steps, is_jump, turn):
                found[number] = turn
    return found


def found_angles(control: Control, jumped: Array | None, rows: Sequence[Array]) -> Control:
    """A control with the period of its angles, if its card does not say; numbers in the unit of one are angles too.

    Args:
        control: of the card. jumped: the turn that each number was seen to jump by. rows: entries of many clips.
    """
    if jumped is None or control.period or control.kind == "multi-hot" or control.skipped != "last":
        return control
    every = np.concatenate(rows)
    turns = [
        float(turn) * (turn > 0 and _is_within(values, turn)) for turn, values in zip(jumped, every.T, strict=True)
    ]
    of_unit = {unit: turn for unit, turn in zip(control.unit, turns, strict=False) if unit and turn}
    units = control.unit or ("",) * control.width
    period = [float(f"{turn or of_unit.get(unit, 0.0):.6g}") for turn, unit in zip(turns, units, strict=True)]
    return replace(control, period=tuple(period)) if any(period) else control


def _is_smooth(steps: Array, is_jump: Array, turn: float) -> bool:
    """Whether a number moves little, across a jump too: a command held at one end, then at the other, does not.

    Args:
        steps: from each value to the next. is_jump: which of them may go round. turn: the whole turn.
    """
    moves = steps[~is_jump & (steps > 0)]
    return bool(len(moves) and np.median(moves) < turn / 8 and turn - steps[is_jump].max() <= 2 * moves.max())


def _is_within(values: Array, turn: float) -> bool:
    """Whether values lie within a turn, rounding apart: round zero, or from zero up."""
    low, high, slack = float(np.nanmin(values)), float(np.nanmax(values)), 0.001 * turn
    start = -turn / 2 if low < -slack else 0.0
    return start - slack <= low and high <= start + turn + slack
