"""Committed results: another machine goes on from them, as long as they are what it would measure itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study import TEXT, invent_curve, invent_training, write_study

from anyflow.experiment.kept import _computed, _computes_the_same, kept_pieces
from anyflow.experiment.load import list_experiments, load_experiment
from anyflow.experiment.measured import read_measured
from anyflow.experiment.pieces import Piece, pieces_of
from anyflow.experiment.report import write_report
from anyflow.experiment.schema import Experiment
from anyflow.experiment.tasks import tasks_of
from anyflow.recipe import Recipe

PROJECT = Path(__file__).resolve().parents[2]
FEWER = TEXT.replace("seeds: [0, 1, 2]", "seeds: [0]").replace("cards: [driving, games]", "cards: [driving]")
Study = tuple[Experiment, list[Piece]]


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


def elsewhere(folder: Path, text: str = FEWER) -> None:
    """Train and measure everything; then only the results are left, as in a clean clone."""
    experiment, pieces = write_study(folder, text)
    for piece in pieces:
        if piece.recipe is not None:
            invent_training(piece)
        for card in piece.cards:
            invent_curve(experiment, piece, card, lambda arm, *_: len(arm), with_samples=True)
    write_report(experiment, pieces, tasks_of(experiment, pieces))
    (folder / "runs").rename(folder / "gone")


def states(study: Study) -> dict[str, str]:
    return {task.title: task.state for task in tasks_of(*study)}


def test_what_was_measured_elsewhere_counts_as_done(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    experiment, pieces = write_study(tmp_path, FEWER)
    assert set(states((experiment, pieces)).values()) == {"kept"}
    again = tasks_of(experiment, pieces, afresh=True)
    assert {(task.state, task.has_kept) for task in again if task.is_training} == {("missing", False)}
    before = json.loads((experiment.results / "figures.json").read_text())
    folder, _ = write_report(experiment, pieces, tasks_of(experiment, pieces))
    after = json.loads((folder / "figures.json").read_text())
    assert after["curves"] == before["curves"] and after["curves"]["plain"]["driving"]
    assert len(list((folder / "measured").iterdir())) == 3
    assert "Trained: 2 at commit" in (folder / "report.md").read_text()
    assert after["pictures"] == before["pictures"] == {"driving": ["base", "plain", "more"]}
    assert (folder / "samples-driving.png").is_file() and (folder / "samples-driving.mp4").is_file()
    assert "<video" in (folder / "report.html").read_text()


def test_a_new_arm_trains_the_models_that_it_starts_from_and_no_others(tmp_path: Path) -> None:
    """Figures cannot be gone on from; what was trained from the same model elsewhere still counts."""
    elsewhere(tmp_path)
    more = FEWER.replace("overrides: [stage.steps=20", "  again: {start_from: plain}\noverrides: [stage.steps=20")
    experiment, pieces = write_study(tmp_path, more)
    found = states((experiment, pieces))
    assert {name.split("-")[0]: state for name, state in found.items() if "train" in name} == {
        "plain": "missing",
        "more": "kept",
        "again": "missing",
    }
    plain = next(piece for piece in pieces if piece.arm == "plain")
    invent_training(plain)
    found = states((experiment, pieces))
    assert found["more-0-driving: evaluate on driving"] == found["base-0: evaluate on driving"] == "kept"
    assert found["plain-0-driving: evaluate on driving"] == "missing"
    assert ("plain", "driving", 0) not in read_measured(experiment, tasks_of(experiment, pieces)).rows
    plain.run.note(state="running")
    assert states((experiment, pieces))["more-0-driving: evaluate on driving"] == "kept"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("stage.diffusion_share=1, ", "stage.diffusion_share=0.9, "), "another recipe"),
        (("prompts: 4, steps: [1, 4, 32]", "prompts: 5, steps: [1, 4, 32]"), "another prompts"),
        (("steps: [1, 4, 32]}", "steps: [1, 2, 4, 32]}"), "another steps"),
    ],
)
def test_what_would_come_out_otherwise_is_measured_again(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    elsewhere(tmp_path)
    experiment, pieces = write_study(tmp_path, FEWER.replace(*change))
    found = {task.piece.arm: task for task in tasks_of(experiment, pieces)}
    assert found["plain"].state == "missing" and reason in found["plain"].reason
    assert found["more"].state == "missing"
    assert found["base"].state == ("kept" if "recipe" in reason else "missing")
    tasks = tasks_of(experiment, pieces)
    assert ("plain", "driving", 0) not in read_measured(experiment, tasks).rows
    write_report(experiment, pieces, tasks)
    assert len(list((experiment.results / "measured").iterdir())) == 3  # for a recipe that is put back


def test_other_clips_and_a_broken_file_do_not_count(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    experiment, pieces = write_study(tmp_path, FEWER)
    path = experiment.results / "measured" / "plain-0-driving.json"
    document = json.loads(path.read_text())
    document["facts"]["data"] = "0123"
    path.write_text(json.dumps(document))
    (experiment.results / "measured" / "base-0.json").write_text("{")
    found = {task.piece.arm: (task.state, task.reason) for task in tasks_of(experiment, pieces)}
    assert found["plain"] == ("missing", "what is kept has another start or training clips")
    assert found["more"] == ("missing", "what is kept has another plain-0-driving") and found["base"][0] == "missing"


@pytest.mark.parametrize(("now", "state"), [("", "kept"), ("stage.text_drop=0.3, ", "missing")])
def test_a_field_that_came_later_was_at_its_default(tmp_path: Path, now: str, state: str) -> None:
    elsewhere(tmp_path)
    text = FEWER.replace("overrides: [stage.steps", f"overrides: [{now}stage.steps")
    experiment, pieces = write_study(tmp_path, text)
    path = experiment.results / "measured" / "plain-0-driving.json"
    document = json.loads(path.read_text())
    del document["recipe"]["stage.text_drop"]
    path.write_text(json.dumps(document))
    assert {task.state for task in tasks_of(experiment, pieces) if task.piece.arm == "plain"} == {state}


def test_a_renamed_experiment_keeps_what_was_trained_from_its_own_arms() -> None:
    was, now, other = (f"runs/experiments/{name}/model" for name in ("before/plain-0", "now/plain-0", "now/plain-1"))
    same, different = {"model.weights": now}, {"model.weights": other}
    usual = _computed(Recipe()) or {}
    assert _computes_the_same({**usual, "model.weights": was}, {**usual, **same})
    assert not _computes_the_same({**usual, "model.weights": was}, {**usual, **different})


@pytest.mark.parametrize("name", [name for name in list_experiments() if name != "doctor"])
def test_the_committed_results_count_as_they_stand(name: str) -> None:
    """A recipe field that is added, or a file that is renamed, must not ask for hours of training again."""
    experiment = load_experiment(name)
    found = kept_pieces(experiment, pieces_of(experiment))
    assert not {piece: reason for piece, reason in found.items() if reason}


def test_what_is_here_goes_before_what_is_kept(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    experiment, pieces = write_study(tmp_path, FEWER)
    plain = next(piece for piece in pieces if piece.arm == "plain")
    invent_training(plain)
    invent_curve(experiment, plain, "driving", lambda *_: 77.0, with_samples=True)
    folder, _ = write_report(experiment, pieces, tasks_of(experiment, pieces))
    document = json.loads((folder / "figures.json").read_text())
    figures = document["curves"]
    assert document["pictures"]["driving"] == ["base", "plain", "more"]  # a picture of more arms than are here stays
    assert figures["plain"]["driving"]["sliced_w1"]["4"]["mean"] == 77.0
    assert figures["more"]["driving"]["sliced_w1"]["4"]["mean"] == 4.0
    kept = json.loads((folder / "measured" / "plain-0-driving.json").read_text())
    assert kept["curves"]["driving"]["curve"]["rows"][0]["sliced_w1"] == 77.0
