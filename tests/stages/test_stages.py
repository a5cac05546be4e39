"""Stages: each step is the algorithm's, every draw depends on (seed, position) alone, and the loss really falls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anyflow.backbone.codec import Codec
from anyflow.backbone.embedded import build_text_encoder, build_tokenizer, build_vae
from anyflow.backbone.load import new_backbone
from anyflow.backbone.roles import SeparateRoles
from anyflow.errors import UserError
from anyflow.flowmap.objective import FlowMapObjective, plain_flow_map_loss, rebalance
from anyflow.stages.base import global_mean
from anyflow.stages.codec import CodecObjective, CodecStage, motion_mask
from anyflow.stages.ema import EmaSettings
from anyflow.stages.flow import Conditioning
from anyflow.stages.forward import ForwardStage, IntervalShares
from anyflow.stages.onpolicy import OnPolicySettings, OnPolicyStage
from anyflow.stages.optimizers import OptimizerSettings
from anyflow.stages.teacher import TeacherStage

CAPTIONS = ["a red car turns left", "a blue car turns right", "a robot moves", "a hall"]
NETWORK = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
}


@pytest.fixture(scope="module")
def codec() -> Codec:
    tokenizer = build_tokenizer(CAPTIONS)
    return Codec(build_vae(0), tokenizer, build_text_encoder(len(tokenizer), 0))


def settings(**changes: Any) -> dict[str, Any]:
    plain = {
        "conditioning": Conditioning(),
        "optimizer": OptimizerSettings("adamw", lr=1e-2),
        "ema": EmaSettings(0.0),
        "total_steps": 10,
        "seed": 0,
    }
    return {**plain, **changes}


def quiet(stage: Any) -> Any:
    """A stage outside a Trainer: figures go nowhere."""
    stage.report = lambda **metrics: None
    return stage


def batch(size: int = 4) -> dict[str, Any]:
    latents = torch.randn(size, 2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    return {"latents": latents, "caption": CAPTIONS[:size], "key": [str(i) for i in range(size)]}


def stage_of(kind: Any, codec: Codec, **changes: Any) -> Any:
    backbone = new_backbone(NETWORK, 0)
    torch.manual_seed(3)
    torch.nn.init.normal_(backbone.transformer.proj_out.weight, std=0.1)
    return quiet(kind(backbone, codec, **settings(**changes)))


@pytest.mark.parametrize("kind", [TeacherStage, ForwardStage])
def test_a_step_depends_on_seed_and_position_alone(kind: Any, codec: Codec) -> None:
    extra = {"objective": FlowMapObjective()} if kind is ForwardStage else {}
    stage = stage_of(kind, codec, **extra)
    losses = []
    for position in (1, 2, 1):
        stage.position = position
        torch.manual_seed(position * 100 + len(losses))  # the global generator must not matter
        losses.append(float(stage.training_step(batch(), 0).detach()))
    assert losses[0] == losses[2] != losses[1]


def test_the_forward_stage_is_the_plain_objective_balanced(codec: Codec) -> None:
    objective = FlowMapObjective(guidance_scale=2.0)
    stage = stage_of(ForwardStage, codec, objective=objective, shares=IntervalShares(0.5, 0.25))
    stage.position = 5
    loss = stage.training_step(batch(), 0)

    data = stage.prepare(batch())
    times = stage.draw_times(4, stage.shares)
    plain = plain_flow_map_loss(
        objective, stage.velocity(data.text), data.clean, data.noise, times.timestep, times.r_timestep, data.rows
    )
    mean = plain.per_sample[times.is_diffusion].mean()
    expected = rebalance(plain.per_sample, times.is_diffusion, mean.detach()).mean()
    assert int(times.is_diffusion.sum()) == 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)


def test_dropped_texts_use_the_negative_prompt(codec: Codec) -> None:
    stage = stage_of(TeacherStage, codec, conditioning=Conditioning("nothing", text_drop=1.0))
    data = stage.prepare(batch())
    assert data.rows.tolist() == [4, 4, 4, 4]
    negative = codec.encode_text(["nothing"])
    chosen = data.text.select(data.rows)
    torch.testing.assert_close(chosen.embeddings[0, : int(negative.lengths[0])], negative.embeddings[0, :-1])
    never = stage_of(TeacherStage, codec, conditioning=Conditioning(text_drop=0.0))
    assert never.prepare(batch()).rows.tolist() == [0, 1, 2, 3]


def test_image_to_video_leaves_the_first_frame_without_loss(codec: Codec) -> None:
    stage = stage_of(TeacherStage, codec, conditioning=Conditioning(i2v_prob=1.0))
    one, other = batch(), batch()
    stage.position = 1
    loss = stage.training_step(one, 0)
    gradient = torch.autograd.grad(loss, stage.backbone.transformer.proj_out.weight)[0]
    assert torch.isfinite(gradient).all()
    # The given frame enters as it is: another one changes the answer, but its own error is not counted.
    other["latents"] = one["latents"].clone()
    seen: list[torch.Tensor] = []
    stage.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stage.training_step(other, 0)
    torch.testing.assert_close(seen[0][:, 0], one["latents"][:, 0])


@pytest.mark.parametrize("kind", [TeacherStage, ForwardStage])
def test_the_loss_falls(kind: Any, codec: Codec) -> None:
    extra = {"objective": FlowMapObjective(guidance_scale=1.0)} if kind is ForwardStage else {}
    stage = quiet(kind(new_backbone(NETWORK, 0), codec, **settings(**extra)))
    optimizer = stage.configure_optimizers()["optimizer"]
    losses = []
    for step in range(40):
        stage.position = step % 4  # the same four batches of noise and times over again
        loss = stage.training_step(batch(), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_a_gradient_that_is_not_a_number_stops_the_run_in_words(codec: Codec) -> None:
    stage = stage_of(TeacherStage, codec)
    optimizer = stage.configure_optimizers()["optimizer"]
    for parameter in stage.backbone.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        stage.configure_gradient_clipping(optimizer)


def test_the_codec_stage_crops_on_the_latent_grid_then_to_full_length() -> None:
    objective = CodecObjective(crop_frames=5, crop_height=16, crop_width=16, whole_share=0.5)
    stage = quiet(
        CodecStage(
            build_vae(0),
            objective,
            optimizer=OptimizerSettings("muon", lr=1e-3),
            ema=EmaSettings(0.0),
            total_steps=10,
            seed=0,
        )
    )
    columns = torch.arange(48).div(24).sub(1).expand(2, 3, 9, 32, 48)
    crop = stage.crop(columns, torch.Generator().manual_seed(0))
    assert crop.shape == (2, 3, 5, 16, 16)
    left = (crop[:, 0, 0, 0, 0] + 1) * 24
    torch.testing.assert_close(left % 8, torch.zeros(2))
    stage.step = 5
    assert stage.crop(columns, torch.Generator()).shape == (2, 3, 9, 16, 16)

    frames = torch.randint(0, 255, (1, 5, 16, 16, 3), dtype=torch.uint8)
    loss = stage.training_step({"frames": frames, "caption": ["a"]}, 0)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in stage.vae.parameters())


def test_motion_weighs_both_sides_of_a_change() -> None:
    video = torch.zeros(1, 3, 4, 2, 2)
    video[:, :, 2:, 0, 0] = 1.0
    mask = motion_mask(video)
    assert mask[0, 0, :, 0, 0].tolist() == [0, 1, 1, 0]
    assert mask[0, 0, :, 1, 1].tolist() == [0, 0, 0, 0]


def test_the_global_mean_of_nothing_is_none() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert global_mean(values, torch.zeros(3, dtype=torch.bool)) is None
    mean = global_mean(values, torch.tensor([True, False, True]))
    assert mean is not None and float(mean) == 3.5 and not mean.requires_grad


def test_generators_differ_by_purpose_and_position() -> None:
    stage: Any = SimpleNamespace(seed=0, position=1)
    from anyflow.stages.base import Stage

    def draw(purpose: str, *position: int) -> float:
        return float(torch.rand((), generator=Stage.generator(stage, purpose, *position)))

    assert draw("noise", 0) == draw("noise", 0)
    assert len({draw("noise", 0), draw("noise", 1), draw("drop"), draw("drop", 0)}) == 4


# On-policy distillation -----------------------------------------------------------------------------------------------


def onpolicy_stage(codec: Codec, **changes: Any) -> OnPolicyStage:
    """A stage over three small networks, with optimisers at hand but without a Trainer."""
    student, teacher = new_backbone(NETWORK, 0), new_backbone(NETWORK, 1)
    torch.manual_seed(3)
    for net in (student, teacher):
        torch.nn.init.normal_(net.transformer.proj_out.weight, std=0.1)
    options = {"settings": OnPolicySettings(), "ema": EmaSettings(0.9), **changes}
    stage = OnPolicyStage(
        SeparateRoles(student, teacher),
        codec,
        objective=FlowMapObjective(),
        critic_optimizer=OptimizerSettings("adamw", lr=1e-3, betas=(0.0, 0.999)),
        **settings(**options),
    )
    optimizers, schedules = stage.configure_optimizers()
    stage.optimizers = lambda: optimizers  # type: ignore[method-assign]
    stage.lr_schedulers = lambda: schedules  # type: ignore[method-assign]
    stage.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    return quiet(stage)


def weights_of(stage: OnPolicyStage, role: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for _, weight in stage.roles.parameters(role)]


def turn(stage: OnPolicyStage, position: int) -> None:
    stage.position = position
    stage.training_step(batch(), 0)


def moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return not all(map(torch.equal, before, after))


def test_student_and_critic_take_turns_and_the_teacher_rests(codec: Codec) -> None:
    stage = onpolicy_stage(codec)
    assert stage.roles.frozen is not None
    teacher = [weight.clone() for weight in stage.roles.frozen.parameters()]
    for position, (mover, rester, step) in enumerate([("student", "critic", 0), ("critic", "student", 1)], start=1):
        moving, resting = weights_of(stage, mover), weights_of(stage, rester)
        turn(stage, position)
        assert moved(moving, weights_of(stage, mover)) and not moved(resting, weights_of(stage, rester))
        assert stage.step == step
    assert not moved(teacher, list(stage.roles.frozen.parameters()))
    assert not any("teacher" in name or "roles" in name for name in stage.state_dict()), "a frozen teacher is not saved"


def test_accumulated_turns_move_once(codec: Codec) -> None:
    stage = onpolicy_stage(codec, settings=OnPolicySettings(accumulate=2, critic_turns=2))
    changes = []
    for position in range(1, 7):
        before = {role: weights_of(stage, role) for role in ("student", "critic")}
        turn(stage, position)
        changes.append([role for role in before if moved(before[role], weights_of(stage, role))])
    assert changes == [[], ["student"], [], ["critic"], [], ["critic"]]
    assert stage.step == 1 and stage.turn == 0


def test_a_run_cut_between_the_updates_goes_on_with_the_critics(codec: Codec) -> None:
    whole = onpolicy_stage(codec)
    for position in (1, 2, 3):
        turn(whole, position)
    first = onpolicy_stage(codec)
    turn(first, 1)
    saved: dict[str, Any] = {}
    first.on_save_checkpoint(saved)
    second = onpolicy_stage(codec)
    second.load_state_dict(first.state_dict())
    second.on_load_checkpoint(saved)
    for new, old in zip(second.optimizers(), first.optimizers(), strict=True):  # type: ignore[arg-type]
        new.load_state_dict(old.state_dict())
    for position in (2, 3):
        turn(second, position)
    for role in ("student", "critic"):
        assert not moved(weights_of(whole, role), weights_of(second, role))
    assert whole.ema is not None and second.ema is not None
    assert all(map(torch.equal, whole.ema.shadows, second.ema.shadows))


def test_a_perfect_student_without_co_training_is_left_alone(codec: Codec) -> None:
    """Critic and teacher agree, guidance is off: nothing pulls. Co-training alone then moves the student."""
    alone = onpolicy_stage(codec, settings=OnPolicySettings(extra_guidance=0.0, forward_weight=0.0))
    before = weights_of(alone, "student")
    alone.position = 1
    alone.generator_turn(alone.prepare(batch()))
    assert all(weight.grad is None or not weight.grad.any() for _, weight in alone.roles.parameters("student"))
    assert not moved(before, weights_of(alone, "student"))
    co_trained = onpolicy_stage(codec, settings=OnPolicySettings(extra_guidance=0.0))
    co_trained.position = 1
    co_trained.generator_turn(co_trained.prepare(batch()))
    assert any(weight.grad is not None and weight.grad.any() for _, weight in co_trained.roles.parameters("student"))


def test_given_frames_come_back_and_carry_nothing(codec: Codec) -> None:
    stage = onpolicy_stage(codec, conditioning=Conditioning(i2v_prob=1.0))
    stage.position = 1
    data = stage.prepare(batch())
    assert torch.equal(stage.simulate(data)[:, 0], data.clean[:, 0])
    turn(stage, 1)
    turn(stage, 2)
    assert stage.step == 1
