"""Few-step ability in one number: what a model loses when it takes few steps, and what fine-tuning made of that.

The loss of a figure is written so that 1 is no loss and more is worse, whatever its kind::

    distances (lower is better)   few-step ratio = d(few) / d(many)
    shares (higher is better)     few-step ratio = a(many) / a(few)

    retention = ratio before fine-tuning / ratio after:  1 is kept, below 1 is lost, above 1 is gained

A ratio of distances and not of what lies above the floor: near the floor that is a quotient of noise. A ratio says
nothing of how good a model is at all, so it stands beside the curve and never in its place. The seeds of both curves
are the same noise, so the ratio is taken seed by seed; the mean and its interval (Student's t) are those of the
logarithms, in which half and twice are equally far from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from anyflow.evaluation.curve import Curve, CurveRow
from anyflow.evaluation.statistics import Estimate, badness_ratio, estimate

FEW, MANY = 4, 32

DISTANCES = ("sliced_w1", "frame_frechet", "path_error")
"""Figures of which less is better, and that cannot be 0 or below but by a miracle (kernel distances can)."""

SHARES = ("motion_accuracy",)
"""Figures of which more is better."""


def few_step_ratio(curve: Curve, name: str, few: int = FEW, many: int = MANY) -> Estimate | None:
    """The few-step ratio of a figure; None where a step count or the figure is missing, or it is 0 where it divides.

    Raises:
        KeyError: the figure is of a kind that has no ratio.
    """
    logs = _log_ratios(curve, name, few, many)
    return None if logs is None else estimate([logs]).map(math.exp)


def retention(before: Curve, after: Curve, name: str, few: int = FEW, many: int = MANY) -> Estimate | None:
    """The few-step ratio before over the one after, seed by seed; None where either has none.

    Raises:
        KeyError: the figure is of a kind that has no ratio.
        ValueError: the curves are of different seeds.
    """
    if before.all_seeds != after.all_seeds:
        raise ValueError(f"the curves have seeds {before.all_seeds} and {after.all_seeds}; measure both alike")
    first, second = (_log_ratios(curve, name, few, many) for curve in (before, after))
    if first is None or second is None:
        return None
    return estimate([[earlier - later for earlier, later in zip(first, second, strict=True)]]).map(math.exp)


def _log_ratios(curve: Curve, name: str, few: int, many: int) -> list[float] | None:
    if name not in (*DISTANCES, *SHARES):
        raise KeyError(f"{name} has no few-step ratio: it is neither a distance nor a share")
    rows = {row.num_steps: row for row in curve.rows}
    if few not in rows or many not in rows:
        return None
    few_values, many_values = (_values(rows[count], name) for count in (few, many))
    if not few_values or len(few_values) != len(many_values) or min(*few_values, *many_values) <= 0:
        return None
    better = "lower" if name in DISTANCES else "higher"
    return [math.log(badness_ratio(one, other, better)) for one, other in zip(few_values, many_values, strict=True)]


def _values(row: CurveRow, name: str) -> Sequence[float]:
    value = row.figure(name)
    return row.each.get(name, []) if row.each else [] if value is None else [value]
