"""Curves as tables: figures with their intervals beside those of real clips, for terminals and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from anyflow.evaluation.curve import Curve, CurveRow, Marks
from anyflow.evaluation.figures import AS_REAL, FIGURES, LOWER, Figure, figure_of
from anyflow.evaluation.intervals import wilson_interval
from anyflow.evaluation.report.obeyed import control_notes, obedience_lines
from anyflow.evaluation.retention import change, few_step_ratio, retention
from anyflow.evaluation.statistics import Estimate
from anyflow.system.tables import markdown_table

COLUMNS = tuple(FIGURES[name] for name in ("motion_accuracy", "frame_frechet", "sliced_w1", "motion_energy"))
"""The measures of the first table, and of the plot."""

WHOLE = (FIGURES["whole_cars"], FIGURES["whole_frames"])
"""Lead both where a domain has them."""

_FURTHER = (
    "decoded_frechet",
    "frame_kernel",
    "spread",
    "temporal_consistency",
    "path_error",
    "path_end_error",
    "path_right",
    "swap_gap",
    "obedience",
    "given_frame_psnr",
    "preview_error",
)
DETAILS = tuple(FIGURES[name] for name in _FURTHER)
"""The measures of the second table; figures that only some models have follow them."""


ABREAST = 6
"""Columns of a table of text at most, beside those of steps and cost."""

UNBOUNDED = 10_000
"""Letters of a line, more than any has: lines end where they are read."""


def main_columns(curve: Curve) -> tuple[Figure, ...]:
    """The columns of the first table."""
    return (*(figure for figure in WHOLE if _has(curve.real, figure)), *COLUMNS)


def detail_columns(curve: Curve) -> tuple[Figure, ...]:
    """The columns of the second table: those that the curve has any figure for."""
    leading = {figure.name for figure in WHOLE}
    more = dict.fromkeys(name for marks in (*curve.rows, curve.real) for name in marks.more if name not in leading)
    further = [figure_of(name) or Figure(name, name.replace("_", " "), AS_REAL) for name in more]
    return tuple(figure for figure in (*DETAILS, *further) if any(_has(row, figure) for row in curve.rows))


def _has(marks: Marks, figure: Figure) -> bool:
    return marks.figure(figure.name) is not None


def interval_of(marks: Marks, figure: Figure, count: int) -> tuple[float, float]:
    """A figure's 95 % interval: over the seeds; of a share measured once, over the clips; else the figure alone."""
    value = marks.figure(figure.name)
    if value is None:
        return math.nan, math.nan
    half = marks.interval.get(figure.name) if isinstance(marks, CurveRow) else None
    if half is not None:
        low, high = value - half, value + half
        return (max(0.0, low), min(1.0, high)) if figure.is_share else (low, high)
    return wilson_interval(value, figure.trials(count, marks.motion_clips)) if figure.is_share else (value, value)


def _cell(marks: Marks, figure: Figure, count: int) -> str:
    """The cell of a set of ``count`` clips: the figure with its interval, if that is known."""
    value = marks.figure(figure.name)
    if value is None:
        return "-"
    low, high = interval_of(marks, figure, count)
    if figure.is_share:
        return f"{100 * value:.0f} % ({100 * low:.0f}-{100 * high:.0f})"
    half = f" ±{(high - low) / 2:.{figure.digits}f}" if high > low else ""
    return f"{value:.{figure.digits}f}{half}"


def table_cells(
    before: Curve | None, after: Curve, columns: Sequence[Figure] = COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Lay out one or two curves as headings and rows of text.

    Each step count has a row and each measure a column; with two curves a cell reads ``before → after``. Two more
    rows say what real clips get.
    """
    check_comparable(before, after)
    headings = ["steps", *(column.heading for column in columns), "calls, seconds a clip"]
    rows = []
    for row in after.rows:
        shown = [*([before.row(row.num_steps)] if before is not None else []), row]
        cells = [" → ".join(_cell(marks, column, after.clips) for marks in shown) for column in columns]
        calls = " → ".join(dict.fromkeys(str(one.nfe) for one in shown))  # type: ignore[attr-defined]
        rows.append([str(row.num_steps), *cells, f"{calls}, {row.sampling_seconds + row.decoding_seconds:.2f}"])
    for name, marks in (("real clips", after.real), ("real, through the codec", after.codec)):
        rows.append([name, *(_cell(marks, column, after.clips) for column in columns), "-"])
    return headings, rows


def few_step_lines(before: Curve | None, after: Curve) -> list[str]:
    """What few steps cost in a word for each figure, and what is left of the few-step ability before."""
    lines = []
    for column in (*main_columns(after), *detail_columns(after)):
        if not column.compares:
            continue
        ratios = [few_step_ratio(curve, column.name) for curve in (before, after) if curve is not None]
        if any(ratio is None for ratio in ratios):
            continue
        kept = retention(before, after, column.name) if before is not None else None
        told = f"{column.heading}: few-step ratio {' → '.join(map(str, ratios))}"
        lines.append(told + (f", retention {kept}" if kept is not None else ""))
    return lines


def change_lines(before: Curve | None, after: Curve) -> list[str]:
    """By how much each distance fell or grew at each step count, paired by seed: the table's intervals are unpaired."""
    if before is None:
        return []
    lines = []
    for column in (*main_columns(after), *detail_columns(after)):
        if column.better != LOWER or not column.compares:
            continue
        found = {row.num_steps: change(before, after, column.name, row.num_steps) for row in after.rows}
        told = [f"{count}: {_percent(ratio)}" for count, ratio in found.items() if ratio is not None]
        if told:
            lines.append(f"{column.heading}, {after.label} against {before.label} at steps {', '.join(told)}")
    return lines


def lines_below(before: Curve | None, after: Curve) -> list[str]:
    """What stands below the tables."""
    told = [line for curve in (before, after) if curve is not None for line in obedience_lines(curve)]
    return [*told, *change_lines(before, after), *few_step_lines(before, after), *after.notes]


def _percent(ratio: Estimate) -> str:
    found = ratio.percent
    interval = f" [{found.low:+.1f}, {found.high:+.1f}]" if found.low is not None else ""
    return f"{found.mean:+.1f} %{interval}"


def check_comparable(before: Curve | None, after: Curve) -> None:
    """Refuse two curves that were not measured the same way.

    Raises:
        ValueError: naming what differs: seeds, number of clips, size, domain, step counts or latents.
    """
    if before is None:
        return
    for name, field in (("seeds", "all_seeds"), ("clips", "clips"), ("size", "size"), ("domain", "domain")):
        if getattr(before, field) != getattr(after, field):
            pair = f"{getattr(before, field)} before, {getattr(after, field)} after"
            raise ValueError(f"the curves differ in {name}: {pair}; measure both alike")
    if [row.num_steps for row in before.rows] != [row.num_steps for row in after.rows]:
        raise ValueError("the curves have different step counts; measure both alike")
    if not math.isclose(before.real.sliced_w1, after.real.sliced_w1, rel_tol=0.02):
        raise ValueError("real clips have other latents before than after: the models have another codec each")


def _title(before: Curve | None, after: Curve) -> str:
    pair = f" ({before.label} → {after.label})" if before is not None else ""
    noise = f"{len(after.all_seeds)} seeds of noise, the same" if len(after.all_seeds) > 1 else "the same noise"
    scales = list(dict.fromkeys(f"{curve.guidance_scale:g}" for curve in (before, after) if curve is not None))
    guidance = f", guidance {' → '.join(scales)}" if scales != ["1"] else ""
    return f"Any-step curve{pair}: {asked_of(after, 'prompts')}, {noise} at every step count{guidance}"


def asked_of(curve: Curve, prompts: str) -> str:
    """A curve's domain, if its clips tell theirs, and the number of its ``prompts``."""
    return ", ".join(filter(None, [curve.domain, f"{curve.clips} {prompts}"]))


def comparison_text(before: Curve | None, after: Curve) -> str:
    """Return the tables as plain text: nothing in them is wrapped or cut, and none has more than a few columns."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table

    sink = io.StringIO()
    console = Console(file=sink, width=UNBOUNDED, color_system=None)
    details = detail_columns(after)
    parts = [details[start : start + ABREAST] for start in range(0, len(details), ABREAST)]
    for title, columns in (
        (_title(before, after), main_columns(after)),
        *(("More of the same samples", part) for part in parts),
    ):
        headings, rows = table_cells(before, after, columns)
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for index, cells in enumerate(rows):
            table.add_row(*cells, end_section=index == len(after.rows) - 1)
        console.print(table)
    for line in lines_below(before, after):
        console.print(line)
    return "\n".join(line.rstrip() for line in sink.getvalue().split("\n")).strip("\n") + "\n"


def comparison_markdown(before: Curve | None, after: Curve) -> str:
    """Return the tables as Markdown, with the notes that a reader needs."""
    lines = [f"**{_title(before, after)}**"]
    for columns in (main_columns(after), detail_columns(after)):
        if columns:
            lines += ["", *markdown_table(*table_cells(before, after, columns), "r")]
    if told := lines_below(before, after):
        lines += ["", *(f"- {line}" for line in told)]
    frames, height, width = after.size
    notes = [
        f"{after.clips} held-out prompts, {frames} frames of {width}x{height}, "
        f"seed {', '.join(map(str, after.all_seeds))}.",
        "Means over the seeds with their 95 % interval." if len(after.all_seeds) > 1 else "",
        "Whole cars: clips in which every car keeps one colour, a car's area and outline in every frame, and comes and "
        "goes at the picture's ends alone, read from the pixels."
        if _has(after.real, WHOLE[0])
        else "",
        *control_notes(after),
        "Motion right: the motion asked for, read from the pixels (95 % interval). Distances are to other real clips; "
        "lower is better; the row of real clips says what as many of them get. Frame Frechet is "
        "taken on fixed features of frames (it is not FVD). Motion energy: mean change from frame to frame in grey "
        "levels; spread: how much clips differ among each other, against real ones; the nearer to the real clips the "
        "better. Few-step ratio: 4 steps against the most, 1 is no loss; retention: "
        "before over after, 1 is kept. Preview error: how far a sample lies from the one of the same noise at the most "
        "steps; 0 is the same clip, 1.4 one that has nothing to do with it.",
    ]
    return "\n".join(lines) + f"\n\n{' '.join(filter(None, notes))}\n"
