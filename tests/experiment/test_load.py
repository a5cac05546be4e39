"""Experiments' files: those that ship hold, and every mistake is one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from study import TEXT, write_study

from anyflow.errors import UserError
from anyflow.experiment import execute
from anyflow.experiment.load import list_experiments, load_experiment, needed_arms
from anyflow.experiment.pieces import curve_settings, judged_by, pieces_of
from anyflow.experiment.ready import check_ready
from anyflow.tracking.fingerprints import data_fingerprint

PROJECT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((PROJECT / "experiments").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


def test_the_promised_experiments_ship() -> None:
    assert {"ablation", "any-step", "causal", "retention"} <= set(list_experiments())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_hold(path: Path) -> None:
    """All recipes resolve, every arm keeps the budget, and the file says how it is run."""
    experiment = load_experiment(path.stem)
    pieces = pieces_of(experiment)
    assert {piece.arm for piece in pieces} == set(experiment.arms)
    assert len({piece.name for piece in pieces}) == len(pieces)
    assert len(experiment.seeds) >= 3 and experiment.claims and experiment.expect and experiment.budget.steps
    place = {piece.name: index for index, piece in enumerate(pieces)}
    assert all(place[needed] < place[piece.name] for piece in pieces for needed in piece.needs)
    assert not execute.lagging_arms(pieces)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# make experiment NAME={path.stem}      (anyflow experiment {path.stem})"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("qestion", "x", "did you mean 'question'"),
        ("question", "", "question is empty"),
        ("seeds", [0, 0], "repeats itself"),
        ("seeds", ["a"], "seeds"),
        ("seeds", [-1], "too small"),
        ("cards", ["drivin"], "did you mean driving"),
        ("evaluation", {"steps": [1, 2]}, "few=4 is not among"),
        ("evaluation", {"prompts": 1}, "evaluation.prompts=1 .* too small"),
        ("evaluation", {"promts": 1}, "unknown key 'evaluation.promts'"),
        ("before", "nobody", "is no shown arm"),
        ("metrics", ["slice_w1"], r"metrics\[0\]='slice_w1' is no figure: did you mean sliced_w1"),
        ("metrics", [{"name": "sliced_w1"}], r"metrics\[0\]=.* is not of the right type: give a text"),
        ("arms", {"a": {"title": 14}}, r"arms\.a\.title=14 is not of the right type: give a text in quotes: '14'"),
        ("arms", {"a": None}, r"arms\.a=None is not of the right type: give keys with values"),
        ("metrics", ["motion_energy"], r"metrics\[0\]='motion_energy' has no better side"),
        ("budget", {"steps": 30}, "arm plain trains 20 steps, its budget is 30"),
        ("budget", {"steps": 20, "batch": 4}, "takes 8 clips a step, budget.batch is 4"),
        ("arms", {"a": {"start_from": "b"}, "b": {"start_from": "a"}}, "starts from itself"),
        ("arms", {"a": {"start_from": "none"}}, "needs arm 'none'"),
        ("arms", {"a": {"overrides": ["optimizer.lrr=1"]}}, "did you mean 'optimizer.lr'"),
        ("arms", {"a": {"folder": "x", "overrides": ["stage.steps=1"]}}, "overrides has no effect"),
        ("arms", {"a": {"shown": False}}, "no arm is shown"),
        ("arms", {"a b": {}}, "folder's name"),
        (
            "claims",
            [{"say": "x", "arm": "plain", "than": "no", "steps": [1]}],
            "than=.no. is no shown arm",
        ),
        ("claims", [{"say": "x", "arm": "plain", "than": "base", "steps": [3]}], "names 3 steps"),
        ("claims", [{"say": "x", "arm": "plain", "steps": [1]}], "give 'than' or 'of'"),
        ("claims", [{"say": "x", "arm": "plain", "than": "base", "steps": [1], "metric": "m"}], "is not among metrics"),
        ("claims", [{"arm": "plain", "than": "base", "steps": [1]}], "say is empty"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, key: str, value: object, told: str) -> None:
    tree = {**yaml.safe_load(TEXT), key: value}
    if key == "arms":
        del tree["claims"], tree["before"]
    with pytest.raises(UserError, match=told) as caught:
        write_study(tmp_path, yaml.safe_dump(tree))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_offers_a_known_one() -> None:
    with pytest.raises(UserError, match="did you mean retention"):
        load_experiment("retentoin")


def test_distances_of_an_encoder_are_metrics_where_it_is_named(tmp_path: Path) -> None:
    tree = yaml.safe_load(TEXT)
    tree["metrics"] = ["efficientnet_kernel"]
    with pytest.raises(UserError, match=r"efficientnet_kernel.*no judge of evaluation\.encoders=\[\] gives it"):
        write_study(tmp_path, yaml.safe_dump(tree))
    tree["evaluation"]["encoders"] = ["efficientnet-lite"]
    experiment, pieces = write_study(tmp_path, yaml.safe_dump(tree))
    assert [figure.name for figure in experiment.figures] == ["efficientnet_kernel"]
    assert curve_settings(experiment, pieces[0])["encoders"] == ["efficientnet-lite"]


def test_labels_that_a_probe_reads_are_metrics_and_its_clips_count(tmp_path: Path) -> None:
    tree = yaml.safe_load(TEXT)
    tree["metrics"], tree["evaluation"]["encoders"] = ["probe_manoeuvre_right", "probe_frechet"], ["probe"]
    experiment, pieces = write_study(tmp_path, yaml.safe_dump(tree))
    assert [figure.better for figure in experiment.figures] == ["higher", "lower"]
    stands_on = judged_by(experiment, pieces[0], "driving")
    assert stands_on["encoders"] == ["probe"] and stands_on["probe"] == data_fingerprint("driving", "train")
    tree["metrics"] = ["probe_maneuver_right"]
    with pytest.raises(UserError, match="did you mean probe_manoeuvre_right"):
        write_study(tmp_path, yaml.safe_dump(tree))
    tree["metrics"], tree["evaluation"]["split"] = ["probe_kernel"], "train"
    with pytest.raises(UserError, match="encoders probe on split train: a probe has seen these clips"):
        check_ready(*write_study(tmp_path, yaml.safe_dump(tree)))


def test_a_mistake_in_an_arms_overrides_names_the_arm(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study\.yaml: arms\.plain: unknown key 'stage\.stepps'"):
        write_study(tmp_path, TEXT.replace("stage.diffusion_share=1,", "stage.stepps=1,"))


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ("prompts: 4, ", "prompts: 4, given_frames: 9, ", "evaluation.given_frames=9 are 33 frames, and clips of arm"),
        ("more: {", "more: {given_frames: 5, ", "arms.more.given_frames=5 are 17 frames, and clips of arm base have"),
        ("prompts: 4, ", "prompts: 4000, ", "evaluation.prompts 4000: 4000 prompts need 8000 clips"),
        ("folder: data/models/tiny", "folder: data/models/nowhere", "arms.base.folder data/models/nowhere"),
        ("prompts: 4, ", "prompts: 4, encoders: [nowhere.pt], ", "evaluation.encoders nowhere.pt: there is nothing"),
    ],
)
def test_what_would_stop_it_later_is_said_before(tmp_path: Path, was: str, now: str, told: str) -> None:
    check_ready(*write_study(tmp_path / "right"))
    found = write_study(tmp_path / "wrong", TEXT.replace(was, now))
    with pytest.raises(UserError, match=re.escape(told)):
        check_ready(*found)


def test_what_one_arm_is_given_all_arms_leave_out(tmp_path: Path) -> None:
    experiment, pieces = write_study(tmp_path)
    assert experiment.left_out == 0 and "left_out" not in curve_settings(experiment, pieces[0])
    tree = yaml.safe_load(TEXT)
    tree["arms"]["again"] = {"folder": "{arm.more}", "given_frames": 1}
    experiment, pieces = write_study(tmp_path, yaml.safe_dump(tree))
    left = {piece.arm: curve_settings(experiment, piece).get("left_out") for piece in pieces}
    assert experiment.left_out == 1 and left == {"base": 1, "plain": 1, "more": 1, "again": None}


def test_retention_is_measured_against_what_an_arm_began_as(tmp_path: Path) -> None:
    tree = yaml.safe_load(TEXT)
    tree["arms"]["base-frame"] = {"folder": "data/models/tiny", "given_frames": 1, "before": "base-frame"}
    tree["arms"]["again"] = {"folder": "{arm.more}", "given_frames": 1, "before": "base-frame"}
    experiment, _ = write_study(tmp_path, yaml.safe_dump(tree))
    found = {arm: experiment.began_as(arm) for arm in experiment.shown}
    assert found == {"base": "", "plain": "base", "more": "base", "base-frame": "", "again": "base-frame"}
    tree["arms"]["again"]["before"] = "none"
    with pytest.raises(UserError, match=r"arms\.again\.before='none' is no shown arm"):
        write_study(tmp_path, yaml.safe_dump(tree))


def test_needs_are_read_from_every_text(tmp_path: Path) -> None:
    tree = yaml.safe_load(TEXT)
    tree["arms"]["taught"] = {"overrides": ["stage.onpolicy.teacher={arm.base}", "stage.steps=20"]}
    tree["arms"]["again"] = {"folder": "{arm.more}", "given_frames": 1}
    experiment, pieces = write_study(tmp_path, yaml.safe_dump(tree))
    assert needed_arms(experiment, "taught") == ["base"] and needed_arms(experiment, "again") == ["more"]
    again = next(piece for piece in pieces if piece.arm == "again" and piece.cards == ("games",))
    assert again.model == str(tmp_path / "runs" / "study" / "more-0-games" / "model") and again.given_frames == 1
    taught = next(piece for piece in pieces if piece.arm == "taught")
    assert taught.recipe is not None and taught.recipe.stage.onpolicy.teacher == "data/models/tiny"
