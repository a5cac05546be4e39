"""Panels of curves: one legend for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from anyflow.evaluation.report.plot import Line, Panel, save_panels

ONE, FOUR = [1.0], [4.0]


def _panel(*labels: str) -> Panel:
    lines = [Line(label, ONE, FOUR, FOUR, FOUR, style) for style, label in enumerate(labels)]
    return Panel("quality", lines, [("real clips", 1.0)] if "before" in labels else [], "steps")


def test_the_legend_names_the_lines_of_all_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without controls has no obedience, which may be what the first panel shows."""
    shown: list[list[str]] = []
    draw = Figure.legend

    def legend(figure: Figure, handles: object, labels: object, **how: object) -> object:
        shown.append([str(label) for label in labels])  # type: ignore[attr-defined]
        return draw(figure, handles, labels, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "legend", legend)
    save_panels(tmp_path / "curves.png", [[_panel("after")], [_panel("before", "after", "tail")], [_panel("other")]])
    assert shown == [["real clips", "before", "after", "tail", "other"]]
