"""The released chain, small: teacher, forward and on-policy by the shipped recipes, each finding the run before it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.load import load_backbone
from anyflow.backbone.lora import load_lora, merged_state
from anyflow.flowmap.chunks import layout_of
from anyflow.recipe import Recipe, load_recipe
from anyflow.tracking.checkpoints import latest_checkpoint
from anyflow.tracking.runs import RunFolder
from anyflow.training.assemble import Parts, assemble
from anyflow.training.callbacks.sharded import read_checkpoint
from anyflow.training.launch import train

FAR = "transformer.far_patch_embedding"
SMALL = (
    *("data.card=driving", "data.global_batch=2", "data.batch_size=2", "data.num_workers=0", "data.fps=0"),
    *("data.frames=17", "data.height=32", "data.width=32", "data.precompute=false"),
    *("hardware.accelerator=cpu", "hardware.devices=1", "hardware.strategy=auto", "hardware.precision=32-true"),
    "hardware.compile=false",
    *("model.lora.rank=4", "model.network.chunk_partition=[1,2,2]", "model.network.full_chunk_limit=2"),
    *("sampling.prompts=0", "sampling.every_steps=0", "checkpoint.every_steps=1", "run.tracking_uri="),
    *("optimizer.lr=1e-2", "optimizer.warmup_steps=0", "ema.decay=0.5", "ema.start_step=0"),
    *("stage.long_context=1.0", "stage.onpolicy.budgets=[4]"),
)


def recipe_of(name: str, base: Path, *more: str) -> Recipe:
    return load_recipe(name, overrides=[*SMALL, f"model.weights={base}", *more])


@pytest.fixture(scope="module")
def chain(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which teacher and causal forward stage have run as their recipes' first lines say."""
    place = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for stage, name in (("teacher", "wan2.1-t2v-1.3b"), ("forward", "far-wan2.1-1.3b")):
            recipe = recipe_of(f"{stage}/{name}", small_model, "stage.steps=3", "checkpoint.keep=9")
            assert train(recipe, out=Path("runs") / recipe.run.name, resume="auto") == 0
    return place


def weights(run: Path) -> dict[str, Tensor]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return torch.load(path, weights_only=True)["state_dict"]


def averages(parts: Parts) -> dict[str, Tensor]:
    """The average of each trained weight, by its name in the transformer."""
    named = [name for name, weight in parts.backbone.transformer.named_parameters() if weight.requires_grad]
    assert parts.stage.ema is not None
    return dict(zip(named, parts.stage.ema.shadows, strict=True))


@torch.no_grad()
def test_the_patch_embedding_is_trained_saved_averaged_and_exported(chain: Path, small_model: Path) -> None:
    """A causal LoRA run moves it; what is exported, merged and beside the adapter, is its average."""
    run = chain / "runs" / "far-wan2.1-1.3b-forward"
    saved = weights(run)
    start = load_backbone(small_model, architecture="causal").transformer.far_patch_embedding
    own = saved[f"backbone.{FAR}.lora_full.default.weight"]
    assert f"backbone.{FAR}.lora_full.default.bias" in saved and f"backbone.{FAR}.base_layer.weight" not in saved
    assert (own - start.weight).abs().max() > 1e-3
    recipe = load_recipe(str(run))
    parts = assemble(recipe)
    parts.stage.load_state_dict(saved, strict=False)
    average = averages(parts)["far_patch_embedding.lora_full.default.weight"]
    assert not torch.equal(average, own) and not torch.equal(average, start.weight)
    assert torch.equal(load_file(run / "lora" / "full_weights.safetensors")["far_patch_embedding.weight"], average)
    exported = load_backbone(run).transformer.far_patch_embedding.weight
    assert torch.equal(exported, average.bfloat16().float())


def test_it_is_resumed_bitwise(chain: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the checkpoint of its first step, optimiser state and average included."""
    monkeypatch.chdir(tmp_path)
    whole, again = chain / "runs" / "far-wan2.1-1.3b-forward", tmp_path / "again"
    again.mkdir()
    shutil.copy(whole / "recipe.yaml", again)
    (again / "checkpoints").mkdir()
    first = sorted((whole / "checkpoints").glob("step_*"))[0]
    shutil.copytree(first, again / "checkpoints" / first.name)
    (again / "checkpoints" / "latest").write_text(first.name + "\n")
    assert RunFolder(again).checkpoint is not None
    assert train(load_recipe(str(again)), out=again, resume="auto") == 0
    one, two = weights(whole), weights(again)
    assert one.keys() == two.keys() and not [name for name in one if not torch.equal(one[name], two[name])]


def question(frames: int) -> tuple[Tensor, Tensor, Tensor, Conditions]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, frames, 16, 4, 4, generator=generator)
    t = torch.full((1, frames), 700.0)
    return latents, t, t * 0.5, Conditions(Text(torch.randn(1, 4, 64, generator=generator), torch.tensor([3]), 8))


@torch.no_grad()
def test_on_policy_starts_where_the_runs_before_ended(
    chain: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is the forward run's average, teacher and critic the teacher run's, on one base; then it trains."""
    monkeypatch.chdir(chain)
    recipe = recipe_of("onpolicy/far-wan2.1-1.3b", small_model, "stage.steps=1")
    stage: Any = assemble(recipe).stage
    layout = layout_of((1, 2, 2), 2)

    def network(run: str) -> Any:
        backbone = load_backbone(small_model, architecture="causal")
        load_lora(backbone, f"runs/{run}")
        return backbone

    student, teacher = network("far-wan2.1-1.3b-forward"), network("wan2.1-t2v-1.3b-teacher")
    base = load_backbone(small_model, architecture="causal")
    views: list[tuple[int, dict[str, Any]]] = [(5, {}), (layout.num_frames, {"layout": layout})]
    for frames, view in views:
        asked = question(frames)
        expected = student(*asked, **view)
        assert torch.equal(stage.roles("student", *asked, **view), expected)
        taught = teacher(*asked, **view)
        for role in ("teacher", "critic"):
            torch.testing.assert_close(stage.roles(role, *asked, **view), taught)
        answers = [expected, taught, base(*asked, **view)]
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(answers, answers[1:] + answers[:1], strict=True))
    names = {name for name, _ in stage.roles.parameters("student")}
    assert f"{FAR}.lora_full.default.weight" in names and not stage.roles.parameters("teacher")
    with torch.enable_grad():
        assert train(recipe, out=Path("runs") / recipe.run.name, resume="auto") == 0
    moved = load_file(Path("runs") / recipe.run.name / "lora" / "full_weights.safetensors")
    before = merged_state(student.transformer)["far_patch_embedding.weight"]
    assert not torch.equal(moved["far_patch_embedding.weight"], before)


def test_without_the_run_before_it_is_one_sentence(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anyflow.errors import UserError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"model.lora.start='runs/far-wan2.1-1.3b-forward' does not exist.*makes it first"
    ):
        train(recipe_of("onpolicy/far-wan2.1-1.3b", small_model))


@pytest.mark.slow
def test_two_ranks_start_from_the_runs_before(chain: Path, small_model: Path, project: Path, tmp_path: Path) -> None:
    """As on 8 GPUs: a bfloat16 base read part by part, on it the float32 adapters, and what is trained in full."""
    out = tmp_path / "two"
    spread = ("hardware.devices=2", "hardware.strategy=fsdp", "hardware.precision=bf16-mixed", "data.batch_size=1")
    still = ("optimizer.lr=1e-12", "stage.onpolicy.critic.lr=1e-12", "stage.steps=1", f"model.weights={small_model}")
    words = ["train", "onpolicy/far-wan2.1-1.3b", *SMALL, *spread, *still, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "anyflow", *words],
        cwd=chain,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    path = latest_checkpoint(out / "checkpoints")
    assert path is not None
    saved = read_checkpoint(path)["state_dict"]
    student = load_backbone(small_model, architecture="causal")
    load_lora(student, chain / "runs" / "far-wan2.1-1.3b-forward")
    started = {f"backbone.{name}": weight for name, weight in student.named_parameters() if weight.requires_grad}
    assert any(".lora_full." in name for name in started)
    for name, weight in started.items():
        assert saved[name].dtype == torch.float32
        torch.testing.assert_close(saved[name], weight.detach(), rtol=0, atol=1e-9)
    full = load_file(out / "lora" / "full_weights.safetensors")
    start = load_file(chain / "runs" / "far-wan2.1-1.3b-forward" / "lora" / "full_weights.safetensors")
    for name, weight in start.items():
        torch.testing.assert_close(full[name], weight, rtol=0, atol=1e-9)
