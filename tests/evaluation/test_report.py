"""Reports: the files, the table's words, and refusing to compare what was measured differently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from models import BlockCodec, exact_sampler, held_out, measure_curve

from anyflow.evaluation.curve import Curve, CurveResult
from anyflow.evaluation.intervals import wilson_interval
from anyflow.evaluation.report.folder import FILES, sample_grid, write_report
from anyflow.evaluation.report.tables import comparison_markdown, comparison_text

ITEMS, REFERENCE = held_out(3), held_out(3, offset=3)


def _measure(label: str, error: float) -> CurveResult:
    return measure_curve(
        exact_sampler(ITEMS, error),
        BlockCodec(),
        ITEMS,
        REFERENCE,
        label=label,
        steps=(1, 4),
        show=1,
    )


def read_report(path: Path) -> tuple[Curve | None, Curve]:
    content = json.loads(path.read_text(encoding="utf-8"))
    before = content["before"]
    return Curve.from_json(before) if before else None, Curve.from_json(content["after"])


@pytest.fixture(scope="module")
def pair() -> tuple[CurveResult, CurveResult]:
    return _measure("before", 0.8), _measure("after", 0.0)


def test_a_report_holds_every_figure_and_its_numbers_come_back(
    tmp_path: Path, pair: tuple[CurveResult, CurveResult]
) -> None:
    before, after = pair
    paths = write_report(tmp_path / "report", before, after, title="Driving")
    assert set(paths) == set(FILES) == {path.name for path in (tmp_path / "report").iterdir()}
    assert all(path.stat().st_size > 100 for path in paths.values())
    assert read_report(paths["curve.json"]) == (before.curve, after.curve)
    assert paths["table.txt"].read_text() == comparison_text(before.curve, after.curve)


def test_a_report_of_one_model_alone(tmp_path: Path, pair: tuple[CurveResult, CurveResult]) -> None:
    paths = write_report(tmp_path, None, pair[1])
    assert read_report(paths["curve.json"]) == (None, pair[1].curve)
    assert "→" not in paths["table.md"].read_text()


def test_the_tables_say_before_and_after_beside_the_floor(pair: tuple[CurveResult, CurveResult]) -> None:
    before, after = (result.curve for result in pair)
    for text in (comparison_markdown(before, after), comparison_text(before, after)):
        assert f"{before.row(1).frame_frechet:.3f} → {after.row(1).frame_frechet:.3f}" in text
        assert "→ 100 % (44-100)" in text and "real clips" in text and f"{after.real.sliced_w1:.4f}" in text


def test_wide_tables_lose_nothing(pair: tuple[CurveResult, CurveResult]) -> None:
    """Many further judges: the table is cut into several, no cell."""
    more = {f"probe_number_{i}_right": 0.123 for i in range(20)}
    before, after = (
        replace(result.curve, rows=tuple(replace(row, more=more) for row in result.curve.rows)) for result in pair
    )
    text = comparison_text(before, after)
    assert "…" not in text and all(f"probe number {i} right" in text for i in range(20))
    assert max(map(len, text.splitlines())) < 240


def test_several_seeds_show_their_intervals(tmp_path: Path) -> None:
    result = measure_curve(
        exact_sampler(ITEMS, 0.8),
        BlockCodec(),
        ITEMS,
        REFERENCE,
        steps=(1, 4),
        seeds=(0, 1),
        show=1,
    )
    row, text = result.curve.row(1), comparison_text(None, result.curve)
    assert f"{row.sliced_w1:.4f} ±{row.interval['sliced_w1']:.4f}" in text and "2 seeds of noise" in text
    assert "seed 0, 1." in comparison_markdown(None, result.curve)
    paths = write_report(tmp_path, None, result)
    assert read_report(paths["curve.json"]) == (None, result.curve)


@pytest.mark.parametrize(
    "change",
    [{"seeds": (1,)}, {"seeds": (0, 1)}, {"clips": 4}, {"size": (5, 64, 96)}, {"domain": "games"}, {"rows": ()}],
)
def test_curves_that_were_measured_differently_are_refused(
    tmp_path: Path, pair: tuple[CurveResult, CurveResult], change: dict[str, object]
) -> None:
    before, after = pair
    other = replace(before, curve=replace(before.curve, **change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="measure both alike"):
        write_report(tmp_path / "report", other, after)
    assert not (tmp_path / "report").exists()


def test_samples_of_different_prompts_make_no_picture(pair: tuple[CurveResult, CurveResult]) -> None:
    with pytest.raises(ValueError, match="different prompts"):
        sample_grid([pair[0], replace(pair[1], shown=(ITEMS[1],))])


def test_the_interval_of_a_share() -> None:
    """Wilson's interval: 5 of 10 is 0.24 to 0.76; none of 10 still allows 0.28."""
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson_interval(1.0, 3)[1] == 1.0
