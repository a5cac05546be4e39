"""Guided samples through the commands: a teacher, plain Wan, and models that have guidance in their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import as_wan
from typer.testing import CliRunner

from anyflow.backbone.guidance import Guidance, Guided
from anyflow.backbone.load import GUIDANCE_KEYS, read_guidance, read_sampler
from anyflow.cli.main import app
from anyflow.data.decode import ClipShape
from anyflow.errors import UserError
from anyflow.evaluation import models
from anyflow.evaluation.models import way_of
from anyflow.recipe import load_recipe, save_recipe

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PROMPT = "A green car drives slowly."


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """``(scale, tokens of the negative prompt)`` of every guided call."""
    found: list[tuple[float, int]] = []
    call = Guided.__call__

    def watch(self: Guided, *arguments: Any, **view: Any) -> Any:
        found.append((self.scale, int(self.negative.lengths[0])))
        return call(self, *arguments, **view)

    monkeypatch.setattr(Guided, "__call__", watch)
    return found


def remade(model: Path, folder: Path, **scheduler: Any) -> Path:
    """A copy of a model whose export says more of how it is sampled."""
    shutil.copytree(model, folder)
    place = folder / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **scheduler}))
    return folder


@pytest.fixture
def teacher(small_model: Path, tmp_path: Path) -> Path:
    """What the teacher stage exports."""
    own = dict(zip(GUIDANCE_KEYS, (1.5, "A blue car is ahead."), strict=True))
    return remade(small_model, tmp_path / "teacher", anyflow_sampler="euler", **own)


@pytest.fixture
def wan(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plain Wan pipeline, small, that the hub gives for Wan2.1's name."""
    folder = as_wan(remade(small_model, tmp_path / "wan"))
    monkeypatch.setattr("anyflow.backbone.files._download", lambda name, parts: folder)
    return folder


def call(*words: str) -> Any:
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_what_has_guidance_in_its_weights_is_asked_once(small_model: Path, tmp_path: Path, asked: list[Any]) -> None:
    """Catches guidance by default of an any-step model, of the baselines and of what is guided by a recipe's value."""
    assert way_of(str(small_model)) == ("flowmap", Guidance())
    assert way_of("data/models/tiny") == ("flowmap", Guidance())
    baseline = remade(small_model, tmp_path / "baseline", anyflow_sampler="renoise")
    assert way_of(str(baseline)) == ("renoise", Guidance())
    assert way_of(str(small_model), sampler="euler")[1] == Guidance(), "asked for its velocity, it is guided still"
    told = call("sample", PROMPT, "--model", str(small_model), "--steps", "1,2", "--out", str(tmp_path / "out"))
    assert (told["guidance"], told["nfe"], asked) == (1.0, {"1": 1, "2": 2}, [])


def test_a_teacher_is_sampled_as_its_export_says(teacher: Path, tmp_path: Path, asked: list[Any]) -> None:
    words = ["sample", PROMPT, "--model", str(teacher), "--steps", "1,2", "--out"]
    told = call(*words, str(tmp_path / "own"))
    tokens = asked[0][1]
    assert (told["guidance"], told["nfe"]) == (1.5, {"1": 2, "2": 4}) and asked == [(1.5, tokens)] * 3
    asked.clear()
    other = call(*words, str(tmp_path / "other"), "--guidance", "4", "--negative", "")
    assert (other["guidance"], asked) == (4.0, [(4.0, asked[0][1])] * 3) and asked[0][1] < tokens
    asked.clear()
    assert call(*words, str(tmp_path / "none"), "--guidance", "1")["nfe"] == {"1": 1, "2": 2} and asked == []
    with pytest.raises(UserError, match="nothing asks for it"):
        call(*words, str(tmp_path / "no"), "--guidance", "1", "--negative", "blurred")


def test_a_teacher_without_the_key_is_sampled_as_its_recipe_says(small_model: Path, tmp_path: Path) -> None:
    """A run from before exports said it: by the recipe beside it; without one, as it was sampled then."""
    run = tmp_path / "run"
    remade(small_model, run / "model", anyflow_sampler="euler")
    assert way_of(str(run)) == ("euler", Guidance())
    save_recipe(load_recipe("teacher/tiny"), run / "recipe.yaml")
    assert way_of(str(run)) == ("euler", Guidance(1.5)) == way_of(str(run / "model"))
    save_recipe(load_recipe("teacher/tiny", overrides=["sampling.guidance_scale=2"]), run / "recipe.yaml")
    assert way_of(str(run))[1].scale == 2.0
    with pytest.raises(UserError, match="export it again"):
        read_guidance(remade(run / "model", tmp_path / "odd", **{GUIDANCE_KEYS[0]: "much"}))


def test_to_guide_what_is_guided_is_told(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert way_of(str(small_model), scale=3.0, negative="still")[1] == Guidance(3.0, "still")
    assert "guides it twice" in capsys.readouterr().err
    way_of(str(small_model), scale=1.0)
    assert capsys.readouterr().err == ""


def test_the_export_keeps_it(teacher: Path, small_model: Path, tmp_path: Path) -> None:
    """Rewritten by ``anyflow export``; and nothing is added to what has guidance in its weights."""
    call("export", str(teacher), "--to", str(tmp_path / "again"))
    assert read_sampler(tmp_path / "again") == "euler"
    assert read_guidance(tmp_path / "again") == Guidance(1.5, "A blue car is ahead.")
    assert "guidance 1.5 against the negative prompt" in (tmp_path / "again" / "README.md").read_text()
    call("export", str(small_model), "--to", str(tmp_path / "any-step"))
    scheduler = json.loads((tmp_path / "any-step" / "scheduler" / "scheduler_config.json").read_text())
    assert not [key for key in scheduler if key.startswith("anyflow")]
    assert "guidance_scale` at 1" in (tmp_path / "any-step" / "README.md").read_text()


def test_a_curve_counts_both_calls(teacher: Path, small_model: Path, tmp_path: Path, asked: list[Any]) -> None:
    """And of two models the one without guidance is guided alone."""
    words = ["evaluate", "--data", "driving", "--steps", "1,2", "--prompts", "2", "--seeds", "0"]
    words += ["--model", str(small_model), "--against", str(teacher), "--guidance", "3", "--out", str(tmp_path / "out")]
    before, after = call(*words)["curves"]
    assert [row["nfe"] for row in before["rows"]] == [2, 4] and [row["nfe"] for row in after["rows"]] == [1, 2]
    assert (before["guidance_scale"], after["guidance_scale"]) == (3.0, 1.0)
    assert {scale for scale, _ in asked} == {3.0}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "guidance 3 → 1" in table and "| 2 → 1, " in table and "| 4 → 2, " in table


def test_a_causal_teacher_is_guided_chunk_by_chunk(small_causal_model: Path, tmp_path: Path) -> None:
    """3 chunks of 2 steps and 2 looks back, each asked twice."""
    own = dict(zip(GUIDANCE_KEYS, (2.0, ""), strict=True))
    folder = remade(small_causal_model, tmp_path / "causal", anyflow_sampler="euler", **own)
    told = call("sample", PROMPT, "--model", str(folder), "--steps", "2", "--out", str(tmp_path / "out"))
    assert told["nfe"] == {"2": 2 * (3 * 2 + 2)}


def test_plain_wan_is_sampled_as_its_recipe_says(wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Euler steps of the trained shift, guidance of the released recipe, Wan's negative prompt; a folder that no recipe
    knows has what recipes have by default."""
    recipe = load_recipe("teacher/wan2.1-t2v-1.3b", overrides=["data.card=driving"])
    assert way_of(WAN) == ("euler", Guidance(3.0, recipe.model.negative_prompt)) and recipe.sampled_guidance == 3.0
    assert len(recipe.model.negative_prompt) > 100 and capsys.readouterr().err == ""
    assert models.shift_of(WAN) == recipe.model.shift == 5.0
    assert way_of(str(wan)) == ("euler", Guidance(3.0)) and models.shift_of(str(wan)) == 3.0
    call("export", WAN, "--to", str(tmp_path / "as-flow-map"))
    assert way_of(str(tmp_path / "as-flow-map"))[1] == Guidance(3.0, recipe.model.negative_prompt)


def test_the_papers_reference_is_one_command(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VBench of Wan2.1 at N steps and 2 N calls, here small and at 2; settings that make other videos are refused."""
    monkeypatch.setattr(models, "native_shape", lambda model, **_: ClipShape(5, 32, 48, 8.0))
    info, out = tmp_path / "info.json", tmp_path / "wan-vbench"
    info.write_text(json.dumps([{"prompt_en": "a dog.", "dimension": ["color"]}]))
    words = ["vbench", "--model", WAN, "--info", str(info), "--dimensions", "color", "--samples", "1"]
    told = call(*words, "--steps", "2", "--out", str(out))
    assert (told["guidance"], told["nfe"]) == (3.0, {"2": 4})
    assert call(*words, "--steps", "2", "--out", str(out))["nfe"] == {"2": 4}, "also when nothing is left to sample"
    with pytest.raises(UserError, match="another guidance"):
        call(*words, "--steps", "2", "--out", str(out), "--guidance", "5")
    _, backbone, shift = models.load_model(WAN)
    assert (way_of(WAN)[1].calls * backbone.calls_of(50, 21), shift) == (100, 5.0)


def test_a_folder_of_unguided_videos_is_not_mixed_with_guided_ones(teacher: Path, tmp_path: Path) -> None:
    """One from before there was guidance goes on without, and with it is refused."""
    info, out = tmp_path / "info.json", tmp_path / "out"
    info.write_text(json.dumps([{"prompt_en": "a dog.", "dimension": ["color"]}]))
    words = ["vbench", "--model", str(teacher), "--info", str(info), "--dimensions", "color", "--samples", "1"]
    words += ["--steps", "1", "--out", str(out)]
    call(*words, "--guidance", "1")
    settings = json.loads((out / "settings.json").read_text())
    del settings["guidance"], settings["nfe"]
    (out / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="another guidance"):
        call(*words)
    assert call(*words, "--guidance", "1")["guidance"] == 1.0


def test_rows_are_of_both_questions(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two calls where one of twice the rows does, or a network that is not asked at all."""
    rows: list[int] = []
    load = models.load_model

    def watched(model: str, *precision: str) -> Any:
        codec, backbone, shift = load(model, *precision)
        backbone.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
        return codec, backbone, shift

    monkeypatch.setattr(models, "load_model", watched)
    with torch.no_grad():
        call("sample", PROMPT, "And another.", "--model", str(teacher), "--steps", "3", "--out", str(tmp_path / "out"))
    assert rows == [4] * 3


@pytest.mark.slow
def test_a_training_of_a_teacher_is_measured_and_exported_guided(
    small_model: Path, tmp_path: Path, anyflow: Any
) -> None:
    """The curves before and after, the report, and what is exported are of two calls a step."""
    settings = {
        "stage.steps": 1,
        "model.init": "weights",
        "model.weights": small_model,
        "model.codec": small_model,
        "model.negative_prompt": "A blue car is ahead.",
        "data.card": "driving",
        "data.global_batch": 1,
        "data.precompute": "false",
        "optimizer.warmup_steps": 0,
        "ema.decay": 0,
        "sampling.prompts": 2,
        "sampling.steps": "[1,2]",
        "run.tracking_uri": "",
    }
    run = tmp_path / "run"
    words = [f"{key}={value}" for key, value in settings.items()]
    done = anyflow("train", "teacher/tiny", *words, "--out", str(run), timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "report" / "curve.json").read_text())
    for label in ("before", "after"):
        assert [row["nfe"] for row in found[label]["rows"]] == [2, 4] and found[label]["guidance_scale"] == 1.5
    assert read_guidance(run) == Guidance(1.5, "A blue car is ahead.") == way_of(str(run))[1]
    call("export", str(run), "--to", str(tmp_path / "elsewhere"))
    assert way_of(str(tmp_path / "elsewhere")) == ("euler", Guidance(1.5, "A blue car is ahead."))
