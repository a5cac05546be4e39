"""The plots of a report: curves with error bars against steps and against time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow.evaluation.figures import LOWER, Figure
from anyflow.evaluation.report.folder import REAL_COLOUR
from anyflow.evaluation.report.picture import VARIANT_COLOURS
from anyflow.experiment.measured import Measured, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in VARIANT_COLOURS]
MARKERS = "osD^vPX*"
FLAT = 3
"""An axis of distances is logarithmic from this ratio of the largest to the smallest on."""


def plot_curves(path: Path, measured: Measured) -> None:
    """A panel for each metric (rows) and data set (columns): every arm's mean and 95 % interval over its seeds."""
    experiment, cards = measured.experiment, measured.cards()
    with _panels(path, len(experiment.metrics), len(cards)) as axes:
        counts = sorted(experiment.evaluation.steps)
        for row, metric in enumerate(experiment.figures):
            for column, card in enumerate(cards):
                axis = axes[row][column]
                _panel(axis, measured, metric, card)
                axis.set_xscale("log", base=2)
                axis.set_xticks(counts, [str(count) for count in counts])
                axis.minorticks_off()
                axis.set_xlabel("steps")
                axis.set_title(short(card), fontsize=10)
                if not column:
                    axis.set_ylabel(f"{metric.heading}\n({metric.better} is better)", fontsize=9)


def plot_cost(path: Path, measured: Measured) -> None:
    """The deciding metric against the seconds that a clip takes."""
    metric, cards = measured.experiment.figures[0], measured.cards()
    with _panels(path, 1, len(cards)) as axes:
        for column, card in enumerate(cards):
            axis = axes[0][column]
            _panel(axis, measured, metric, card, against_time=True)
            axis.set_xscale("log")
            axis.set_xlabel("seconds a clip")
            axis.set_title(short(card), fontsize=10)
        axes[0][0].set_ylabel(f"{metric.heading}\n({metric.better} is better)", fontsize=9)


@contextmanager
def _panels(path: Path, rows: int, columns: int) -> Iterator[Any]:
    """The axes of a figure that is laid out, saved and closed at the end of the block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (max(5.5, 4.2 * columns), 3.3 * rows + 0.7)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    try:
        yield axes
        handles, labels = axes[0][0].get_legend_handles_labels()
        beside = min(len(labels), max(3, 3 * len(axes[0])))
        figure.legend(handles, labels, loc="lower center", ncols=beside, frameon=False, fontsize=9)
        lines = -(-len(labels) // max(beside, 1))
        figure.tight_layout(rect=(0, 0.26 * lines / figure.get_figheight() + 0.01, 1, 1))
        figure.savefig(path, dpi=100)
    finally:
        pyplot.close(figure)


def _panel(axis: Axes, measured: Measured, metric: Figure, card: str, *, against_time: bool = False) -> None:
    arms = measured.experiment.shown
    for index, arm in enumerate(arms):
        curve = measured.curve(arm, card, metric.name)
        if not curve:
            continue
        spread = 1 + 0.035 * (index - (len(arms) - 1) / 2)  # beside each other, so that no bar hides another
        places = [count * spread for count in curve]
        if against_time:
            places = [_seconds(measured, arm, card, count) for count in curve]
        found = list(curve.values())
        ends = [
            (e.mean - e.low, e.high - e.mean) if e.low is not None and e.high is not None else (0, 0) for e in found
        ]
        axis.errorbar(
            places,
            [estimate.mean for estimate in found],
            yerr=list(zip(*ends, strict=True)),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            linewidth=1.4,
            capsize=2.5,
            label=arm,
        )
    floor = measured.real[card].get(metric.name)
    if isinstance(floor, int | float):
        axis.axhline(floor, color=REAL_COLOUR, linestyle="--", linewidth=1, label="real clips")
    if metric.better == LOWER:
        _widen(axis, measured, metric, card)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _widen(axis: Axes, measured: Measured, metric: Figure, card: str) -> None:
    """Take a logarithmic axis where one arm's distance is many times another's, which a linear one presses flat."""
    curves = [measured.curve(arm, card, metric.name) for arm in measured.experiment.shown]
    means = [estimate.mean for curve in curves for estimate in curve.values()]
    if means and 0 < FLAT * min(means) < max(means):
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())


def _seconds(measured: Measured, arm: str, card: str, steps: int) -> float:
    parts = [measured.values(arm, card, steps, name) for name in ("sampling_seconds", "decoding_seconds")]
    return sum(sum(part) / len(part) for part in parts if part) or float("nan")
