"""The arithmetic of a step's time, against counted operations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anyflow.memory import speed
from anyflow.memory.need import latent_shape, transformer_config_of
from anyflow.recipe import Recipe, load_recipe


def operations(recipe: Recipe) -> float:
    found = speed.step_operations(recipe, transformer_config_of(recipe), latent_shape(recipe))
    assert found is not None
    return found


@pytest.mark.parametrize("stage", ["forward", "on-policy"])
def test_operations_are_those_that_are_counted(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a pass too many, a backward pass of the wrong size, attention that is counted twice."""
    from experiments.bench import order

    name, model, clips = order.STAGES[stage]
    counted = order._stepper(name, model, clips, order.nullcontext)(counted=True)
    monkeypatch.setattr(speed, "USUAL_TEXT", 14)  # words of the benchmark's prompts
    overrides = [f"data.global_batch={clips}", f"data.batch_size={clips}", "stage.guidance_scale=3"]
    recipe = load_recipe(name, model=model, overrides=[*overrides, "stage.onpolicy.budgets=[16]"])
    passes = speed.passes_of(recipe)
    assert passes is not None
    expected = clips * (passes.without_gradient + passes.with_gradient)
    assert counted["passes"] == pytest.approx(expected, rel=0.1), "but for what was drawn: dropped texts, jumps"
    assert operations(recipe) / expected == pytest.approx(counted["flops"] / counted["passes"], rel=0.05)


@pytest.mark.parametrize(
    "change, factor",
    [
        ("data.global_batch=64", (2.0, 2.0)),
        ("hardware.keep_attention=false", (1.05, 1.25)),
        ("model.lora.enabled=false", (0.9, 1.3)),
        ("data.frames=161", (3.0, 4.0)),
        ("stage.diffusion_share=0.75", (0.8, 0.95)),
    ],
)
def test_what_changes_the_work_changes_the_figure(change: str, factor: tuple[float, float]) -> None:
    plain = operations(load_recipe("forward/wan2.1-t2v-1.3b"))
    changed = operations(load_recipe("forward/wan2.1-t2v-1.3b", overrides=[change]))
    assert factor[0] <= changed / plain <= factor[1]


def test_seconds_are_of_all_gpus() -> None:
    assert speed.step_seconds(1e18, 1, "H100") == pytest.approx(8 * speed.step_seconds(1e18, 8, "H100"))


def test_the_page_has_the_figures_of_now(project: Path) -> None:
    """docs/hardware.md: seconds a step, steps, hours and GPU hours of every row."""
    page = (project / "docs" / "hardware.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in page.splitlines() if re.search(r"\| \d+ x (RTX|H100|L40S)", line)]
    assert len(rows) > 8
    for _, written, device, clips, seconds, steps, hours, gpu_hours in rows:
        words = " ".join(re.findall("`([^`]*)`", written)).split()
        named = {words[i].strip("-"): words[i + 1] for i in range(len(words)) if words[i].startswith("--")}
        overrides = [word for word in words if "=" in word]
        recipe = load_recipe(words[0], model=named.get("model"), hardware=named.get("hardware"), overrides=overrides)
        count, gpu = device.split("(")[0].strip().split(" x ")
        told = [float(cell) for cell in (clips, steps, seconds, hours, gpu_hours)]
        took = speed.step_seconds(operations(recipe), recipe.world_size, gpu)
        whole = took * recipe.total_steps / 3600
        assert recipe.world_size == int(count)
        expected = [recipe.global_batch, recipe.total_steps, took, whole, whole * int(count)]
        assert told == pytest.approx(expected, rel=0.03, abs=0.6), (written, expected)


def test_rollouts_chunk_by_chunk_are_not_guessed() -> None:
    recipe = load_recipe("onpolicy/far-wan2.1-1.3b")
    assert speed.step_operations(recipe, transformer_config_of(recipe), latent_shape(recipe)) is None
