"""Few-step ability in one number: what a model loses when it takes few steps, and what fine-tuning made of that.

The loss of a figure is written so that 1 is no loss and more is worse, whatever its kind::

    distances (lower is better)   few-step ratio = d(few) / d(many)
    shares (higher is better)     few-step ratio = a(many) / a(few)

    retention = ratio before fine-tuning / ratio after:  1 is kept, below 1 is lost, above 1 is gained

Few is 4, many the most steps that were sampled. A ratio of distances and not of what lies above the floor: near the
floor that is a quotient of noise. A ratio says nothing of how good a model is at all, so it stands beside the curve and
never in its place. The seeds of both curves are the same noise, so the ratio is taken seed by seed; the mean and its
interval (Student's t) are those of the logarithms, in which half and twice are equally far from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import sub

from anyflow.evaluation.curve import Curve, CurveRow
from anyflow.evaluation.figures import Figure, figure_of
from anyflow.evaluation.statistics import Estimate, log_badness, ratio_of, shared

FEW = 4

Logs = Mapping[str, Mapping[int, float]]
"""Logarithms of ratios by data set and seed of the noise."""


def mean_ratio(logs: Logs) -> Estimate | None:
    """The ratio over all data sets and seeds; None where there is none."""
    return ratio_of([list(values.values()) for values in logs.values()])


def ratio_before_over_after(before: Logs, after: Logs) -> Logs:
    """What is left of the few-step ability, seed by seed, of the seeds that both have."""
    return {card: shared(logs, after[card], sub) for card, logs in before.items()}


def few_step_ratio(curve: Curve, name: str) -> Estimate | None:
    """The few-step ratio of a figure; None where a step count or the figure is missing, or it is 0 where it divides.

    Raises:
        KeyError: the figure is of a kind that has no ratio.
    """
    return mean_ratio({curve.domain: _log_ratios(curve, name)})


def retention(before: Curve, after: Curve, name: str) -> Estimate | None:
    """The few-step ratio before over the one after, seed by seed; None as for the ratio, or without a shared seed.

    Raises:
        KeyError: the figure is of a kind that has no ratio.
    """
    was, now = ({after.domain: _log_ratios(curve, name)} for curve in (before, after))
    return mean_ratio(ratio_before_over_after(was, now))


def change(before: Curve, after: Curve, name: str, num_steps: int) -> Estimate | None:
    """How many times as bad the later model is at a step count, seed by seed on the same prompts and noise.

    None where a figure is missing or 0, or no seed is shared.

    Raises:
        KeyError: the figure is of a kind that has no ratio; or the step count was not measured.
    """
    better = _comparable(name).better
    was, now = (_values(curve, curve.row(num_steps), name) for curve in (before, after))
    logs = shared(now, was, lambda one, other: log_badness(one, other, better))
    return mean_ratio({after.domain: logs})


def _comparable(name: str) -> Figure:
    figure = figure_of(name)
    if figure is None or not figure.compares:
        raise KeyError(f"{name} has no few-step ratio: it can be 0, or has no better side")
    return figure


def _log_ratios(curve: Curve, name: str) -> dict[int, float]:
    """By seed of the noise; empty where there is none."""
    better = _comparable(name).better
    rows = {row.num_steps: row for row in curve.rows}
    most = max(rows)
    if FEW not in rows or most == FEW:
        return {}
    few_values, many_values = (_values(curve, rows[count], name) for count in (FEW, most))
    return shared(few_values, many_values, lambda one, other: log_badness(one, other, better))


def _values(curve: Curve, row: CurveRow, name: str) -> dict[int, float]:
    value = row.figure(name)
    values = row.each.get(name, []) if row.each else [] if value is None else [value]
    return dict(zip(curve.all_seeds, values, strict=True)) if values else {}
