"""Fine-tuning with an on-policy tail: three parts, each with its own optimiser, handing over what they learnt."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_stage import batch, moved, onpolicy_stage, prepared, turn, weights_of

from anyflow.backbone.codec import Codec
from anyflow.flowmap.intervals import IntervalShares
from anyflow.flowmap.objective import FlowMapObjective, flow_matching_loss
from anyflow.stages.ema import EmaSettings
from anyflow.stages.finetune import FinetuneTailStage, TailPlan, TeacherLoss
from anyflow.stages.forward import draw_times
from anyflow.stages.onpolicy import OnPolicySettings
from anyflow.stages.optimizers import OptimizerSettings

PLAN = TailPlan(2, 2, 2, OptimizerSettings("adamw", lr=1e-3, betas=[0.0, 0.999]))


def tail_stage(codec: Codec, **changes: Any) -> FinetuneTailStage:
    options: dict[str, Any] = {
        "total_steps": PLAN.total,
        "settings": OnPolicySettings(extra_guidance=0.0),
        "plan": PLAN,
        **changes,
    }
    return onpolicy_stage(codec, FinetuneTailStage, trains_teacher=True, **options)


def movements(stage: FinetuneTailStage, batches: int) -> list[set[str]]:
    """Which roles each batch moves."""
    found = []
    for _ in range(batches):
        before = {role: weights_of(stage, role) for role in ("student", "teacher", "critic")}
        turn(stage)
        found.append({role for role in before if moved(before[role], weights_of(stage, role))})
    return found


def test_each_part_moves_its_own(codec: Codec) -> None:
    stage = tail_stage(codec, ema=EmaSettings(0.0))
    forward, teacher, correction = (
        [{"student"}] * 2,
        [{"teacher"}, {"teacher", "critic"}],
        [{"student"}, {"critic"}] * 2,
    )
    assert movements(stage, 8) == [*forward, *teacher, *correction]
    assert stage.step == PLAN.total == stage.total_steps


def test_the_critic_begins_as_the_adapted_teacher(codec: Codec) -> None:
    stage = tail_stage(codec)
    movements(stage, 4)
    assert not moved(weights_of(stage, "teacher"), weights_of(stage, "critic"))


def test_the_tail_begins_from_the_average(codec: Codec) -> None:
    stage = tail_stage(codec, ema=EmaSettings(0.5))
    turn(stage)
    assert stage.ema is not None
    assert moved(stage.ema.shadows, weights_of(stage, "student"))
    turn(stage)
    assert not moved(stage.ema.shadows, weights_of(stage, "student"))


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_run_cut_anywhere_goes_on(codec: Codec, cut: int) -> None:
    whole = tail_stage(codec)
    movements(whole, 8)
    first, saved = tail_stage(codec), {}
    movements(first, cut)
    first.on_save_checkpoint(saved)
    second = tail_stage(codec)
    second.load_state_dict(first.state_dict())
    second.on_load_checkpoint(saved)
    for kind in ("optimizers", "lr_schedulers"):
        for new, old in zip(getattr(second, kind)(), getattr(first, kind)(), strict=True):
            new.load_state_dict(old.state_dict())
    movements(second, 8 - cut)
    for role in ("student", "teacher", "critic"):
        assert not moved(weights_of(whole, role), weights_of(second, role))
    assert whole.ema is not None and second.ema is not None
    assert all(map(torch.equal, whole.ema.shadows, second.ema.shadows))


def test_the_teachers_loss_is_the_velocitys(codec: Codec) -> None:
    """With guidance off and weight one it is plain flow matching: the teacher asked at r = t."""
    stage = tail_stage(codec)
    loss = TeacherLoss(stage.roles, stage.batches, FlowMapObjective(guidance_scale=1.0, weight="uniform"))
    stage.update.position = 3
    data = prepared(stage, batch())
    timestep = draw_times(stage.update, data, IntervalShares(1.0, 0.0), 5.0).timestep
    velocity = data.velocity(partial(stage.roles, "teacher"))
    expected = flow_matching_loss(velocity, data.clean, data.noise, timestep, data.rows)
    torch.testing.assert_close(loss(data).mean.float(), expected.mean().float())
