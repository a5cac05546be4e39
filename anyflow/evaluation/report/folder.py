"""A curve, or two side by side, as a folder: tables, numbers, a plot, and the samples' picture and film.

The plot carries the real clips' own figures (the floor of a distance, the ceiling of an accuracy) beside the samples',
and 95 % intervals, so that nobody reads noise as progress.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyflow.evaluation.curve import Curve, CurveResult, Marks, pixel_frames
from anyflow.evaluation.figures import Figure
from anyflow.evaluation.report.picture import Grid, Prompt, save_mp4, save_png
from anyflow.evaluation.report.plot import Line, Panel, save_panels
from anyflow.evaluation.report.tables import (
    COLUMNS,
    WHOLE,
    asked_of,
    check_comparable,
    comparison_markdown,
    comparison_text,
    interval_of,
    main_columns,
)
from anyflow.system.files import write_atomically

FILES = ("curve.json", "curve.png", "table.md", "table.txt", "samples.png", "samples.mp4")
"""What a report's folder holds."""


def plot_curve(path: Path, before: Curve | None, after: Curve) -> None:
    """Plot the curves against the number of steps: accuracy, distances, motion energy, and real clips' lines.

    The last panel has a distance against what it costs.
    """
    check_comparable(before, after)
    columns: list[tuple[Figure, str]] = [
        (COLUMNS[0], "motion asked for, read from pixels\n(higher is better)"),
        (COLUMNS[1], "Frechet distance of frames\n(lower is better)"),
        (COLUMNS[2], "sliced Wasserstein of latents\n(lower is better)"),
        (COLUMNS[3], "motion energy, grey levels\n(as real clips have it)"),
    ]
    if after.rows[0].motion_accuracy is None:
        columns.pop(0)
    if WHOLE[1] in main_columns(after):
        columns.insert(0, (WHOLE[1], "frames of whole cars alone, read from pixels\n(higher is better)"))
    curves = [(style, curve) for style, curve in enumerate((before, after)) if curve is not None]
    panels = [_panel(column, title, curves) for column, title in columns]
    panels.append(_panel(COLUMNS[2], "sliced Wasserstein against time\n(lower is better)", curves, against_time=True))
    save_panels(path, [panels], f"Quality against the number of steps: {asked_of(after, 'held-out prompts')}")


def _panel(column: Figure, title: str, curves: Sequence[tuple[int, Curve]], against_time: bool = False) -> Panel:
    after = curves[-1][1]
    lines = [_line(style, curve, column, against_time) for style, curve in curves]
    levels = [("real clips", after.real), ("real clips through the codec", after.codec)]
    levels_up = [(label, _number(marks, column)) for label, marks in levels]
    shown = [value for line in lines for value in line.high] + [value for _, value in levels_up]
    most = 1.03 if column.is_share else 1.1 * max((value for value in shown if math.isfinite(value)), default=1.0)
    return Panel(
        title,
        lines,
        levels_up,
        "seconds a clip, decoding included" if against_time else "steps",
        ticks=_apart(lines) if against_time else lines[-1].places,
        limits=(0, most or 1.0),
    )


def _line(style: int, curve: Curve, column: Figure, against_time: bool) -> Line:
    low, high = zip(*(interval_of(row, column, curve.clips) for row in curve.rows), strict=True)
    times = [row.sampling_seconds + row.decoding_seconds for row in curve.rows]
    return Line(
        curve.label,
        times if against_time else [row.num_steps for row in curve.rows],
        [_number(row, column) for row in curve.rows],
        low,
        high,
        style,
        is_band=len(curve.all_seeds) == 1,
    )


def _number(marks: Marks, column: Figure) -> float:
    value = marks.figure(column.name)
    return math.nan if value is None else value


def _apart(lines: Sequence[Line]) -> list[float]:
    """The places of all lines, those left out that would overlap."""
    ticks: list[float] = []
    for place in sorted(place for line in lines for place in line.places):
        if not ticks or place > 1.3 * ticks[-1]:
            ticks.append(place)
    return ticks


def sample_grid(
    results: Sequence[CurveResult],
    title: str = "",
    figures: Sequence[Figure] = WHOLE[1:2],
    values: Mapping[str, Mapping[int, Sequence[float]]] | None = None,
) -> Grid:
    """Return the picture's content: the kept samples of one model, or of several with the same prompts.

    Args:
        results: of the models.
        title: above the picture.
        figures: what stands above the samples, where it is known.
        values: of these, by label and step count; else the curves' own.

    Raises:
        ValueError: if the results show different prompts.
    """
    keys = {tuple(item.key for item in result.shown) for result in results}
    if len(keys) != 1:
        raise ValueError("the results show different prompts; measure them on the same items")
    shown = results[0].shown
    import numpy as np

    curves = [result.curve for result in results]
    found: Mapping[str, Mapping[int, Sequence[float | None]]] = values or {
        curve.label: {row.num_steps: [row.figure(one.name) for one in figures] for row in curve.rows}
        for curve in curves
    }
    known = {
        label: {count: told for count, given in of.items() if (told := _told_figures(figures, given))}
        for label, of in found.items()
    }
    notes = known if any(known.values()) else {}
    return Grid(
        prompts=[Prompt(item.caption, item.domain, item.attributes) for item in shown],
        variants={
            result.curve.label: {count: clips.numpy() for count, clips in result.samples.items()} for result in results
        },
        real=np.stack([np.asarray(item.frames) for item in shown]),
        title=title,
        given=pixel_frames(results[0].curve.given_frames),
        notes=notes,
        notes_say=f"{'; '.join(one.heading for one in figures)}, of all samples." if notes else "",
    )


def _told_figures(figures: Sequence[Figure], values: Sequence[float | None]) -> str:
    """Those that are known, beside each other: a share in percent, else two digits."""
    known = [(one, value) for one, value in zip(figures, values, strict=True) if value is not None]
    return "   ".join(f"{100 * value:.0f} %" if one.is_share else f"{value:.2f}" for one, value in known)


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
