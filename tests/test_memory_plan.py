"""The plan: known figures, a simulation that agrees with a real step, and changes that really make it fit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from anyflow.backbone import codec as codec_module
from anyflow.backbone.codec import Codec
from anyflow.backbone.controls import CONFIG_KEY, MODULE, controls_of
from anyflow.backbone.embedded import build_vae
from anyflow.backbone.layout import PUBLISHED
from anyflow.cli.main import app
from anyflow.errors import EXIT_PREEMPTED, UserError
from anyflow.memory import codec as plan_codec
from anyflow.memory import need as planning
from anyflow.memory.changes import changes, with_gpus
from anyflow.memory.codec import _work
from anyflow.memory.need import Need, latent_shape, original_bytes, plan, transformer_config_of, warning
from anyflow.memory.phases import ACTIVATIONS, CLIPS, CODEC, DECODING, ENCODING, GIB, SAMPLING, STEP, WAITING, Memory
from anyflow.memory.simulate import _networks, simulate
from anyflow.recipe import Recipe, list_recipes, load_recipe
from experiments.bench.compare import peak_bytes

FULL = ("model.lora.enabled=false", "ema.decay=0")
SIZE = (5, 16, 16, 24)
NETWORK = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 1024,
    "num_layers": 4,
}


def peak(stage: str, *overrides: str) -> float:
    """GiB of a recipe's step that recomputes attention, unless overrides have another say."""
    recipe = load_recipe(stage, overrides=["hardware.keep_attention=false", *overrides])
    return simulate(recipe, transformer_config_of(recipe), latent_shape(recipe)).peak / GIB


def test_full_training_of_14b_on_8_ranks_is_the_known_figure() -> None:
    assert peak("forward/wan2.1-t2v-14b", *FULL) == pytest.approx(56.4, rel=0.02)


@pytest.mark.slow
def test_on_policy_at_14b_shares_one_base() -> None:
    """Three roles as adapters; three networks would need half as much again, and would not fit 80 GB."""
    kept = "hardware.recompute_jumps=false"
    one = peak("onpolicy/wan2.1-t2v-14b")
    three = peak("onpolicy/wan2.1-t2v-14b", *FULL[:1], "model.lora.start=", "stage.onpolicy.teacher=a/b", kept)
    assert one < 36 and peak("onpolicy/wan2.1-t2v-14b", kept) < 62 and three > 80


@pytest.mark.slow
def test_more_ranks_and_checkpointing_lower_the_peak() -> None:
    stage = "forward/wan2.1-t2v-14b"
    assert peak(stage, *FULL, "hardware.num_nodes=8", "data.global_batch=64") < 45
    assert peak(stage, "hardware.gradient_checkpointing=false") > 2 * peak(stage)
    assert peak(stage) < peak(stage, "hardware.keep_attention=true") < 1.9 * peak(stage)


IN_4_BITS = ("model.lora.base=nf4", "model.lora.rank=32", "model.lora.alpha=32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "model", "gigabytes", "options"),
    [
        ("teacher/wan2.1-t2v-1.3b", None, 24, ("sampling.prompts=0",)),
        ("forward/wan2.1-t2v-1.3b", None, 24, ()),
        ("onpolicy/wan2.1-t2v-1.3b", None, 24, ()),
        ("finetune/driving", "anyflow-wan2.1-t2v-1.3b", 24, ()),
        ("finetune/driving", "anyflow-wan2.1-t2v-14b", 48, IN_4_BITS),
    ],
)
def test_small_cards_hold_what_the_page_says(
    stage: str, model: str | None, gigabytes: float, options: tuple[str, ...]
) -> None:
    recipe = load_recipe(stage, model=model, hardware="small", overrides=options)
    need = plan(recipe, gpu_memory=gigabytes, remedies=False)
    assert need.fits, list(need.lines())
    if options == IN_4_BITS:
        assert not plan(recipe.on_full_base, gpu_memory=gigabytes, remedies=False).fits


LORA = ("model.lora.enabled=true", "model.lora.rank=16", "stage.onpolicy.teacher=")
CHECKPOINTED = "hardware.gradient_checkpointing=true"
REAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "forward": ("finetune/driving", ()),
    "forward, checkpointed": ("finetune/driving", (CHECKPOINTED,)),
    "forward, first frame given": ("finetune/driving", (CHECKPOINTED, "stage.i2v_prob=1.0")),
    "on-policy": ("onpolicy/tiny", (*LORA, CHECKPOINTED)),
    "on-policy, jumps again": ("onpolicy/tiny", (*LORA, CHECKPOINTED, "hardware.recompute_jumps=true")),
    "on-policy, base in 4 bits": ("onpolicy/tiny", (*LORA, CHECKPOINTED, "model.lora.base=nf4")),
    "causal": ("finetune/driving", ("model.architecture=causal", CHECKPOINTED)),
    "causal on-policy": (
        "onpolicy/tiny",
        (*LORA, "model.architecture=causal", CHECKPOINTED, "hardware.recompute_jumps=true"),
    ),
}
SLOW = ("on-policy, jumps again", "causal on-policy")
HEAVIEST = (
    *("data.global_batch=2", "data.batch_size=2", "optimizer.name=adamw"),
    *("stage.diffusion_share=0", "stage.consistency_share=0", "stage.text_drop=0"),
    *("stage.onpolicy.budgets=[50]", "stage.long_context=1.0", "stage.bidirectional_prob=1.0"),
)
"""What the simulation takes for granted: every sample moves, three jumps, the longest layout."""


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in REAL])
def test_the_simulation_agrees_with_a_real_step(case: str) -> None:
    """Bytes that PyTorch's own profiler saw allocated in a step of the real stage on the CPU: within 15 %."""
    name, options = REAL[case]
    recipe = load_recipe(name, overrides=[*HEAVIEST, *options])
    stage, step = real_step(recipe)
    step()
    optimizers = stage.optimizers()
    state = [v for o in optimizers for fields in o.state.values() for v in fields.values()]
    lying = sum(tensor.nbytes for tensor in (*stage.parameters(), *stage.ema.shadows, *state))
    # AdamW makes a weight's state at its first gradient, which these few frames do not give to the far patches
    moved = [weight for o in optimizers for group in o.param_groups for weight in group["params"]]
    lying += sum(2 * weight.nbytes for weight in moved if not any(weight in o.state for o in optimizers))
    real = lying + peak_bytes(step, "cpu")
    simulated = simulate(recipe, NETWORK, SIZE)
    assert simulated.states == pytest.approx(lying, rel=0.01)
    assert simulated.peak == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("options", [(), ("sampling.given_frames=1",), ("model.architecture=causal",)])
def test_the_simulation_agrees_with_a_real_sampling(options: tuple[str, ...]) -> None:
    """The batch of a curve: wrong if it counted one clip, the window of a causal network once, or no activations."""
    from anyflow.backbone.conditions import Conditions, Text
    from anyflow.backbone.load import new_backbone

    recipe = load_recipe("finetune/driving", overrides=[*HEAVIEST, *options])
    backbone = new_backbone(NETWORK, 0, recipe.model.architecture)
    backbone.fit_clip(SIZE[0])
    noise, text = torch.randn(8, *SIZE), Text(torch.randn(8, 513, 64), None, 513)
    given = noise[:, : recipe.sampling.given_frames] if recipe.sampling.given_frames else None
    real = (
        peak_bytes(lambda: backbone.sample(Conditions(text, given), noise, 2, 5.0), "cpu")
        + noise.nbytes
        + text[0].nbytes
    )
    simulated = simulate(recipe, NETWORK, SIZE)
    assert simulated.rows == 8 and simulated.sampling == pytest.approx(real, rel=0.15)
    weights = list(backbone.parameters())
    assert simulated.student == pytest.approx(sum(weight.nbytes for weight in weights), rel=0.01)
    assert simulated.largest == max(weight.nbytes for weight in weights)


def test_the_autoencoder_takes_what_it_is_known_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight clips of 81 x 480 x 832 at once took 46 GiB to encode and 61 to decode; one by one they take an eighth."""
    size, pixels = (81, 480, 832), 81 * 480 * 832
    encode, decode = (work / GIB for work in _work("{}", torch.float32, size, 1))
    assert encode == pytest.approx(46.1 / 8, rel=0.03) and decode == pytest.approx(61.4 / 8, rel=0.03)
    portions = [work / GIB for work in _work("{}", torch.float32, size, 8)]
    assert portions == pytest.approx([encode + 7 * 3 * pixels / GIB, decode + 7 * 3 * pixels / GIB])
    half = _work("{}", torch.bfloat16, size, 1)
    assert half[0] / GIB < 0.6 * encode
    monkeypatch.setattr(codec_module, "PIXELS_AT_ONCE", 8 * pixels)
    plan_codec._pass.cache_clear()
    assert [work / GIB for work in _work("{}", torch.float32, size, 8)] == pytest.approx([46.1, 61.4], rel=0.03)
    plan_codec._pass.cache_clear()


@pytest.mark.parametrize("limit", [codec_module.ONE_PASS_PIXELS, 0], ids=["one pass", "loop"])
def test_the_simulation_agrees_with_a_real_autoencoder(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (codec_module, plan_codec):
        monkeypatch.setattr(place, "ONE_PASS_PIXELS", limit)
    plan_codec._pass.cache_clear()
    codec, video = Codec(build_vae(0)), torch.zeros(3, 21, 64, 96, 3, dtype=torch.uint8)
    simulated = _work('{"of": "embedded"}', torch.float32, (21, 64, 96), 3)
    plan_codec._pass.cache_clear()
    latents = codec.encode_video(video)
    assert simulated[0] == pytest.approx(peak_bytes(lambda: codec.encode_video(video), "cpu"), rel=0.15)
    assert simulated[1] == pytest.approx(peak_bytes(lambda: codec.decode(latents), "cpu"), rel=0.15)


def real_step(recipe: Recipe) -> tuple[Any, Callable[[], None]]:
    """A recipe's stage over the small network, and a whole step of it, both turns of on-policy distillation."""
    from anyflow.backbone.conditions import Text
    from anyflow.backbone.load import StoredWeights, new_backbone
    from anyflow.backbone.lora import add_lora
    from anyflow.backbone.parallelize import checkpoint_activations
    from anyflow.stages.batch import FlowBatch
    from anyflow.stages.onpolicy import correct
    from anyflow.training.assemble import build_stage, lora_settings

    backbone = new_backbone(NETWORK, 0, recipe.model.architecture)
    backbone.fit_clip(SIZE[0])
    if recipe.hardware.gradient_checkpointing:
        checkpoint_activations(backbone)
    backbone.stored = StoredWeights(dict(backbone.transformer.state_dict()), lambda name: torch.float32)
    if recipe.model.lora.enabled:
        add_lora(backbone, lora_settings(recipe, backbone))
    stage: Any = build_stage(recipe, None, backbone)  # type: ignore[arg-type]  (what is encoded needs no codec)
    batch = recipe.data.batch_size
    clean, noise = torch.randn(2, batch, *SIZE)
    text = Text(torch.randn(batch + 1, 513, 64), None, 513)
    data = FlowBatch(clean, noise, text, torch.arange(batch), recipe.stage.i2v_prob > 0)
    stage.report = lambda **metrics: None
    stage.manual_backward = lambda loss, **options: loss.backward(**options)
    configured = stage.configure_optimizers()
    several = isinstance(configured, tuple)
    optimizers = configured[0] if several else [configured["optimizer"]]
    stage.optimizers = lambda: optimizers
    stage.lr_schedulers = lambda: configured[1]

    def step() -> None:
        if several:
            stage.update.position = 3  # whose rollout has three jumps
            assert len(stage.correction.rollouts.draw().jumps) == 3
            for _ in range(2):
                correct(stage, stage.correction, data)
        else:
            stage.loss(data).mean.backward()
            stage.configure_gradient_clipping(optimizers[0])
            optimizers[0].step()
            optimizers[0].zero_grad()
            stage.ema.update(1)

    return stage, step


WAN = [f"{stage}/{name}" for stage in ("teacher", "forward", "onpolicy") for name in list_recipes()[stage]]
FAMILY = [(name, None) for name in WAN] + [("finetune/driving", model) for model in list_recipes()["models"]]


@pytest.mark.parametrize("stage, model", FAMILY)
def test_every_recipe_builds_on_meta_with_its_hardware(stage: str, model: str | None) -> None:
    """Every network at its full size, without a byte of weights: adapters find their layers, roles their weights."""
    for hardware in [None] if model is None else list_recipes()["hardware"]:
        recipe = load_recipe(stage, model=model, hardware=hardware)
        config = {**transformer_config_of(recipe), "num_layers": 1}
        roles = _networks(recipe, config)
        assert roles.parameters("student")
        assert all(weight.is_meta for network in roles.networks for weight in network.parameters())


CONTROLLED = [name for name in list_recipes()["finetune"] if name.endswith("-control")]


@pytest.mark.parametrize("model", list_recipes()["models"])
@pytest.mark.parametrize("stage", CONTROLLED)
def test_every_control_recipe_builds_on_meta_with_every_model(stage: str, model: str, project: Path) -> None:
    """Published models too: the module that embeds the controls is there, is trained, and is counted."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(project)
        recipe = load_recipe(f"finetune/{stage}", model=model)
        config = {**transformer_config_of(recipe), "num_layers": 1}
        roles = _networks(recipe, config)
        embedder = roles.student.transformer.condition_embedder.get_submodule(MODULE)
        card = "-".join([stage.removesuffix("-control"), "uncaptioned"])
        assert recipe.data.card == [card] and len(embedder.low) == (4 if card.startswith("robotics") else 2)
        trained = [weight for name, weight in roles.parameters("student") if MODULE in name]
        assert len(trained) == 7 and all(weight.is_meta for weight in trained)
        without = _networks(load_recipe("finetune/driving", model=model), config)
        assert roles.weight_bytes > without.weight_bytes
        plain = dataclasses.replace(recipe.model, control=dataclasses.replace(recipe.model.control, names=[]))
        learnt = {**config, CONFIG_KEY: controls_of(roles.student.transformer).to_json()}  # type: ignore[union-attr]
        again = _networks(dataclasses.replace(recipe, model=plain), learnt)
        assert again.weight_bytes == roles.weight_bytes, "of weights that have learnt them it is counted too"


WAN = "anyflow-wan2.1-t2v-1.3b"
UNENCODED = "data.precompute=false"
"""Clips that a step encodes itself."""


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A simulator of simple arithmetic: states over ranks, activations by frames."""

    def stand_in(recipe: Any, config: Any, latents: Any) -> Memory:
        trained = 1 if recipe.model.lora.enabled else 14
        states = 4.0 * GIB * trained / (recipe.world_size if recipe.hardware.strategy == "fsdp" else 1)
        return Memory(states, states, 2 * states, states, latents[0] * 2.0 * GIB, sampling=2.0 * GIB, student=states)

    monkeypatch.setattr("anyflow.memory.simulate.simulate", stand_in)
    return lambda: None


def test_each_phase_has_what_lies_there_then(simulated: Any) -> None:
    """No optimiser before training, a second set of trained weights in every curve, a parked codec where it works."""
    recipe = load_recipe("finetune/driving", model=WAN, overrides=["sampling.every_steps=100", UNENCODED])
    need = plan(recipe)
    before, during, step = (need.phases[name] for name in (SAMPLING["before"], SAMPLING["during"], STEP))
    assert "optimiser" not in before and during["optimiser"] == step["optimiser"] == 8 * GIB
    assert before[WAITING] == during[WAITING] == 4 * GIB and WAITING not in step
    assert during[ACTIVATIONS] == 2 * GIB and before["weights"] == 4 * GIB
    assert during["gradients between passes"] == 0, "freed with their step"
    assert 5 < need.phases[ENCODING][CLIPS] / GIB < 7 < need.phases[DECODING["after"]][CLIPS] / GIB < 8
    parked = plan(dataclasses.replace(recipe, hardware=dataclasses.replace(recipe.hardware, park_codec=True)))
    assert parked.phases[STEP][CODEC] == 0 and parked.phases[ENCODING][CODEC] == need.phases[STEP][CODEC] > 10 * GIB
    assert parked.phases[DECODING["before"]][CODEC] == need.phases[STEP][CODEC], "lent for a whole curve"
    encoded = plan(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, precompute=True)))
    assert ENCODING not in encoded.phases and encoded.phases["encoding beforehand"][CLIPS] > 5 * GIB
    silent = plan(dataclasses.replace(recipe, sampling=dataclasses.replace(recipe.sampling, prompts=0)))
    assert not {*SAMPLING.values(), *DECODING.values()} & silent.phases.keys()
    sharded = plan(load_recipe("forward/wan2.1-t2v-14b"))
    assert sharded.phases[SAMPLING["after"]]["optimiser"] > 0, "what is sharded lies there all the time"


def test_what_is_told_is_the_phase_that_peaks(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what would make it fit lowers that phase: more checkpointing does nothing for a curve."""
    recipe = load_recipe("finetune/driving", model=WAN, overrides=["sampling.every_steps=100", UNENCODED])
    assert plan(recipe).peak == STEP

    def heavy(recipe: Any, config: Any, latents: Any) -> Memory:
        return Memory(GIB, 0, GIB, GIB, GIB, sampling=70.0 * GIB, student=GIB)

    monkeypatch.setattr("anyflow.memory.simulate.simulate", heavy)
    need = plan(recipe)
    assert need.peak == SAMPLING["during"] and not need.fits
    assert f"most is needed in: {SAMPLING['during']}" in "\n".join(need.lines())
    assert f"({SAMPLING['during']})" in (warning(need) or "")
    assert "sampling.prompts=0" in [remedy.change for remedy in need.remedies]
    offered = {phase: {change for change, *_ in changes(recipe, phase)} for phase in (STEP, ENCODING, need.peak)}
    assert "hardware.park_codec=true" in offered[STEP] and "data.precompute=true" in offered[ENCODING]
    assert not {"hardware.park_codec=true", "data.batch_size=1", "data.precompute=true"} & offered[need.peak]
    assert need.to_json()["peak"] == need.peak and sum(need.parts.values()) == need.needed


def test_one_gpu_holds_the_fine_tuning_of_1_3b(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clips went through the autoencoder eight at once: 61 GiB, and 43 were told."""
    monkeypatch.undo()
    need: Need = plan(load_recipe("finetune/driving", model=WAN))
    assert need.gpus == 1 and need.fits and need.totals[DECODING["before"]] < 35 * GIB


@pytest.mark.slow
def test_one_gpu_holds_the_correction_of_1_3b() -> None:
    """With the activations of a whole rollout it would be 83 GiB."""
    need = plan(load_recipe("onpolicy/wan2.1-t2v-1.3b", hardware="1gpu"), remedies=False)
    assert need.fits and 40 * GIB < need.needed < 55 * GIB


def test_where_it_does_not_fit_the_changes_that_help_are_listed(simulated: Any) -> None:
    need = plan(load_recipe("forward/wan2.1-t2v-14b", overrides=["model.lora.enabled=false"]))
    assert not need.fits and need.needed > need.memory
    listed = [remedy.change for remedy in need.remedies]
    assert any("lora" in change for change in listed) and "16 GPUs" in listed
    assert all(remedy.needed <= need.memory for remedy in need.remedies)
    text = "\n".join(need.lines())
    assert "does not fit" in text and "what makes it fit" in text
    assert "anyflow plan" in (warning(need) or "")
    fitting = plan(load_recipe("forward/wan2.1-t2v-14b", overrides=["data.frames=17"]))
    assert fitting.fits and not fitting.remedies and warning(fitting) is None


@pytest.mark.parametrize(
    ("clip", "told"),
    [(65, "what makes it fit together:"), (300, "nor do several together; the least that was found:")],
)
def test_changes_that_do_not_do_alone_are_put_together(
    clip: int, told: str, simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caught: no change alone makes it fit, and nothing more is said."""

    def heavy(recipe: Any, config: Any, latents: Any) -> Memory:
        return Memory(GIB, 0, GIB, GIB, clip * recipe.data.batch_size * GIB, sampling=GIB, student=GIB)

    monkeypatch.setattr("anyflow.memory.simulate.simulate", heavy)
    tried: list[str] = []
    need = plan(load_recipe("finetune/driving", model=WAN, overrides=[UNENCODED]), on_try=tried.append)
    assert not need.fits and not need.remedies and need.together is not None
    more = ", hardware.park_codec=true" if clip == 65 else ""
    assert need.together.change == f"data.batch_size=1{more}"
    assert (need.together.needed <= need.memory) == (clip == 65) and "data.precompute=true" in tried
    assert told in "\n".join(need.lines())


def test_gpus_keep_the_global_batch() -> None:
    recipe = load_recipe("forward/wan2.1-t2v-14b")
    for gpus in (1, 4, 8, 16):
        assert with_gpus(recipe, gpus).global_batch == recipe.global_batch
    with pytest.raises(UserError, match="multiple of 8"):
        with_gpus(recipe, 12)
    for gpus, near in ((3, 15), (32, 32)):  # as training says it
        with pytest.raises(UserError, match=f"global_batch=16 does not divide over {gpus} GPUs.*global_batch={near},"):
            with_gpus(recipe, gpus)
    assert "32 GPUs" not in [words for words, *_ in changes(with_gpus(recipe, 16))]


def test_adapters_are_offered_a_base_in_fewer_bits_and_a_lower_rank() -> None:
    """Caught: nothing but shorter clips for who has chosen int8 already."""

    def offered(*words: str) -> list[str]:
        found = [change for change, *_ in changes(load_recipe("finetune/driving", model=WAN, overrides=list(words)))]
        return [change for change in found if "lora" in change]

    low = "model.lora.rank=32 model.lora.alpha=32"
    assert offered("model.lora.enabled=true") == ["model.lora.base=int8", "model.lora.base=nf4", low]
    rounded = ("model.lora.enabled=true", "model.lora.base=int8", "hardware.strategy=auto")
    assert offered(*rounded) == ["model.lora.base=nf4", low]
    assert offered(*rounded, "model.lora.rank=32", "model.lora.base=nf4") == []


def test_a_rounded_base_is_whole_on_every_gpu_and_merged_on_the_host(simulated: Any) -> None:
    words = ["model.lora.enabled=true", "model.lora.base=nf4"]
    need = plan(load_recipe("forward/wan2.1-t2v-1.3b", overrides=words), remedies=False)
    assert need.whole == "model.lora.base=nf4"
    assert "whole on every GPU, for model.lora.base=nf4" in "\n".join(need.lines())
    one = load_recipe("finetune/driving", model="anyflow-wan2.1-t2v-14b", hardware="small", overrides=words)
    merged = original_bytes(one, PUBLISHED["14b"])
    assert merged == pytest.approx(28.6e9, rel=0.03) and plan(one, remedies=False).host >= merged


def test_ranks_that_share_a_clip_share_its_activations() -> None:
    """Caught: a simulation that holds whole clips, or that counts what is exchanged for a part of it."""
    words = ["hardware.devices=4", "hardware.strategy=fsdp", "data.global_batch=8", "data.batch_size=8"]
    words.append("model.weights=me/a-network")  # of any number of heads
    options = [*HEAVIEST[3:], *words, CHECKPOINTED, "optimizer.name=adamw", "stage.bidirectional_prob=0"]
    network: dict[str, Any] = {**NETWORK, "num_layers": 2}
    own, shared = (
        simulate(load_recipe("finetune/driving", overrides=[*options, *more]), network, SIZE)
        for more in ((), ("hardware.context=4", "data.global_batch=2"))
    )
    assert own.exchanged == 0 and own.states == shared.states
    assert 4 * own.rows == shared.rows and shared.activations < 0.6 * own.activations, "texts and weights stay whole"
    width, tokens = 4 * network["attention_head_dim"], -(-SIZE[0] * SIZE[2] * SIZE[3] // 4 // 4)
    clips = 2 * (2 + 3)  # two, without gradient at two times; with it forward, forward again and backward
    assert shared.exchanged == pytest.approx(0.75 * clips * 2 * 4 * tokens * width * 4, rel=0.01)
    with pytest.raises(UserError, match="3 attention heads"):
        simulate(
            load_recipe("finetune/driving", overrides=[*options, "hardware.context=4"]),
            NETWORK | {"num_attention_heads": 3},
            SIZE,
        )


def test_a_plan_tells_what_sharing_clips_would_save() -> None:
    """As long as the node has the ranks and the network the heads; the batch over all ranks stays."""
    recipe = load_recipe("forward/wan2.1-t2v-14b")
    shared = {words: changed for words, changed, _ in changes(recipe, heads=12) if "context" in words}
    assert list(shared) == ["hardware.context=2", "hardware.context=4"]
    assert {changed.global_batch for changed in shared.values()} == {recipe.global_batch}
    assert with_gpus(shared["hardware.context=4"], 16).global_batch == recipe.global_batch
    with pytest.raises(UserError, match=r"--gpus 2: hardware.context=4 .* give a multiple of 4"):
        with_gpus(shared["hardware.context=4"], 2)


def test_changes_are_single_and_begin_with_the_cheapest() -> None:
    recipe = load_recipe("forward/wan2.1-t2v-14b", overrides=["hardware.gradient_checkpointing=false"])
    first, changed, _ = next(changes(recipe))
    assert first == "hardware.gradient_checkpointing=true"
    hardware = dataclasses.replace(recipe.hardware, gradient_checkpointing=True)
    assert changed == dataclasses.replace(recipe, hardware=hardware)


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(UserError, match="codec"):
        plan(load_recipe("codec/tiny"))
    with pytest.raises(UserError, match="dimensions"):
        plan(load_recipe("forward/wan2.1-t2v-14b", overrides=["model.weights=some/model", "model.name=x"]))


def test_no_gpu_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert planning.memory_here() is None
    planning.warn_in_background(load_recipe("forward/wan2.1-t2v-14b"))


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["plan", "finetune/driving", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["fits"]


@pytest.mark.slow
def test_the_table_in_readme_is_what_the_command_prints(project: Path) -> None:
    from anyflow.cli.plan import gpu_recipes, table_row

    readme = (project / "docs" / "large.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if re.match(r"\| `(teacher|forward|onpolicy|finetune)/", line)]
    recipes = gpu_recipes()
    assert [row.split("`")[1] for row in rows] == list(recipes)
    for row, (name, recipe) in zip(rows, recipes.items(), strict=True):
        found = table_row(name, planning.plan(recipe, remedies=False))
        told, now = [cell.strip() for cell in row.split("|")[2:-1]], found[1:]
        assert now.pop(5) == told.pop(5), f"the page has {row}, anyflow plan {found}"
        numbers = [[math.nan if cell == "?" else float(cell) for cell in cells] for cells in (now, told)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1.0, nan_ok=True), f"{row}, {found}"


def test_all_are_planned_only_as_they_are() -> None:
    done = CliRunner().invoke(app, ["plan", "--hardware", "8gpu"])
    assert isinstance(done.exception, UserError) and "name one to change it" in str(done.exception)


def test_the_commands_of_the_page_hold(project: Path) -> None:
    """Every ``anyflow train`` and ``anyflow plan`` of docs/large.md names a recipe that resolves."""
    text = (project / "docs" / "large.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith((".venv/", "sbatch", "torchrun"))]
    commands = [shlex.split(line, comments=True) for line in lines]
    seen = 0
    for words in commands:
        if "export" in words or words[0].endswith("pip"):
            continue
        rest = words[words.index("train" if "train" in words else "plan" if "plan" in words else words[2]) + 1 :]
        named: dict[str, str | None] = dict.fromkeys(("--model", "--hardware", "--gpus", "--gpu-memory"))
        for option in list(named):
            if option in rest:
                at = rest.index(option)
                named[option] = rest[at + 1]
                del rest[at : at + 2]
        recipe, *overrides = [word for word in rest if not word.startswith("--")]
        load_recipe(recipe, model=named["--model"], hardware=named["--hardware"], overrides=overrides)
        seen += 1
    assert seen >= 6


def test_the_slurm_script_is_sound(project: Path) -> None:
    script = project / "recipes" / "hardware" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert f"-eq {EXIT_PREEMPTED}" in text and "--signal=TERM" in text and "--resume auto" in text
