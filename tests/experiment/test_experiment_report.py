"""Answers and report from invented curves: verdicts, figures, and a page with everything inside."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from study import TEXT, invent, tasks_in_state, write_study

from anyflow.experiment.claims import FAILS, HOLDS, OPEN, answer
from anyflow.experiment.content import content_of
from anyflow.experiment.load import asked_by, load_experiment
from anyflow.experiment.measured import few_step_ratio, read_measured, retention
from anyflow.experiment.pieces import Piece
from anyflow.experiment.report import mean_curves, write_report
from anyflow.experiment.schema import Claim, Experiment

PROJECT = Path(__file__).resolve().parents[2]
Study = tuple[Experiment, list[Piece]]
LEVEL = {"base": 1.0, "plain": 0.9, "more": 0.6}
ROT = {"base": 1.0, "plain": 2.0, "more": 1.1}
"""How many times as bad fewer steps are than 32."""


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """An experiment with all curves, which the tests only read."""
    experiment, pieces = write_study(tmp_path_factory.mktemp("study"))
    invent(experiment, pieces, distance, with_samples=True)
    return experiment, pieces


def distance(arm: str, card: str, seed: int, steps: int) -> float:
    """Data sets and seeds differ much, arms by a factor: only paired comparisons see it."""
    scale = {"driving": 1.0, "games": 30.0}[card] * (1 + seed) * (1 + 0.01 * math.sin(7 * seed + ord(arm[0]) + steps))
    return scale * LEVEL[arm] * (ROT[arm] if steps < 32 else 1.0)


@pytest.mark.parametrize(
    ("claim", "verdict", "told"),
    [
        (Claim("x", "more", "plain", [1, 4]), HOLDS, "more at 1 step against plain at 1 step: sliced W1 63"),
        (Claim("x", "plain", "more", [1]), FAILS, "the other way round"),
        (Claim("x", "plain", "base", [4], relation="worse"), HOLDS, "% higher ["),
        (Claim("x", "more", "base", [1, 32]), HOLDS, "lower"),
        (Claim("x", "plain", "base", [1, 32]), FAILS, "at 32 steps"),
        (Claim("x", "more", "", [4], of=32, relation="within", factor=1.25), HOLDS, "1.108 times as bad"),
        (Claim("x", "plain", "", [4], of=32, relation="within", factor=1.25), FAILS, "1.25 allowed"),
        (Claim("x", "base", "", [4], of=32, relation="within", factor=1.01), OPEN, "inside the interval"),
        (Claim("x", "more", "plain", [1], metric="motion_accuracy"), OPEN, "without any spread"),
        (Claim("x", "more", "plain", [2]), OPEN, "not measured"),
        (Claim("x", "more", "plain", [1], cards=["games"]), HOLDS, "(3 pairs)"),
    ],
)
def test_a_claim_is_answered_by_pairs(study: Study, claim: Claim, verdict: str, told: str) -> None:
    found = answer(read_measured(study[0], tasks_in_state(study[1])), claim)
    assert found.verdict == verdict and any(told in reason for reason in found.reasons), found


def test_a_mean_of_all_data_sets_does_not_hide_one_that_goes_the_other_way(study: Study) -> None:
    found = answer(read_measured(study[0], tasks_in_state(study[1])), Claim("x", "more", "plain", [1]))
    assert re.search(r"\(6 pairs\); driving -6\d.* %, games -6\d.* %", found.reasons[0])


def test_nothing_is_decided_before_every_data_set_is_measured_as_it_is_now(study: Study) -> None:
    experiment, tasks = study[0], tasks_in_state(study[1])
    part = [
        replace(task, state="changed") if task.card == "games" and task.piece.arm == "more" else task for task in tasks
    ]
    found = answer(read_measured(experiment, part), Claim("x", "more", "plain", [1]))
    assert found.verdict == OPEN and "not measured on games" in found.reasons[0]
    assert answer(read_measured(experiment, part), Claim("x", "more", "plain", [1], cards=["driving"])).verdict == HOLDS


def test_seeds_that_another_arm_lacks_are_no_pairs(tmp_path: Path) -> None:
    """The other arm's first seed is another noise: it stands for no other."""
    once = TEXT.replace("  plain: {", "  plain: {seeds: [0], ").replace("seeds: [0, 1, 2]", "seeds: [0, 1, 2]", 1)
    experiment, pieces = write_study(tmp_path, once.replace("  more: {start_from: plain}", "  more: {}"))
    invent(experiment, pieces, distance)
    found = answer(read_measured(experiment, tasks_in_state(pieces)), Claim("x", "more", "plain", [1]))
    assert found.verdict == OPEN and "(2 pairs)" in found.reasons[0] and "no interval" in found.reasons[0]


def test_pairs_without_any_spread_decide_nothing(tmp_path: Path) -> None:
    experiment, pieces = write_study(tmp_path)
    invent(experiment, pieces, lambda arm, *_: LEVEL[arm])
    found = answer(read_measured(experiment, tasks_in_state(pieces)), experiment.claims[0])
    assert found.verdict == OPEN and "no interval" in found.reasons[0]


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    experiment, pieces = write_study(tmp_path, TEXT.replace("[0, 1, 2]", "[0]"))
    invent(experiment, pieces, distance)
    found = answer(read_measured(experiment, tasks_in_state(pieces)), experiment.claims[0])
    assert found.verdict == OPEN and "no interval" in found.reasons[0]


def test_ratio_and_retention_are_taken_seed_by_seed(study: Study) -> None:
    measured, metric = read_measured(study[0], tasks_in_state(study[1])), study[0].figures[0]
    ratio, kept = few_step_ratio(measured, "plain", metric), retention(measured, "plain", metric)
    assert ratio is not None and ratio.mean == pytest.approx(2, rel=0.02) and ratio.count == 6
    assert kept is not None and kept.mean == pytest.approx(0.5, rel=0.03)
    assert kept.low is not None and kept.high is not None and kept.high - kept.low < 0.1
    assert retention(measured, "base", metric) is None


def test_the_page_has_everything_inside(study: Study) -> None:
    old = study[0].results / "samples-old.png"
    old.parent.mkdir(parents=True)
    old.touch()
    tasks = tasks_in_state(study[1])
    again = [task for task in tasks if task.is_training][:2]
    tasks = [replace(task, state="cut") if task in again else task for task in tasks]
    folder, answers = write_report(*study, tasks)
    assert [found.verdict for found in answers] == [HOLDS]
    pictures = {"curves.png", "cost.png"} | {
        f"samples-{card}.{e}" for card in ("driving", "games") for e in ("png", "mp4")
    }
    assert {path.name for path in folder.iterdir()} == pictures | {
        "report.html",
        "report.md",
        "figures.json",
        "measured",
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(page) < 3_000_000
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 6 and all(source.startswith("data:") for source in sources)
    assert page.count("data:video/mp4;base64,") == 2
    for words in ("Does it matter?", "More beats plain.", 'class="verdict holds"', "2 trainings and curves are still"):
        assert words in page
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "**holds**: More beats plain." in text and "| real clips | 0.5 | 0.5 | 0.5 |" in text
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert figures["curves"]["plain"]["games"]["sliced_w1"]["4"]["values"] == [
        distance("plain", "games", seed, 4) for seed in (0, 1, 2)
    ]
    assert figures["answers"][0]["verdict"] == HOLDS and figures["floor"]["driving"]["sliced_w1"] == 0.5


def test_another_codec_is_told(study: Study) -> None:
    experiment, pieces = study
    measured = read_measured(experiment, tasks_in_state(pieces))
    measured.real_of["more", "games"] = {**measured.real_of["more", "games"], "sliced_w1": 0.7}
    assert "codec of more is another" in content_of(measured, pieces, [], 0, []).note_tables
    assert "codec" not in content_of(read_measured(experiment, tasks_in_state(pieces)), pieces, [], 0, []).note_tables


def test_few_steps_are_no_ratio_of_themselves_and_a_file_elsewhere_is_named(tmp_path: Path) -> None:
    experiment, pieces = write_study(tmp_path, TEXT.replace("before: base", "before: base\nfew: 32"))
    invent(experiment, pieces, distance)
    write_report(experiment, pieces, tasks_in_state(pieces))
    written = (experiment.results / "report.md").read_text()
    assert "ew-step ratio" not in written and f"make experiment NAME={experiment.file}" in written
    assert asked_by(load_experiment("retention")) == "retention"


def test_what_can_be_0_has_no_ratio(tmp_path: Path) -> None:
    experiment, pieces = write_study(
        tmp_path, TEXT.replace("metrics: [sliced_w1,", "metrics: [preview_error, sliced_w1,")
    )
    invent(experiment, pieces, distance)
    measured = read_measured(experiment, tasks_in_state(pieces))
    assert few_step_ratio(measured, "plain", experiment.metric("preview_error")) is None
    assert few_step_ratio(measured, "plain", experiment.metric("sliced_w1")) is not None


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    experiment, pieces = write_study(tmp_path)
    folder, answers = write_report(experiment, pieces, tasks_in_state(pieces, "missing"))
    assert answers[0].verdict == OPEN and "not measured" in answers[0].reasons[0]
    assert "30 trainings and curves are still missing" in (folder / "report.md").read_text(encoding="utf-8")


def test_text_of_the_file_is_no_html(tmp_path: Path) -> None:
    experiment, pieces = write_study(tmp_path, TEXT.replace("Does it matter?", "<script>alert(1)</script>"))
    folder, _ = write_report(experiment, pieces, tasks_in_state(pieces, "missing"))
    assert "<script>" not in (folder / "report.html").read_text(encoding="utf-8")


def test_mean_curves_have_the_step_count_and_the_cards(study: Study) -> None:
    curves = mean_curves(read_measured(study[0], tasks_in_state(study[1])))
    assert set(curves) == {name for arm in LEVEL for name in (arm, f"{arm}/driving", f"{arm}/games")}
    assert [row["num_steps"] for row in curves["base"]] == [1, 4, 32]
