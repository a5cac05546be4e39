"""A curve, or two side by side, as a table, a plot and a folder of both with the samples' picture.

The table and the plot carry the real clips' own figures (the floor of a distance, the ceiling of an accuracy) beside
the samples', and a 95 % interval beside each share and each mean over seeds, so that nobody reads noise as progress.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow.evaluation.curve import Curve, CurveResult, CurveRow, Marks
from anyflow.evaluation.picture import Grid, Prompt, save_mp4, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

BEFORE_COLOUR, AFTER_COLOUR, REAL_COLOUR = "#b07010", "#185abe", "#4a4f57"

FIGURES = ("curve.json", "curve.png", "table.md", "table.txt", "samples.png", "samples.mp4")
"""What a report's folder holds."""


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share seen in ``count`` trials; it stays within 0 and 1 at any count."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Column:
    """A measure of the table.

    Attributes:
        name: of the figure.
        heading: what stands above it.
        digits: after the point.
        is_share: whether it is a share of the clips, written in percent.
    """

    name: str
    heading: str
    digits: int = 3
    is_share: bool = False

    def write(self, marks: Marks, count: int) -> str:
        """The cell of a set of ``count`` clips: the figure with its interval, if that is known."""
        value = marks.figure(self.name)
        if value is None:
            return "-"
        low, high = interval_of(marks, self, count)
        if self.is_share:
            return f"{100 * value:.0f} % ({100 * low:.0f}-{100 * high:.0f})"
        half = f" ±{(high - low) / 2:.{self.digits}f}" if high > low else ""
        return f"{value:.{self.digits}f}{half}"


COLUMNS = (
    Column("motion_accuracy", "motion right", is_share=True),
    Column("frame_frechet", "frame Frechet"),
    Column("sliced_w1", "sliced W1", 4),
    Column("motion_energy", "motion energy", 2),
)
"""The table's measures."""


def interval_of(marks: Marks, column: Column, count: int) -> tuple[float, float]:
    """A figure's 95 % interval: over the seeds; of a share measured once, over the clips; else the figure alone."""
    value = marks.figure(column.name)
    if value is None:
        return math.nan, math.nan
    half = marks.interval.get(column.name) if isinstance(marks, CurveRow) else None
    if half is not None:
        low, high = value - half, value + half
        return (max(0.0, low), min(1.0, high)) if column.is_share else (low, high)
    return wilson_interval(value, count) if column.is_share else (value, value)


def table_cells(before: Curve | None, after: Curve) -> tuple[list[str], list[list[str]]]:
    """Lay out one or two curves as headings and rows of text.

    Each step count has a row and each measure a column; with two curves a cell reads ``before → after``. Two more
    rows say what real clips get.
    """
    check_comparable(before, after)
    headings = ["steps", *(column.heading for column in COLUMNS), "seconds a clip"]
    rows = []
    for row in after.rows:
        shown = [*([before.row(row.num_steps)] if before is not None else []), row]
        cells = [" → ".join(column.write(marks, after.clips) for marks in shown) for column in COLUMNS]
        rows.append([str(row.num_steps), *cells, f"{row.sampling_seconds + row.decoding_seconds:.2f}"])
    for name, marks in (("real clips", after.real), ("real, through the codec", after.codec)):
        rows.append([name, *(column.write(marks, after.clips) for column in COLUMNS), "-"])
    return headings, rows


def check_comparable(before: Curve | None, after: Curve) -> None:
    """Refuse two curves that were not measured the same way.

    Raises:
        ValueError: naming what differs: seeds, number of clips, size, domain or step counts.
    """
    if before is None:
        return
    for name in ("seed", "seeds", "clips", "size", "domain"):
        if getattr(before, name) != getattr(after, name):
            pair = f"{getattr(before, name)} before, {getattr(after, name)} after"
            raise ValueError(f"the curves differ in {name}: {pair}; measure both alike")
    if [row.num_steps for row in before.rows] != [row.num_steps for row in after.rows]:
        raise ValueError("the curves have different step counts; measure both alike")


def _table_title(before: Curve | None, after: Curve) -> str:
    pair = f" ({before.label} → {after.label})" if before is not None else ""
    noise = f"{len(after.seeds)} seeds of noise, the same" if len(after.seeds) > 1 else "the same noise"
    return f"Any-step curve{pair}: {after.domain}, {after.clips} prompts, {noise} at every step count"


def comparison_table(before: Curve | None, after: Curve) -> Table:
    """Return the table for the terminal."""
    from rich import box
    from rich.table import Table

    headings, rows = table_cells(before, after)
    table = Table(title=_table_title(before, after), title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, cells in enumerate(rows):
        table.add_row(*cells, end_section=index == len(after.rows) - 1)
    return table


def comparison_text(before: Curve | None, after: Curve) -> str:
    """Return the table as plain text, as wide as it needs."""
    import io

    from rich.console import Console

    sink = io.StringIO()
    Console(file=sink, width=160, color_system=None).print(comparison_table(before, after))
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()).strip("\n") + "\n"


def comparison_markdown(before: Curve | None, after: Curve) -> str:
    """Return the table as Markdown, with the notes that a reader needs."""
    headings, rows = table_cells(before, after)
    lines = [f"**{_table_title(before, after)}**", "", f"| {' | '.join(headings)} |", f"|{'--:|' * len(headings)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    frames, height, width = after.size
    seeds = after.seeds or (after.seed,)
    notes = (
        f"{after.clips} held-out prompts, {frames} frames of {width}x{height}, seed {', '.join(map(str, seeds))}."
        f" {'Means over the seeds with their 95 % interval.' if len(seeds) > 1 else ''}"
        " Motion right: the motion asked for, read from the pixels (95 % interval)."
        " Distances are to other real clips; lower is better, and the row of real clips is their floor."
        " Frame Frechet is taken on fixed features of frames (it is not FVD). Motion energy: mean change from frame to"
        " frame in grey levels; the nearer to the real clips the better."
    )
    return "\n".join(lines) + f"\n\n{notes}\n"


def plot_curve(path: Path, before: Curve | None, after: Curve) -> None:
    """Plot the curves against the number of steps: accuracy, distances, motion energy, and real clips' lines."""
    check_comparable(before, after)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    has_motion = after.rows[0].motion_accuracy is not None
    panels: list[tuple[Column, str]] = [
        (COLUMNS[1], "Frechet distance of frames\n(lower is better)"),
        (COLUMNS[2], "sliced Wasserstein of latents\n(lower is better)"),
        (COLUMNS[3], "motion energy, grey levels\n(as real clips have it)"),
    ]
    if has_motion:
        panels.insert(0, (COLUMNS[0], "motion asked for, read from pixels\n(higher is better)"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.1 * len(panels), 3.9), squeeze=False)
    try:
        for axis, (column, title) in zip(axes[0], panels, strict=True):
            _plot_panel(axis, column, title, before, after)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
        figure.suptitle(
            f"Quality against the number of steps: {after.domain}, {after.clips} held-out prompts", fontsize=12
        )
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def _number(marks: Marks, column: Column) -> float:
    value = marks.figure(column.name)
    return math.nan if value is None else value


def _plot_panel(axis: Axes, column: Column, title: str, before: Curve | None, after: Curve) -> None:
    steps = [row.num_steps for row in after.rows]
    curves = [(before, BEFORE_COLOUR, "s"), (after, AFTER_COLOUR, "o")]
    for curve, colour, marker in curves:
        if curve is None:
            continue
        values = [_number(row, column) for row in curve.rows]
        low, high = zip(*(interval_of(row, column, curve.clips) for row in curve.rows), strict=True)
        axis.plot(steps, values, marker=marker, color=colour, label=curve.label, zorder=3)
        if len(curve.seeds) > 1:
            whiskers = [[value - below for value, below in zip(values, low, strict=True)]]
            whiskers.append([above - value for value, above in zip(values, high, strict=True)])
            axis.errorbar(steps, values, yerr=whiskers, color=colour, linestyle="none", capsize=3, linewidth=1)
        elif column.is_share:
            axis.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
    for marks, style, label in ((after.real, "--", "real clips"), (after.codec, ":", "real clips through the codec")):
        axis.axhline(_number(marks, column), color=REAL_COLOUR, linestyle=style, linewidth=1, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, [str(count) for count in steps])
    axis.minorticks_off()
    axis.set_xlabel("steps")
    axis.set_title(title, fontsize=10)
    axis.set_ylim(bottom=0, top=1.03 if column.is_share else None)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


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


def pixel_frames(latent_frames: int) -> int:
    """Frames behind a video's first latent frames: 1, then 4 for each further one (Wan's codec)."""
    return max(0, 4 * latent_frames - 3)


def write_report(
    folder: Path, before: CurveResult | None, after: CurveResult, *, title: str = "", fps: float = 8.0
) -> dict[str, Path]:
    """Write all figures of one evaluation.

    Args:
        folder: made if missing; files of an earlier report in it are replaced.
        before: curve and samples of the model that training started from; ``None`` for one model alone.
        after: the same of the trained model, on the same prompts, seed and step counts.
        title: above the picture.
        fps: of the clips.
    Returns:
        ``{"curve.json": path, ...}`` for each of ``FIGURES``.
    """
    earlier = before.curve if before is not None else None
    check_comparable(earlier, after.curve)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in FIGURES}
    content: dict[str, Any] = {"version": 1, "after": after.curve.to_json()}
    content["before"] = earlier.to_json() if earlier is not None else None
    paths["curve.json"].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    paths["table.md"].write_text(comparison_markdown(earlier, after.curve), encoding="utf-8")
    paths["table.txt"].write_text(comparison_text(earlier, after.curve), encoding="utf-8")
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


def read_report(path: Path) -> tuple[Curve | None, Curve]:
    """Read ``curve.json`` back: the curve before, if there is one, and the curve after."""
    content = json.loads(path.read_text(encoding="utf-8"))
    before = content.get("before")
    return Curve.from_json(before) if before else None, Curve.from_json(content["after"])
