"""Stages: each step is the algorithm's, every draw depends on (seed, position) alone, and the loss really falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_stage import NETWORK, batch, prepared, quiet, settings, stage_of

from anyflow.backbone.codec import Codec
from anyflow.backbone.context import Context
from anyflow.backbone.embedded import build_vae
from anyflow.backbone.load import new_backbone
from anyflow.errors import UserError
from anyflow.flowmap.intervals import IntervalShares
from anyflow.flowmap.objective import FlowMapObjective, plain_flow_map_loss, rebalance
from anyflow.stages import update as module
from anyflow.stages.base import Training
from anyflow.stages.batch import Conditioning
from anyflow.stages.codec import CodecObjective, CodecStage, motion_mask
from anyflow.stages.ema import EmaSettings
from anyflow.stages.forward import ForwardStage, draw_times
from anyflow.stages.optimizers import OptimizerSettings
from anyflow.stages.teacher import TeacherStage
from anyflow.stages.update import Update


@pytest.mark.parametrize("kind", [TeacherStage, ForwardStage])
def test_a_step_depends_on_seed_and_position_alone(kind: Any, codec: Codec) -> None:
    extra = {"objective": FlowMapObjective()} if kind is ForwardStage else {}
    stage = stage_of(kind, codec, **extra)
    losses = []
    for position in (1, 2, 1):
        stage.update.position = position
        torch.manual_seed(position * 100 + len(losses))  # the global generator must not matter
        losses.append(float(stage.training_step(batch(), 0).detach()))
    assert losses[0] == losses[2] != losses[1]


def test_the_forward_stage_is_the_plain_objective_balanced(codec: Codec) -> None:
    objective = FlowMapObjective(guidance_scale=2.0)
    stage = stage_of(ForwardStage, codec, objective=objective, shares=IntervalShares(0.5, 0.25))
    stage.update.position = 5
    loss = stage.training_step(batch(), 0)

    data = prepared(stage, batch())
    times = draw_times(stage.update, data, stage.shares, objective.shift)
    plain = plain_flow_map_loss(
        objective,
        data.velocity(stage.backbone),
        data.clean,
        data.noise,
        times.timestep,
        times.r_timestep,
        data.rows,
    )
    mean = plain.per_sample[times.is_diffusion].mean()
    expected = rebalance(plain.per_sample, times.is_diffusion, mean.detach()).mean()
    assert int(times.is_diffusion.sum()) == 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)


def test_dropped_texts_use_the_negative_prompt(codec: Codec) -> None:
    stage = stage_of(TeacherStage, codec, conditioning=Conditioning(negative_prompt="nothing", text_drop=1.0))
    data = prepared(stage, batch())
    assert data.rows.tolist() == [4, 5, 6, 7]
    negative = codec.encode_text(["nothing"])
    chosen = data.conditions_of(data.rows).text
    torch.testing.assert_close(chosen.embeddings[0, : int(negative.lengths[0])], negative.embeddings[0, :-1])
    never = stage_of(TeacherStage, codec, conditioning=Conditioning(text_drop=0.0))
    assert prepared(never, batch()).rows.tolist() == [0, 1, 2, 3]


def test_image_to_video_leaves_the_first_frame_without_loss(codec: Codec) -> None:
    stage = stage_of(TeacherStage, codec, conditioning=Conditioning(i2v_prob=1.0))
    one, other = batch(), batch()
    stage.update.position = 1
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
        stage.update.position = step % 4  # the same four batches of noise and times over again
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
            Training(OptimizerSettings("muon", lr=1e-3), EmaSettings(0.0), total_steps=10, seed=0),
        )
    )
    columns = torch.arange(48).div(24).sub(1).expand(2, 3, 9, 32, 48)
    crop = stage.crop(columns, [torch.Generator().manual_seed(0)] * 2)
    assert crop.shape == (2, 3, 5, 16, 16)
    left = (crop[:, 0, 0, 0, 0] + 1) * 24
    torch.testing.assert_close(left % 8, torch.zeros(2))
    stage.step = 5
    assert stage.crop(columns, [torch.Generator()] * 2).shape == (2, 3, 9, 16, 16)

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


def test_generators_differ_by_purpose_and_position() -> None:
    update = Update(seed=0)
    update.begin_pass()

    def draw(purpose: str, *position: int) -> float:
        return float(torch.rand((), generator=update.generator(purpose, *position)))

    assert draw("noise", 0) == draw("noise", 0)
    assert len({draw("noise", 0), draw("noise", 1), draw("drop"), draw("drop", 0)}) == 4


def test_neighbours_that_share_clips_draw_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample of the update once among the groups; a pass weighs by data ranks."""
    dealt = []
    for rank in range(4):
        monkeypatch.setattr(module, "world", lambda rank=rank: (rank, 4))
        update = Update(0, passes=2, context=Context(2, rank % 2))
        update.begin_pass()
        dealt.append((update.own_samples(3), update.draw_noise("noise", torch.empty(3, 1)).flatten().tolist()))
        assert update.place_of(3) == (0, 12) and update.weight_of_pass(3) == 1
    assert dealt[0] == dealt[1] and dealt[2] == dealt[3]
    assert sorted(dealt[0][0] + dealt[2][0]) == list(range(6))


def test_what_neighbours_have_read_is_compared(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each pass: a clip that one of them replaced would be half of one and half of another."""
    seen: list[Any] = []
    monkeypatch.setattr(Context, "check_same", lambda self, keys: seen.append(keys))
    stage = stage_of(TeacherStage, codec)
    stage.on_train_batch_start({"key": ["alone"]}, 0)
    stage.update.context = Context(2)
    stage.on_train_batch_start({"key": ["shared"]}, 1)
    assert seen == [["shared"]]
