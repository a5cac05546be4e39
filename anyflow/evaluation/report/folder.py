"""A curve, or two side by side, as a folder: tables, numbers, a plot, and the samples' picture and film.

The plot carries the real clips' own figures (the floor of a distance, the ceiling of an accuracy) beside the samples',
and 95 % intervals, so that nobody reads noise as progress.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow.evaluation.curve import Curve, CurveResult, Marks, pixel_frames
from anyflow.evaluation.figures import Figure
from anyflow.evaluation.report.picture import Grid, Prompt, save_mp4, save_png
from anyflow.evaluation.report.tables import (
    COLUMNS,
    check_comparable,
    comparison_markdown,
    comparison_text,
    interval_of,
)
from anyflow.system.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE_COLOUR, AFTER_COLOUR, REAL_COLOUR = "#b07010", "#185abe", "#4a4f57"

FILES = ("curve.json", "curve.png", "table.md", "table.txt", "samples.png", "samples.mp4")
"""What a report's folder holds."""


def plot_curve(path: Path, before: Curve | None, after: Curve) -> None:
    """Plot the curves against the number of steps: accuracy, distances, motion energy, and real clips' lines.

    The last panel has a distance against what it costs.
    """
    check_comparable(before, after)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    has_motion = after.rows[0].motion_accuracy is not None
    panels: list[tuple[Figure, str]] = [
        (COLUMNS[1], "Frechet distance of frames\n(lower is better)"),
        (COLUMNS[2], "sliced Wasserstein of latents\n(lower is better)"),
        (COLUMNS[3], "motion energy, grey levels\n(as real clips have it)"),
    ]
    if has_motion:
        panels.insert(0, (COLUMNS[0], "motion asked for, read from pixels\n(higher is better)"))
    figure, axes = pyplot.subplots(1, len(panels) + 1, figsize=(4.1 * len(panels) + 4.1, 3.9), squeeze=False)
    try:
        for axis, (column, title) in zip(axes[0], panels, strict=False):
            _plot_panel(axis, column, title, before, after)
        _plot_panel(axes[0][-1], COLUMNS[2], "sliced Wasserstein against time\n(lower is better)", before, after, True)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
        figure.suptitle(
            f"Quality against the number of steps: {after.domain}, {after.clips} held-out prompts", fontsize=12
        )
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def _number(marks: Marks, column: Figure) -> float:
    value = marks.figure(column.name)
    return math.nan if value is None else value


def _seconds(curve: Curve) -> list[float]:
    return [row.sampling_seconds + row.decoding_seconds for row in curve.rows]


def _plot_panel(
    axis: Axes, column: Figure, title: str, before: Curve | None, after: Curve, against_time: bool = False
) -> None:
    curves = [(before, BEFORE_COLOUR, "s"), (after, AFTER_COLOUR, "o")]
    for curve, colour, marker in curves:
        if curve is None:
            continue
        values = [_number(row, column) for row in curve.rows]
        places = _seconds(curve) if against_time else [row.num_steps for row in curve.rows]
        low, high = zip(*(interval_of(row, column, curve.clips) for row in curve.rows), strict=True)
        axis.plot(places, values, marker=marker, color=colour, label=curve.label, zorder=3)
        if len(curve.all_seeds) > 1:
            whiskers = [[value - below for value, below in zip(values, low, strict=True)]]
            whiskers.append([above - value for value, above in zip(values, high, strict=True)])
            axis.errorbar(places, values, yerr=whiskers, color=colour, linestyle="none", capsize=3, linewidth=1)
        elif column.is_share:
            axis.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)
    for marks, style, label in ((after.real, "--", "real clips"), (after.codec, ":", "real clips through the codec")):
        axis.axhline(_number(marks, column), color=REAL_COLOUR, linestyle=style, linewidth=1, label=label)
    _scale(axis, [curve for curve, *_ in curves if curve is not None], against_time)
    axis.set_title(title, fontsize=10)
    axis.set_ylim(bottom=0, top=1.03 if column.is_share else 1.05 * axis.get_ylim()[1])
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _scale(axis: Axes, curves: Sequence[Curve], against_time: bool) -> None:
    """Steps (or the seconds of all curves' steps, those that would overlap left out) on a logarithmic axis."""
    axis.set_xscale("log", base=2)
    ticks = [float(row.num_steps) for row in curves[-1].rows]
    if against_time:
        ticks = []
        for seconds in sorted(second for curve in curves for second in _seconds(curve)):
            if not ticks or seconds > 1.3 * ticks[-1]:
                ticks.append(seconds)
    axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("seconds a clip, decoding included" if against_time else "steps")


def sample_grid(results: Sequence[CurveResult], title: str = "") -> Grid:
    """Return the picture's content: the kept samples of one model, or of several with the same prompts.

    Raises:
        ValueError: if the results show different prompts.
    """
    keys = {tuple(item.key for item in result.shown) for result in results}
    if len(keys) != 1:
        raise ValueError("the results show different prompts; measure them on the same items")
    shown = results[0].shown
    import numpy as np

    return Grid(
        prompts=[Prompt(item.caption, item.domain, item.attributes) for item in shown],
        variants={
            result.curve.label: {count: clips.numpy() for count, clips in result.samples.items()} for result in results
        },
        real=np.stack([np.asarray(item.frames) for item in shown]),
        title=title,
        given=pixel_frames(results[0].curve.given_frames),
    )


def write_report(
    folder: Path,
    before: CurveResult | None,
    after: CurveResult,
    *,
    title: str = "",
    fps: float = 8.0,
    about: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write all figures of one evaluation.

    Args:
        folder: made if missing; files of an earlier report in it are replaced.
        before: curve and samples of the model that training started from; ``None`` for one model alone.
        after: the same of the trained model, on the same prompts, seed and step counts.
        title: above the picture.
        fps: of the clips.
        about: which model, on what data; kept in ``curve.json``.
    Returns:
        ``{"curve.json": path, ...}`` for each of ``FILES``.
    """
    earlier = before.curve if before is not None else None
    check_comparable(earlier, after.curve)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in FILES}
    content: dict[str, Any] = {"version": 1, "about": dict(about or {}), "after": after.curve.to_json()}
    content["before"] = earlier.to_json() if earlier is not None else None
    write_atomically(paths["curve.json"], json.dumps(content, indent=1) + "\n")
    write_atomically(paths["table.md"], comparison_markdown(earlier, after.curve))
    write_atomically(paths["table.txt"], comparison_text(earlier, after.curve))
    plot_curve(paths["curve.png"], earlier, after.curve)
    grid = sample_grid(
        [result for result in (before, after) if result is not None], title or _picture_title(before, after)
    )
    save_png(grid, paths["samples.png"])
    save_mp4(grid, paths["samples.mp4"], fps=fps)
    return paths


def _picture_title(before: CurveResult | None, after: CurveResult) -> str:
    trained = ", before and after training" if before is not None else ""
    return f"The same prompts at 1 to {after.curve.rows[-1].num_steps} steps{trained}"
