"""Every shipped large recipe has the settings of the released run, but for what its own comments name.

The tables are of the ten training configurations that NVIDIA published with AnyFlow (arXiv 2605.13724; the repository
NVlabs/AnyFlow, ``options/train/anyflow``), and of the paper where those are silent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow.backbone.layout import PUBLISHED
from anyflow.backbone.load import GATE
from anyflow.memory.codec import _config
from anyflow.memory.need import (
    UMT5_XXL_WEIGHTS,
    WAN22_VAE_WEIGHTS,
    codec_bytes,
    latent_shape,
    transformer_config_of,
)
from anyflow.recipe import Recipe, list_recipes, load_recipe
from anyflow.recipe.fields import all_fields, value_of
from anyflow.training.assemble import lora_settings

SIZES = {"1.3b": {"steps": 6000, "batch": 32, "a_gpu": 2}, "14b": {"steps": 4000, "batch": 16, "a_gpu": 1}}
"""Of the teacher and forward stages; the batch is in the files' names (b32, b16), a GPU's share in the loader's."""

NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
BLOCKS = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"]
EMBEDDERS = [f"{name}.linear_{number}" for name in ("time_embedder", "delta_embedder") for number in (1, 2)]

EVERYWHERE: dict[str, Any] = {
    "model.shift": 5.0,
    "model.init": "weights",
    "model.negative_prompt": NEGATIVE,
    "model.lora.enabled": True,
    "model.lora.rank": 256,
    "model.lora.alpha": 256.0,
    "model.lora.dropout": 0.0,
    "stage.text_drop": 0.1,
    "stage.i2v_prob": 0.0,
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "constant",
    "optimizer.clip": 1.0,
    "data.frames": 81,
    "data.height": 480,
    "data.width": 832,
    "data.buckets": [],
}
PRETRAINED: dict[str, Any] = {
    "model.lora.start": "",
    "optimizer.lr": 5e-5,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.warmup_steps": 1000,
    "ema.decay": 0.999,
    "ema.start_step": 1000,
}
FLOW_MAP: dict[str, Any] = {
    "model.lora.targets": [*BLOCKS, *EMBEDDERS],
    "stage.guidance_scale": 3.0,  # fuse_guidance_scale
    "stage.guided_tangent": False,
    "stage.derivative": "central",
    "stage.delta": 5.0,  # epsilon
    "stage.weight": "beta08",
    "stage.rebalance": True,
    "stage.diffusion_share": 0.5,
    "stage.consistency_share": 0.25,
}
ON_POLICY: dict[str, Any] = {
    "stage.steps": 1200,
    "optimizer.lr": 2e-6,
    "optimizer.betas": [0.0, 0.999],
    "optimizer.warmup_steps": 0,
    "ema.decay": 0.99,
    "ema.start_step": 200,
    "stage.onpolicy.budgets": [2, 4, 8, 16, 50],
    "stage.onpolicy.extra_guidance": 3.0,  # real_guidance_scale
    "stage.onpolicy.forward_weight": 1.0,  # against a dmd_weight of 1
    "stage.onpolicy.critic_turns": 1,
    "stage.onpolicy.critic.name": "adamw",
    "stage.onpolicy.critic.lr": 2e-6,
    "stage.onpolicy.critic.betas": [0.0, 0.999],
    "stage.onpolicy.critic.weight_decay": 0.0,
    "stage.onpolicy.critic.warmup_steps": 0,
    "stage.onpolicy.critic.schedule": "constant",
    "stage.onpolicy.critic.clip": 1.0,
}
CHUNKS = {"chunk_partition": [1, 3, 3, 3, 3, 3, 3, 2], "full_chunk_limit": 3, "compressed_patch_size": [1, 4, 4]}

DELIBERATE = {
    "onpolicy/*": {"stage.onpolicy.budgets": ([1, 2, 4, 8, 16, 50], "The released budgets are [2, 4, 8, 16, 50]")},
}
"""Where we differ on purpose: what is set, and the words of the recipe's comments that say so."""

STAGES = ("teacher", "forward", "onpolicy")
WITH_WAN = [f"{stage}/{name}" for stage in STAGES for name in list_recipes()[stage] if "wan" in name]
LARGE = [name for name in WITH_WAN if "wan2.1" in name]
UNPUBLISHED = [name for name in WITH_WAN if "wan2.1" not in name]
PUBLISHED_RUNS = [
    *(f"teacher/wan2.1-t2v-{size}" for size in SIZES),
    *(f"{stage}/{kind}-{size}" for stage in STAGES[1:] for kind in ("far-wan2.1", "wan2.1-t2v") for size in SIZES),
]


def released(name: str) -> dict[str, Any]:
    """The settings of the published run that a recipe stands for."""
    stage, _, model = name.partition("/")
    size, is_causal = model.rpartition("-")[2], model.startswith("far-")
    run = SIZES[size]
    found = EVERYWHERE | {
        "model.weights": f"Wan-AI/Wan2.1-T2V-{size.upper()}-Diffusers",
        "model.architecture": "causal" if is_causal else "bidirectional",
        "data.batch_size": run["a_gpu"],
    }
    if stage == "onpolicy":
        # a teacher sees all frames at once: a causal student has the same as the other
        places = {
            "model.lora.start": f"runs/{model}-forward",
            "stage.onpolicy.teacher": f"runs/wan2.1-t2v-{size}-teacher",
        }
        found |= FLOW_MAP | ON_POLICY | places
    else:
        found |= PRETRAINED | {"stage.steps": run["steps"]}
        found |= FLOW_MAP if stage == "forward" else {"model.lora.targets": BLOCKS}
    if is_causal:
        found |= {"stage.long_context": 0.5, "stage.bidirectional_prob": 0.0 if stage == "onpolicy" else 0.1}
        found |= {"model.network": CHUNKS}
    return found


def deliberate(name: str) -> dict[str, tuple[Any, str]]:
    return {**DELIBERATE.get(f"{name.partition('/')[0]}/*", {}), **DELIBERATE.get(name, {})}


def comments(name: str, project: Path) -> str:
    lines = (project / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.partition("#")[2].strip() for line in lines if "#" in line)


def test_every_published_run_is_shipped_and_nothing_else_says_so() -> None:
    assert sorted(LARGE) == sorted(PUBLISHED_RUNS)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_is_the_released_run(name: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that sets, or leaves to a default, anything else than the published run has it in its comments."""
    monkeypatch.chdir(project)
    recipe, wanted, ours = load_recipe(name), released(name), deliberate(name)
    differing = {key for key, value in wanted.items() if value_of(recipe, key) != value}
    assert differing == ours.keys()
    for key, (value, words) in ours.items():
        assert value_of(recipe, key) == value and words in comments(name, project), key
    assert recipe.global_batch == SIZES[name.rpartition("-")[2]]["batch"]
    assert GATE == 0.25
    assert "the settings of the released run" in comments(name, project)


@pytest.mark.parametrize("name", LARGE)
def test_what_is_trained_is_what_the_release_trains(name: str) -> None:
    """``param_names_to_optimize``: adapters, and of causal networks far_patch_embedding."""
    settings = lora_settings(load_recipe(name))
    assert settings.full == (("far_patch_embedding",) if "/far-" in name else ())


@pytest.mark.parametrize(
    ("architecture", "full", "found"),
    [
        ("causal", "[released]", ("far_patch_embedding",)),
        ("causal", "", ()),
        ("causal", "[released,norm_q]", ("far_patch_embedding", "norm_q")),
        ("bidirectional", "[released]", ()),
        ("bidirectional", "proj_out", ("proj_out",)),
    ],
)
def test_the_field_of_modules_trained_in_full(architecture: str, full: str, found: tuple[str, ...]) -> None:
    options = [f"model.architecture={architecture}", f"model.lora.full={full}", "model.lora.enabled=true"]
    assert lora_settings(load_recipe("finetune/driving", overrides=options)).full == found


@pytest.mark.parametrize("name", LARGE)
def test_a_plan_knows_the_network(name: str) -> None:
    """From its name alone: nothing is downloaded, and the folders of the runs before need not be there."""
    recipe = load_recipe(name)
    config = transformer_config_of(recipe)
    assert config == {**PUBLISHED[name.rpartition("-")[2]], **(CHUNKS if "/far-" in name else {})}


TI2V_5B = {
    "model.weights": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "data.frames": 121,
    "data.height": 704,
    "data.width": 1280,
    "data.fps": 24.0,
}
"""Where the recipes of Wan 2.2's 5B differ from those of Wan 2.1's 14B on purpose; what names the model does too."""


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_a_recipe_without_a_published_run_is_that_of_14b_but_for_the_model(name: str, project: Path) -> None:
    """Catches a setting that is lost or changed in one of the copies, and a comment that claims a run."""
    sibling = name.replace("far-wan2.2-ti2v-5b", "far-wan2.1-14b").replace("wan2.2-ti2v-5b", "wan2.1-t2v-14b")
    ours, theirs = load_recipe(name), load_recipe(sibling)
    wanted = dict(TI2V_5B)
    if "/far-" in name:
        wanted["model.network"] = {**CHUNKS, "chunk_partition": [1, *[3] * 10]}
    else:
        wanted["stage.i2v_prob"] = 0.5
        assert "Half of the steps keep the first frame clean" in comments(name, project)
    named = {"model.name", "run.name", "run.recipe", "model.lora.start", "stage.onpolicy.teacher"}
    fields = {key for key in all_fields() if value_of(ours, key) != value_of(theirs, key)} - named
    assert {key: value_of(ours, key) for key in fields} == wanted
    assert "Wan2.1 14B's released run (there is none of this model)" in comments(name, project)
    for key in named:
        there = str(value_of(theirs, key)).replace("far-wan2.1-14b", "far-wan2.2-ti2v-5b")
        assert value_of(ours, key) == there.replace("wan2.1-t2v-14b", "wan2.2-ti2v-5b"), key


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_a_plan_knows_the_newer_network(name: str) -> None:
    recipe = load_recipe(name)
    chunks = recipe.model.network if "/far-" in name else {}
    assert transformer_config_of(recipe) == {**PUBLISHED["ti2v-5b"], **chunks}
    assert latent_shape(recipe) == (31, 48, 44, 80)
    assert json.loads(_config(recipe))["z_dim"] == 48, "clips go through its own autoencoder"
    assert codec_bytes(recipe) == 2 * UMT5_XXL_WEIGHTS + 4 * WAN22_VAE_WEIGHTS


@pytest.mark.parametrize("model", [name for name in list_recipes()["models"] if "wan2.1" in name])
def test_large_models_share_what_the_release_shares(model: str) -> None:
    """The published any-step models are fine-tuned with the schedule, prompt and shape that they were made with."""
    recipe: Recipe = load_recipe("finetune/driving", model=model)
    keys = ("model.shift", "model.negative_prompt", "model.lora.rank", "model.lora.alpha", "data.frames", "data.height")
    assert {key: value_of(recipe, key) for key in keys} == {key: EVERYWHERE[key] for key in keys}
    assert recipe.model.architecture == ("causal" if "far" in model else "bidirectional")
    assert recipe.model.lora.targets == [*BLOCKS, *EMBEDDERS] and recipe.data.width == 832
