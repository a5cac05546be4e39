"""The one plotter of curves: panels of lines with their intervals, beside the levels that real clips reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow.evaluation.report.picture import VARIANT_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = tuple("#{:02x}{:02x}{:02x}".format(*colour) for colour in VARIANT_COLOURS)
MARKERS = "osD^vPX*"
REAL_COLOUR = "#4a4f57"
LEVEL_STYLES = ("--", ":")
FLAT = 3
"""Values are on a logarithmic axis from this ratio of the largest to the smallest on, where that may be."""


@dataclass(frozen=True)
class Line:
    """A curve; where it has no interval, ``low`` and ``high`` are its values.

    Attributes:
        label: in the legend.
        places: across.
        values: up.
        low: lower ends of the intervals.
        high: upper ends.
        style: number of its colour and marker.
        is_band: the intervals are shaded instead of drawn as whiskers.
    """

    label: str
    places: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    style: int = 0
    is_band: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        lines: its curves.
        levels: what real clips get, by label.
        across: under the horizontal axis, which is logarithmic.
        up: beside the vertical axis.
        ticks: of the horizontal axis; without any as matplotlib sets them.
        limits: of the vertical axis, ``None`` for an end that follows the values.
        may_be_logarithmic: whether the vertical axis is logarithmic where values lie far apart.
    """

    title: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]]
    across: str
    up: str = ""
    ticks: Sequence[float] = ()
    limits: tuple[float | None, float | None] = (None, None)
    may_be_logarithmic: bool = False


def save_panels(path: Path, rows: Sequence[Sequence[Panel]], title: str = "") -> None:
    """Draw rows of panels with one legend below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (max(5.5, 4.2 * len(rows[0])), 3.3 * len(rows) + 0.7)
    figure, axes = pyplot.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    try:
        for row, panels in zip(axes, rows, strict=True):
            for axis, panel in zip(row, panels, strict=True):
                _draw(axis, panel)
        legends = [axis.get_legend_handles_labels() for axis in axes.flat]  # a panel may lack a line that others have
        legends.sort(key=lambda legend: -len(legend[1]))
        labels: dict[str, Any] = {}
        for handles, names in legends:
            for name, handle in zip(names, handles, strict=True):
                labels.setdefault(name, handle)
        beside = min(len(labels), max(3, 3 * len(rows[0])))
        figure.legend(list(labels.values()), list(labels), loc="lower center", ncols=beside, frameon=False, fontsize=9)
        if title:
            figure.suptitle(title, fontsize=12)
        height = 0.26 * -(-len(labels) // max(beside, 1))
        figure.tight_layout(rect=(0, height / figure.get_figheight() + 0.01, 1, 1))
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def _draw(axis: Axes, panel: Panel) -> None:
    for line in panel.lines:
        colour, marker = COLOURS[line.style % len(COLOURS)], MARKERS[line.style % len(MARKERS)]
        drawn: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 4.5,
            "linewidth": 1.4,
            "label": line.label,
        }
        if line.is_band:
            axis.plot(line.places, line.values, **drawn)
            axis.fill_between(line.places, line.low, line.high, color=colour, alpha=0.13, linewidth=0)
            continue
        ends = [
            [value - low for value, low in zip(line.values, line.low, strict=True)],
            [high - value for value, high in zip(line.values, line.high, strict=True)],
        ]
        axis.errorbar(line.places, line.values, yerr=ends, capsize=2.5, **drawn)
    for (label, value), style in zip(panel.levels, LEVEL_STYLES, strict=False):
        axis.axhline(value, color=REAL_COLOUR, linestyle=style, linewidth=1, label=label)
    axis.set_xscale("log", base=2 if panel.ticks else 10)
    if panel.ticks:
        axis.set_xticks(panel.ticks, [f"{tick:g}" if tick == int(tick) else f"{tick:.2g}" for tick in panel.ticks])
        axis.minorticks_off()
    _scale_values(axis, panel)
    axis.set_xlabel(panel.across)
    axis.set_title(panel.title, fontsize=10)
    axis.set_ylabel(panel.up, fontsize=9)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _scale_values(axis: Axes, panel: Panel) -> None:
    """A logarithmic axis where one value is many times another, which a linear one would press flat."""
    axis.set_ylim(*panel.limits)
    values = [value for line in panel.lines for value in line.values]
    if panel.may_be_logarithmic and values and 0 < FLAT * min(values) < max(values):
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        axis.set_yscale("log", nonpositive="clip")
        shown = [*values, *(value for _, value in panel.levels if value > 0)]
        axis.set_ylim(min(shown) / 1.5, max(shown) * 1.5)  # whatever an interval reaches down to
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
