"""A causal network through the same stages: what each step teaches, and that nothing else differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_stage import CAPTIONS, NETWORK, moved, prepared, quiet, settings, weights_of

from anyflow.backbone.codec import Codec
from anyflow.backbone.load import new_backbone
from anyflow.backbone.roles import SeparateRoles
from anyflow.flowmap.chunks import PathBatch, in_chunks, layout_of
from anyflow.flowmap.intervals import keep_first_frame
from anyflow.flowmap.objective import FlowMapObjective, flow_matching_loss, plain_flow_map_loss, rebalance
from anyflow.stages.batch import Conditioning
from anyflow.stages.forward import ForwardStage, draw_times
from anyflow.stages.onpolicy import OnPolicySettings, OnPolicyStage
from anyflow.stages.optimizers import OptimizerSettings
from anyflow.stages.teacher import TeacherStage

CHUNKS, LIMIT = (1, 1, 2), 2
CAUSAL = {**NETWORK, "chunk_partition": list(CHUNKS), "full_chunk_limit": LIMIT}
NEVER = {"text_drop": 0.0, "bidirectional_prob": 0.0}


def batch(size: int = 4) -> dict[str, Any]:
    latents = torch.randn(size, 4, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    return {"latents": latents, "caption": CAPTIONS[:size], "key": [str(i) for i in range(size)]}


def causal_stage(kind: Any, codec: Codec, **conditioning: float) -> Any:
    backbone = new_backbone(CAUSAL, 0, "causal")
    torch.manual_seed(3)
    torch.nn.init.normal_(backbone.transformer.proj_out.weight, std=0.1)
    extra = {"objective": FlowMapObjective()} if kind is ForwardStage else {}
    stage = quiet(kind(backbone, codec, **settings(conditioning=Conditioning(**{**NEVER, **conditioning}), **extra)))
    stage.update.position = 5
    return stage


@pytest.mark.parametrize("kind", [TeacherStage, ForwardStage])
def test_a_step_depends_on_seed_and_position_alone(kind: Any, codec: Codec) -> None:
    stage = causal_stage(kind, codec, bidirectional_prob=0.5, i2v_prob=0.5, text_drop=0.5)
    losses = []
    for position in (1, 2, 1):
        stage.update.position = position
        torch.manual_seed(len(losses))  # the global generator must not matter
        losses.append(float(stage.training_step(batch(), 0).detach()))
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("long_context", [0.0, 1.0])
def test_the_forward_stage_teaches_the_chunks_that_were_drawn(codec: Codec, long_context: float) -> None:
    stage = causal_stage(ForwardStage, codec, long_context=long_context)
    loss = stage.training_step(batch(), 0)
    data = prepared(stage, batch())
    times = draw_times(stage.update, data, stage.shares, stage.loss.objective.shift)
    layout = layout_of(CHUNKS if long_context else CHUNKS[:2], LIMIT)
    assert stage.batches.draw_layout(stage.backbone, data) == layout
    on_path = in_chunks(layout, PathBatch(data.clean, data.noise, times.timestep, times.r_timestep))
    plain = plain_flow_map_loss(
        stage.loss.objective,
        data.velocity(stage.backbone, layout),
        on_path.clean,
        on_path.noise,
        on_path.timestep,
        on_path.r_timestep,
        data.rows,
        on_path.loss_frames,
    )
    mean = plain.per_sample[times.is_diffusion].mean().detach()
    expected = rebalance(plain.per_sample, times.is_diffusion, mean).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)


def test_half_of_the_steps_have_longer_context(codec: Codec) -> None:
    stage = causal_stage(TeacherStage, codec, long_context=0.5)
    data, longer = prepared(stage, batch()), 0
    for position in range(200):
        stage.update.position = position
        longer += bool(stage.batches.draw_layout(stage.backbone, data).compressed)
    assert 75 < longer < 125


def test_the_extra_step_is_flow_matching_of_all_frames_with_guidance_fused(codec: Codec) -> None:
    """``P = (p - (1 - g) n) / g`` against the velocity of the path, unweighted, at logit-normal times."""
    with_step = causal_stage(ForwardStage, codec, bidirectional_prob=1.0)
    without = causal_stage(ForwardStage, codec)
    extra = with_step.training_step(batch(), 0) - without.training_step(batch(), 0)
    data = prepared(without, batch())
    t = without.update.draw_logit_normal("bidirectional timestep", data.clean, 5.0)
    sigma = (t / 1000)[:, None, None, None, None]
    z, v = sigma * data.noise + (1 - sigma) * data.clean, data.noise - data.clean
    velocity, rows = data.velocity(without.backbone), torch.arange(4)
    guided = (velocity(z, t, t, rows) + 2 * velocity(z, t, t, rows + 4)) / 3
    torch.testing.assert_close(extra.float(), (guided - v).square().mean(), rtol=1e-5, atol=1e-6)

    teacher, plain = causal_stage(TeacherStage, codec, bidirectional_prob=1.0), causal_stage(TeacherStage, codec)
    extra = teacher.training_step(batch(), 0) - plain.training_step(batch(), 0)
    t = plain.update.draw_logit_normal("bidirectional timestep", data.clean, 5.0)
    expected = flow_matching_loss(data.velocity(plain.backbone), data.clean, data.noise, t, rows).mean()
    torch.testing.assert_close(extra, expected, rtol=1e-5, atol=1e-6)


def test_a_bidirectional_network_has_no_extra_step(codec: Codec) -> None:
    conditioning = Conditioning(bidirectional_prob=1.0)
    stage = TeacherStage(new_backbone(NETWORK, 0), codec, **settings(conditioning=conditioning))
    assert not stage.batches.keeps_bidirectional(stage.backbone)
    assert stage.batches.draw_layout(stage.backbone, prepared(stage, batch())) is None


def test_a_given_first_frame_is_clean_and_without_loss(codec: Codec) -> None:
    stage = causal_stage(TeacherStage, codec, i2v_prob=1.0, long_context=0.0)
    data = prepared(stage, batch())
    t = torch.full((4,), 800.0)
    layout = stage.batches.draw_layout(stage.backbone, data)
    on_path = data.on_path(t, t, layout)
    assert on_path.timestep.tolist() == [[0, 800, 0, 0]] * 4  # noisy: frames 0 and 1; their clean copies
    assert on_path.loss_frames.tolist() == [[False, True, False, False]] * 4
    assert torch.equal(on_path.clean[:, 0], data.clean[:, 0])
    whole = data.on_path(t, t)
    assert torch.equal(whole.timestep, keep_first_frame(t, t, 4)[0])


@pytest.mark.parametrize("kind", [TeacherStage, ForwardStage])
def test_every_weight_learns(kind: Any, codec: Codec) -> None:
    """The patches of compressed frames too, in a step with longer context."""
    stage = causal_stage(kind, codec, long_context=1.0)
    optimizer = stage.configure_optimizers()["optimizer"]
    losses = []
    for step in range(30):
        stage.update.position = step % 3
        loss = stage.training_step(batch(), 0)
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in stage.backbone.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[2]


def test_an_on_policy_step_rolls_out_chunk_by_chunk_against_a_bidirectional_teacher(codec: Codec) -> None:
    student, teacher = new_backbone(CAUSAL, 0, "causal"), new_backbone(NETWORK, 1)
    for net in (student, teacher):
        torch.nn.init.normal_(net.transformer.proj_out.weight, std=0.1)
    options = {
        "objective": FlowMapObjective(),
        "settings": OnPolicySettings(critic=OptimizerSettings("adamw", lr=1e-3)),
    }
    causal = quiet(OnPolicyStage(SeparateRoles(student, teacher), codec, **settings(**options)))
    optimizers, schedules = causal.configure_optimizers()
    causal.optimizers, causal.lr_schedulers = (lambda: optimizers), (lambda: schedules)
    causal.manual_backward = lambda loss: loss.backward()
    asked: list[str] = []
    student.register_forward_pre_hook(lambda _, inputs, view: asked.extend(view), with_kwargs=True)
    before = {role: weights_of(causal, role) for role in ("student", "critic")}
    for position in (1, 2):  # the student's turn, the critic's
        causal.update.position = position
        assert torch.isfinite(causal.training_step(batch(), 0))
    assert {"record", "window", "layout"} <= set(asked)
    assert all(moved(weights, weights_of(causal, role)) for role, weights in before.items())
