"""Models that are told controls, through the commands."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from anyflow.backbone.codec import Codec
from anyflow.backbone.controls import MODULE, ControlSettings
from anyflow.backbone.export import export_pipeline
from anyflow.backbone.guidance import Guidance
from anyflow.backbone.load import load_backbone
from anyflow.backbone.model_card import ModelCard
from anyflow.cli.main import app
from anyflow.data.wanted import wanted_controls
from anyflow.errors import UserError
from anyflow.evaluation import control_probe
from anyflow.evaluation.control_probe import ControlProbeSettings
from anyflow.evaluation.models import way_of
from anyflow.recipe import load_recipe, save_recipe
from anyflow.training.assemble import assemble

CARD = "driving-uncaptioned"
SCALE = ("sampling.control_guidance_scale=2", "data.precompute=false")


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def export_told(folder: Path, base: Path, names: list[str]) -> Path:
    """A small causal model that is told what driving clips hold, with random weights."""
    found = wanted_controls([CARD], names)
    settings = ControlSettings({name: control.to_dict() for name, control in found.items()}, width=8)
    backbone = load_backbone(base, controls=settings)
    module = backbone.transformer.condition_embedder.get_submodule(MODULE)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module.layers[-1].weight.normal_(std=0.3)
    card = ModelCard("told", size=(17, 64, 96), fps=8.0)
    return export_pipeline(folder, backbone.transformer, Codec.from_folder(base), 3.0, card, dtype=torch.float32)


@pytest.fixture(scope="module")
def told_model(small_causal_model: Path, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(project)
        return export_told(tmp_path_factory.mktemp("told") / "model", small_causal_model, ["actions"])


@pytest.fixture
def actions(tmp_path: Path) -> Path:
    place = tmp_path / "actions.npy"
    np.save(place, np.stack([np.full(17, 10.0), np.linspace(-0.6, 0.6, 17)], axis=1))
    return place


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_samples_are_guided_by_their_controls(told_model: Path, actions: Path, tmp_path: Path) -> None:
    """Two calls a step, another clip; scale 1 is the clip without the option."""
    found: dict[str, tuple[dict[str, Any], bytes]] = {}
    for scale in ("none", "1", "4"):
        more = [] if scale == "none" else ["--control-guidance", scale]
        words = ["sample", "a car", "--model", told_model, "--steps", "2", "--controls", actions]
        result = call(*words, "--out", tmp_path / scale, "--json", *more)
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        found[scale] = facts, Path(facts["files"]["2"][0]).read_bytes()
    assert found["none"][1] == found["1"][1] != found["4"][1]
    assert found["4"][0]["nfe"]["2"] == 2 * found["1"][0]["nfe"]["2"]
    assert [found[scale][0]["control_guidance"] for scale in ("none", "1", "4")] == [1, 1, 4]


def test_guidance_by_controls_that_are_not_there_is_refused(told_model: Path, small_model: Path, actions: Path) -> None:
    words = ["--control-guidance", "2"]
    for command, sentence in (
        (["sample", "a", "--model", told_model], "nothing asks for it: give --controls with it"),
        (["sample", "a", "--model", small_model, "--controls", actions], "this model is told none"),
        (["evaluate", "--model", small_model, "--data", CARD, "--prompts", 2], "is told no controls: leave it out"),
    ):
        result = call(*command, *words)
        assert isinstance(result.exception, UserError) and sentence in str(result.exception), result.output
    with pytest.raises(UserError, match=r"sampling.control_guidance_scale=2: this network is told no controls"):
        assemble(load_recipe("forward/tiny", overrides=[f"model.weights={small_model}", *SCALE]))


def test_evaluate_guides_by_controls_and_says_so(told_model: Path, small_causal_model: Path, tmp_path: Path) -> None:
    """Of two models the one that is told controls."""
    words = ["evaluate", "--model", told_model, "--against", small_causal_model, "--data", CARD, "--prompts", 2]
    result = call(*words, "--steps", "1", "--seeds", "0", "--control-guidance", 3, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    before, after = json.loads(result.stdout)["curves"]
    assert (before["control_guidance_scale"], after["control_guidance_scale"]) == (1, 3)
    assert after["rows"][0]["nfe"] == 2 * before["rows"][0]["nfe"]
    assert "control guidance 3 against no controls" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("model", ["anyflow-wan2.1-t2v-1.3b", "anyflow-far-wan2.1-1.3b"])
def test_the_dry_run_of_a_released_model_builds_its_controls(
    small_model: Path, small_causal_model: Path, model: str
) -> None:
    """A small stand-in for the weights; LoRA trains what embeds the controls in full beside it."""
    weights = small_causal_model if "far" in model else small_model
    options = [f"model.weights={weights}", f"model.codec={weights}", "model.lora.rank=2", "model.network={}"]
    options += ["data.frames=17", "data.height=64", "data.width=96", "data.precompute=false", "hardware.strategy=auto"]
    options += ["hardware.devices=1", "data.global_batch=2", "sampling.prompts=0", "hardware.compile=false"]
    result = call("train", "finetune/robotics-control", "--model", model, "--hardware", "cpu", "--dry-run", *options)
    assert result.exit_code == 0, result.output
    assert "batch       controls [2, 17, 4] float32" in result.output
    assert "controls    actions: 4 numbers a frame; " in result.output


def test_a_model_is_guided_as_its_recipe_says(told_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recipe = load_recipe("finetune/driving-control", overrides=["sampling.control_guidance_scale=2"])
    save_recipe(recipe, run / "recipe.yaml")
    (run / "model").symlink_to(told_model)
    assert way_of(str(run / "model"))[1] == Guidance(control=2.0)
    assert way_of(str(run / "model"), control=1.0)[1] == Guidance()


@pytest.fixture
def probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where probes of controls lie, small ones that learn from a few clips."""
    monkeypatch.setattr(control_probe, "MOST_CLIPS", 8)
    monkeypatch.setattr(control_probe, "ControlProbeSettings", partial(ControlProbeSettings, channels=(8,)))
    monkeypatch.setitem(control_probe.control_probe_of.__kwdefaults__, "root", tmp_path / "probes")
    return tmp_path / "probes"


def test_controls_are_read_back_where_they_can_be(
    told_model: Path, small_causal_model: Path, probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe that has hardly learnt is left out in words; it is kept, and trained once."""
    words = ["evaluate", "--data", CARD, "--prompts", 2, "--steps", "1", "--seeds", "0", "--encoder", "controls"]
    result = call(*words, "--model", told_model, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    [probe] = [path for path in probes.iterdir() if path.is_dir()]
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "actions.speed (" in text and "actions.heading (" in text
    reached = json.loads((probe / "probe.json").read_text())["reached"]
    row = json.loads(result.stdout)["curves"][0]["rows"][0]
    assert ("control_correlation" in row) is any(share is not None and share >= 0.9 for share in reached)
    monkeypatch.setattr(control_probe, "train_control_probe", None)
    again = call(*words, "--model", told_model, "--against", small_causal_model, "--out", tmp_path / "more", "--json")
    assert again.exit_code == 0, again.output
    none = call(*words, "--model", small_causal_model, "--out", tmp_path / "none", "--json")
    assert none.exit_code == 0, none.output
    assert "is told no controls, so there is nothing to read back" in (tmp_path / "none" / "table.txt").read_text()


def test_two_models_that_are_told_different_controls_are_read_back_each_by_its_own(
    told_model: Path, small_causal_model: Path, probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_probe, "TRUSTED", -1.0)  # so that what hardly learnt is read, too
    other = export_told(tmp_path / "model", small_causal_model, ["driving.actions", "trajectory"])
    words = ["evaluate", "--data", CARD, "--prompts", 2, "--steps", "1", "--seeds", "0", "--encoder", "controls"]
    result = call(*words, "--model", told_model, "--against", other, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert all("control_correlation" in curve["rows"][0] for curve in json.loads(result.stdout)["curves"])
    assert len([path for path in probes.iterdir() if path.is_dir()]) == 2
