"""The arithmetic of a step's time, against counted operations."""

from __future__ import annotations

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
    monkeypatch.setattr(speed, "TEXT_TOKENS", 14)  # words of the benchmark's prompts
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
        ("hardware.keep_attention=true", (0.8, 0.95)),
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


def test_rollouts_chunk_by_chunk_are_not_guessed() -> None:
    recipe = load_recipe("onpolicy/far-wan2.1-1.3b")
    assert speed.step_operations(recipe, transformer_config_of(recipe), latent_shape(recipe)) is None
