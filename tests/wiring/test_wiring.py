"""What a recipe says is what is drawn, trained, averaged and exported: objects built from recipes, looked at in action.

Each test here was written against a wrong line that no other test saw; ``test_mutants.py`` puts the lines back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anyflow.errors import UserError
from anyflow.flowmap.intervals import Intervals
from anyflow.flowmap.matching import critic_loss
from anyflow.flowmap.schedule import shift_sigma
from anyflow.recipe import Recipe, load_recipe
from anyflow.stages import forward, onpolicy
from anyflow.stages.forward import ForwardStage, draw_times, flow_map
from anyflow.tracking.checkpoints import latest_checkpoint
from anyflow.training.assemble import assemble
from anyflow.training.launch import train

SMALL = (
    "data.card=driving",
    "data.frames=5",
    "data.height=32",
    "data.width=32",
    "data.precompute=false",
    "data.num_workers=0",
    "data.global_batch=4",
    "optimizer.name=adamw",
    "sampling.prompts=0",
    "run.tracking_uri=",
)
SHIFT = 9.0
"""Of no shipped model: a default taken for it shows."""


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def recipe_of(name: str, model: Path, *more: str) -> Recipe:
    weights = (f"model.weights={model}", f"stage.onpolicy.teacher={model}")
    return load_recipe(name, overrides=[*SMALL, *weights, f"model.shift={SHIFT}", *more])


def built(name: str, model: Path, *more: str) -> Any:
    """The stage of a recipe, with optimisers at hand but without a Trainer."""
    stage: Any = assemble(recipe_of(name, model, *more)).stage
    stage.report = lambda **metrics: None
    if not stage.automatic_optimization:
        optimizers, schedules = stage.configure_optimizers()
        stage.optimizers, stage.lr_schedulers = lambda: optimizers, lambda: schedules
        stage.manual_backward = lambda loss, **options: loss.backward(**options)
    return stage


def clips(count: int = 4) -> dict[str, Any]:
    """Latents of 5 x 32 x 32 pixels, with a prompt each."""
    latents = torch.randn(count, 2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    return {"latents": latents, "caption": [f"A green car drives, {number}." for number in range(count)]}


def turn(stage: Any) -> Any:
    stage.on_train_batch_start(clips(), 0)
    return stage.training_step(clips(), 0)


@contextmanager
def asked(roles: Any, role: str) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """``(t, r, embeddings)`` of every question to a role."""
    found: list[tuple[torch.Tensor, ...]] = []
    kind, call = type(roles), type(roles).__call__

    def listen(self: Any, who: str, z: Any, t: Any, r: Any, told: Any, **view: Any) -> Any:
        if who == role:
            found.append((t, r, told.text.embeddings))
        return call(self, who, z, t, r, told, **view)

    kind.__call__ = listen
    try:
        yield found
    finally:
        kind.__call__ = call


@pytest.mark.parametrize("name", ["forward/tiny", "finetune/driving", "onpolicy/tiny"])
def test_intervals_have_the_models_shift(name: str, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = built(name, small_model, "stage.diffusion_share=0", "stage.consistency_share=0")
    seen: list[Intervals] = []

    def listen(ask: Any, objective: Any, data: Any, intervals: Intervals, *rest: Any) -> Any:
        seen.append(intervals)
        return flow_map(ask, objective, data, intervals, *rest)

    monkeypatch.setattr(forward, "flow_map", listen)
    turn(stage)
    uniforms = stage.update.draw_all("intervals", 4, 2)
    expected = 1000 * shift_sigma(uniforms.max(dim=1).values, SHIFT)
    torch.testing.assert_close(seen[0].timestep, expected)
    loss = stage.loss if stage.automatic_optimization else stage.correction.on_data
    assert loss.objective.shift == SHIFT


def test_the_teachers_times_have_the_models_shift(small_model: Path) -> None:
    shifted = built("teacher/tiny", small_model, "model.init=weights", "model.codec=")
    assert shifted.loss.shift == SHIFT
    plain = torch.randn(1, generator=shifted.update.generator("timestep", 0)).sigmoid()
    torch.testing.assert_close(
        shifted.update.draw_logit_normal("timestep", torch.zeros(1), SHIFT), 1000 * shift_sigma(plain, SHIFT)
    )


def test_matching_is_at_uniform_times_of_the_models_shift(small_model: Path) -> None:
    stage = built("onpolicy/tiny", small_model, "stage.onpolicy.forward_weight=0")
    with asked(stage.roles, "teacher") as questions:
        turn(stage)
    expected = 1000 * shift_sigma(stage.update.draw_own("matching", torch.zeros(4)), SHIFT)
    assert questions
    for t, r, _ in questions:
        torch.testing.assert_close(t, expected.to(t))
        assert torch.equal(t, r)


def test_the_critic_learns_the_students_samples(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the data: it would then learn what the teacher knows, and the difference of the two would teach nothing."""
    stage = built("onpolicy/tiny", small_model)
    turn(stage)
    seen: list[torch.Tensor] = []

    def listen(velocity: Any, samples: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(samples)
        return critic_loss(velocity, samples, *rest)

    monkeypatch.setattr(onpolicy, "critic_loss", listen)
    turn(stage)
    data = stage.batches.prepare(clips(), torch.device("cpu"))
    with torch.no_grad():
        expected = stage.correction.rollouts.sample(data, stage.correction.rollouts.draw())
    torch.testing.assert_close(seen[0], expected)
    assert float((seen[0] - data.clean).abs().mean()) > 0.1


def test_rollouts_are_of_the_samples_own_prompts(small_model: Path) -> None:
    """Also where the forward loss of the same step drops them: the student answers prompts when it is sampled."""
    stage = built("onpolicy/tiny", small_model, "stage.text_drop=1.0", "stage.onpolicy.forward_weight=0")
    own = stage.codec.encode_text(clips()["caption"]).embeddings
    for _ in range(2):
        with asked(stage.roles, "student") as questions:
            turn(stage)
        assert questions
        for _, _, embeddings in questions:
            torch.testing.assert_close(embeddings[:, : own.shape[1] - 1], own[:, : embeddings.shape[1]][:, :-1])


@pytest.mark.parametrize("name", ["onpolicy/tiny", "finetune/driving"])
def test_every_groups_rate_follows_its_schedule(name: str, small_model: Path) -> None:
    lora = ("model.lora.enabled=true", "model.lora.rank=2", "stage.onpolicy.teacher=")
    tail = ("stage.steps=2", "stage.tail.teacher_steps=2", "stage.tail.steps=2", "stage.tail.optimizer.warmup_steps=4")
    more = tail if name.startswith("finetune") else ()
    warm = ("optimizer.lr=1e-4", "optimizer.warmup_steps=4", "stage.onpolicy.critic.warmup_steps=4")
    stage = built(name, small_model, *lora, *warm, *more)
    for _ in range(8 if more else 2):
        turn(stage)
    for group, optimizer in zip(stage.groups.values(), stage.optimizers(), strict=True):
        done = 2 if more else 1
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(group.settings.lr * (done + 1) / 4), f"{group.field} after {done} updates"


def test_the_students_average_moves_with_its_updates(small_model: Path) -> None:
    stage = built("onpolicy/tiny", small_model, "ema.decay=0.5", "ema.start_step=0", "optimizer.lr=1e-2")
    before = [weight.clone() for weight in stage.ema.shadows]
    turn(stage)
    now = [weight.detach() for _, weight in stage.roles.parameters("student")]
    for average, old, new in zip(stage.ema.shadows, before, now, strict=True):
        torch.testing.assert_close(average, (old + new) / 2)


def test_the_critic_begins_as_the_teacher(small_model: Path) -> None:
    stage = built("onpolicy/tiny", small_model)
    critic = dict(stage.roles.network("critic").named_parameters())
    assert all(torch.equal(weight, critic[name]) for name, weight in stage.roles.network("teacher").named_parameters())


def test_options_of_the_recipe_reach_their_stage(small_model: Path) -> None:
    """A value of its own for each option: one that is dropped, or mixed up with another, shows."""
    forward = built(
        "forward/tiny",
        small_model,
        *("stage.guidance_scale=1.7", "stage.delta=7", "stage.weight=gaussian", "stage.rebalance=false"),
        *("stage.diffusion_share=0.3", "stage.consistency_share=0.6", "stage.text_drop=0.21", "stage.i2v_prob=0.22"),
        *("stage.long_context=0.23", "stage.bidirectional_prob=0.24", "model.negative_prompt=nothing"),
        *("optimizer.lr=0.011", "optimizer.betas=[0.5,0.6]", "optimizer.weight_decay=0.07", "optimizer.clip=0.8"),
        *("ema.decay=0.55", "ema.start_step=3", "run.seed=12", "stage.steps=17", "data.batch_size=2"),
    )
    objective, conditioning = forward.loss.objective, forward.batches.conditioning
    optimizer = forward.groups["student"].settings
    assert (objective.guidance_scale, objective.delta, objective.weight) == (1.7, 7, "gaussian")
    assert not objective.rebalance and (forward.shares.diffusion_share, forward.shares.consistency_share) == (0.3, 0.6)
    assert (conditioning.text_drop, conditioning.i2v_prob, conditioning.long_context) == (0.21, 0.22, 0.23)
    assert (conditioning.bidirectional_prob, conditioning.negative_prompt) == (0.24, "nothing")
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip) == (0.011, [0.5, 0.6], 0.07, 0.8)
    assert (forward.ema.settings.decay, forward.ema.settings.start_step) == (0.55, 3)
    assert (forward.update.seed, forward.total_steps, forward.update.passes) == (12, 17, 2)
    onpolicy_stage = built(
        "onpolicy/tiny",
        small_model,
        *("stage.onpolicy.budgets=[3]", "stage.onpolicy.extra_guidance=2.5", "stage.onpolicy.forward_weight=0.4"),
        *("stage.onpolicy.critic_turns=3", "stage.onpolicy.critic.lr=0.013", "hardware.recompute_jumps=true"),
    )
    found = onpolicy_stage.correction.settings
    assert (list(found.budgets), found.extra_guidance, found.forward_weight) == ([3], 2.5, 0.4)
    assert (found.critic_turns, onpolicy_stage.groups["critic"].settings.lr) == (3, 0.013)
    assert onpolicy_stage.correction.recompute_jumps


def test_a_base_in_bfloat16_is_trained_under_float32_adapters(small_model: Path, tmp_path: Path) -> None:
    """Cast with the base, adapters would swallow small updates, their average not follow, and draws have 8 bits."""
    lora = ("model.lora.enabled=true", "model.lora.rank=2", "stage.steps=2", "hardware.precision=bf16-true")
    recipe = recipe_of("finetune/driving", small_model, *lora, "optimizer.lr=1e-2")
    seen: list[torch.dtype] = []
    step = ForwardStage.training_step

    def listen(self: Any, *arguments: Any) -> Any:
        weights = dict(self.backbone.named_parameters())
        base = {weight.dtype for name, weight in weights.items() if ".base_layer.weight" in name and "blocks." in name}
        assert base == {torch.bfloat16}
        assert {weight.dtype for weight in weights.values() if weight.requires_grad} == {torch.float32}
        assert {shadow.dtype for shadow in self.ema.shadows} == {torch.float32}
        uniforms = self.update.draw_all("intervals", 4, 2)
        assert torch.unique(uniforms * 2**12 % 1).numel() > 1, "finer than bfloat16"
        data = self.batches.prepare(arguments[0], self.device)
        seen.append(draw_times(self.update, data, self.shares, SHIFT).timestep.dtype)
        return step(self, *arguments)

    ForwardStage.training_step = listen  # type: ignore[method-assign]
    try:
        assert train(recipe, out=tmp_path / "run") == 0
    finally:
        ForwardStage.training_step = step  # type: ignore[method-assign]
    assert seen == [torch.float32] * 2
    path = latest_checkpoint(tmp_path / "run/checkpoints")
    assert path is not None
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(".lora_" in name or name.startswith("ema.") for name in state)
    assert any(".lora_B." in name and tensor.abs().max() > 0 for name, tensor in state.items())


@pytest.mark.parametrize("leave_stored", [False, True])
def test_a_frozen_teacher_lies_in_what_it_computes_in(leave_stored: bool, small_model: Path) -> None:
    """In float32 it takes twice the memory for nothing; its critic, begun from bfloat16, would start beside it."""
    recipe = recipe_of("onpolicy/tiny", small_model, "hardware.precision=bf16-mixed")
    roles: Any = assemble(recipe, leave_stored=leave_stored).stage.roles
    found = {role: dict(roles.network(role).transformer.named_parameters()) for role in ("teacher", "critic")}
    large, small = "blocks.0.attn1.to_q.weight", "condition_embedder.time_embedder.linear_1.weight"
    if leave_stored:
        found = {role: {name: roles.network(role).stored.read(name) for name in found[role]} for role in found}
    assert found["teacher"][large].dtype == torch.bfloat16 and found["teacher"][small].dtype == torch.float32
    assert found["critic"][large].dtype == torch.float32
    assert not torch.equal(found["critic"][large], found["teacher"][large].float()), "not rounded on the way"
    assert roles.parameters("teacher") == [] and len(roles.parameters("critic")) > 0


@pytest.mark.parametrize("name", ["finetune/driving", "codec/tiny"])
def test_weights_are_not_trained_in_bfloat16(name: str) -> None:
    with pytest.raises(UserError, match=r"hardware\.precision='bf16-true' .*bf16-mixed"):
        load_recipe(name, overrides=["hardware.precision=bf16-true"])


@pytest.mark.parametrize("lora", [False, True])
def test_the_exported_model_is_the_average(lora: bool, small_model: Path, tmp_path: Path) -> None:
    """The files themselves are read: neither the weights as they were last, nor those of the beginning."""
    more = ["model.lora.enabled=true", "model.lora.rank=2", "model.lora.alpha=6"] if lora else []
    rates = ["optimizer.lr=2e-2", "optimizer.warmup_steps=0", "ema.decay=0.5", "ema.start_step=0", "stage.steps=3"]
    assert train(recipe_of("finetune/driving", small_model, *rates, *more), out=tmp_path / "run") == 0
    path = latest_checkpoint(tmp_path / "run/checkpoints")
    assert path is not None
    state = torch.load(path, weights_only=True)["state_dict"]
    trained = [name for name in state if name.startswith("backbone.transformer.") and (not lora or ".lora_" in name)]
    averages = {name: state[f"ema.shadow_{index}"] for index, name in enumerate(trained)}
    assert len(averages) == sum(name.startswith("ema.") for name in state)
    if lora:
        stored = load_file(tmp_path / "run/lora/pytorch_lora_weights.safetensors")
        files = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        pairs = {name: files[name.removeprefix("backbone.transformer.").replace(".default.", ".")] for name in trained}
        factor = 6 / 2
        layer = "blocks.0.attn1.to_q"
        down, up = (averages[f"backbone.transformer.{layer}.lora_{part}.default.weight"] for part in "AB")
        base = load_file(next((small_model / "transformer").glob("*.safetensors")))[f"{layer}.weight"]
        merged = load_file(next((tmp_path / "run/model/transformer").glob("*.safetensors")))[f"{layer}.weight"]
        torch.testing.assert_close(merged.float(), base.float() + factor * up @ down, rtol=1e-2, atol=1e-3)
    else:
        files = load_file(next((tmp_path / "run/model/transformer").glob("*.safetensors")))
        pairs = {name: files[name.removeprefix("backbone.transformer.")] for name in trained}
    moved = 0.0
    for name, stored_weight in pairs.items():
        torch.testing.assert_close(stored_weight.float(), averages[name].float(), rtol=1e-2, atol=1e-4)
        moved = max(moved, float((state[name] - averages[name]).abs().max()))
    assert moved > 5e-3, "the last weights are too near to the average to tell one from the other"
