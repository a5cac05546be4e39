"""The plots of a report: every arm's curve with its intervals, against steps and against time."""

from __future__ import annotations

import math
from pathlib import Path

from anyflow.evaluation.figures import LOWER, Figure
from anyflow.evaluation.report.plot import Line, Panel, save_panels
from anyflow.experiment.measured import Measured, short


def plot_curves(path: Path, measured: Measured) -> None:
    """A panel for each metric (rows) and data set (columns): every arm's mean and 95 % interval over its seeds."""
    cards = measured.cards()
    save_panels(path, [[_panel(measured, metric, card) for card in cards] for metric in measured.experiment.figures])


def plot_cost(path: Path, measured: Measured) -> None:
    """The deciding metric against the seconds that a clip takes."""
    metric = measured.experiment.figures[0]
    save_panels(path, [[_panel(measured, metric, card, against_time=True) for card in measured.cards()]])


def _panel(measured: Measured, metric: Figure, card: str, *, against_time: bool = False) -> Panel:
    floor = measured.real[card].get(metric.name)
    is_first = card == measured.cards()[0]
    return Panel(
        short(card),
        [
            _line(measured, metric, card, arm, against_time)
            for arm in measured.experiment.shown
            if measured.curve(arm, card, metric.name)
        ],
        [("real clips", floor)] if isinstance(floor, int | float) else [],
        "seconds a clip" if against_time else "steps",
        f"{metric.heading}\n({metric.better} is better)" if is_first else "",
        ticks=() if against_time else sorted(measured.experiment.evaluation.steps),
        may_be_logarithmic=metric.better == LOWER,
    )


def _line(measured: Measured, metric: Figure, card: str, arm: str, against_time: bool) -> Line:
    curve, arms = measured.curve(arm, card, metric.name), measured.experiment.shown
    index = arms.index(arm)
    spread = 1 + 0.035 * (index - (len(arms) - 1) / 2)  # beside each other, so that no bar hides another
    found = curve.values()
    least = 0.0 if metric.is_share or metric.better == LOWER else -math.inf  # an interval knows no bounds
    most = 1.0 if metric.is_share else math.inf
    return Line(
        arm,
        [_seconds(measured, arm, card, count) if against_time else count * spread for count in curve],
        [one.mean for one in found],
        [max(least, one.mean if one.low is None else one.low) for one in found],
        [min(most, one.mean if one.high is None else one.high) for one in found],
        style=index,
    )


def _seconds(measured: Measured, arm: str, card: str, steps: int) -> float:
    parts = [measured.values(arm, card, steps, name) for name in ("sampling_seconds", "decoding_seconds")]
    return sum(sum(part) / len(part) for part in parts if part) or float("nan")
