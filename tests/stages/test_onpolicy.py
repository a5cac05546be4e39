"""The on-policy stage: whose turn it is, what moves, and that nothing of it is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_stage import CAPTIONS, batch, moved, onpolicy_stage, prepared, turn, weights_of

from anyflow.backbone.codec import Codec
from anyflow.stages.batch import Conditioning
from anyflow.stages.onpolicy import OnPolicySettings


def test_student_and_critic_take_turns_and_the_teacher_rests(codec: Codec) -> None:
    stage = onpolicy_stage(codec)
    assert stage.roles.frozen is not None
    teacher = [weight.clone() for weight in stage.roles.frozen.parameters()]
    for mover, rester, step in [("student", "critic", 0), ("critic", "student", 1)]:
        moving, resting = weights_of(stage, mover), weights_of(stage, rester)
        turn(stage)
        assert moved(moving, weights_of(stage, mover)) and not moved(resting, weights_of(stage, rester))
        assert stage.step == step
    assert not moved(teacher, list(stage.roles.frozen.parameters()))
    assert not any("teacher" in name or "roles" in name for name in stage.state_dict()), "a frozen teacher is not saved"


def test_accumulated_turns_move_once(codec: Codec) -> None:
    stage = onpolicy_stage(codec, settings=OnPolicySettings(critic_turns=2), passes=2)
    changes = []
    for _ in range(6):
        before = {role: weights_of(stage, role) for role in ("student", "critic")}
        turn(stage)
        changes.append([role for role in before if moved(before[role], weights_of(stage, role))])
    assert changes == [[], ["student"], [], ["critic"], [], ["critic"]]
    assert stage.step == 1 and stage.turn == 0


def test_a_run_cut_between_the_updates_goes_on_with_the_critics(codec: Codec) -> None:
    whole = onpolicy_stage(codec)
    for _ in range(3):
        turn(whole)
    first = onpolicy_stage(codec)
    turn(first)
    saved: dict[str, Any] = {}
    first.on_save_checkpoint(saved)
    second = onpolicy_stage(codec)
    second.load_state_dict(first.state_dict())
    second.on_load_checkpoint(saved)
    for new, old in zip(second.optimizers(), first.optimizers(), strict=True):  # type: ignore[arg-type]
        new.load_state_dict(old.state_dict())
    for _ in range(2):
        turn(second)
    for role in ("student", "critic"):
        assert not moved(weights_of(whole, role), weights_of(second, role))
    assert whole.ema is not None and second.ema is not None
    assert all(map(torch.equal, whole.ema.shadows, second.ema.shadows))


def test_a_perfect_student_without_co_training_is_left_alone(codec: Codec) -> None:
    """Critic and teacher agree, guidance is off: nothing pulls. Co-training alone then moves the student."""
    alone = onpolicy_stage(codec, settings=OnPolicySettings(extra_guidance=0.0, forward_weight=0.0))
    before = weights_of(alone, "student")
    alone.update.position = 1
    alone.correction.generator_turn(prepared(alone, batch()), alone.manual_backward)
    assert all(weight.grad is None or not weight.grad.any() for _, weight in alone.roles.parameters("student"))
    assert not moved(before, weights_of(alone, "student"))
    co_trained = onpolicy_stage(codec, settings=OnPolicySettings(extra_guidance=0.0))
    co_trained.update.position = 1
    co_trained.correction.generator_turn(prepared(co_trained, batch()), co_trained.manual_backward)
    assert any(weight.grad is not None and weight.grad.any() for _, weight in co_trained.roles.parameters("student"))


def test_given_frames_come_back_and_carry_nothing(codec: Codec) -> None:
    stage = onpolicy_stage(codec, conditioning=Conditioning(i2v_prob=1.0))
    stage.update.position = 1
    data = prepared(stage, batch())
    assert torch.equal(stage.correction.rollouts.sample(data, stage.correction.rollouts.draw())[:, 0], data.clean[:, 0])
    turn(stage)
    turn(stage)
    assert stage.step == 1


@pytest.mark.parametrize("i2v", [0.0, 1.0])
def test_jumps_taken_again_give_the_gradient_of_jumps_kept(codec: Codec, i2v: float) -> None:
    gradients = []
    for recompute in (False, True):
        stage = onpolicy_stage(
            codec,
            settings=OnPolicySettings(budgets=[8]),
            recompute_jumps=recompute,
            conditioning=Conditioning(i2v_prob=i2v),
        )
        stage.update.position = 3
        assert len(stage.correction.rollouts.draw().jumps) == 3
        stage.correction.generator_turn(prepared(stage, batch()), stage.manual_backward)
        gradients.append({name: weight.grad for name, weight in stage.roles.parameters("student")})
    kept, again = gradients
    size = torch.stack([gradient.norm() for gradient in kept.values()]).norm()
    for name, gradient in kept.items():
        assert float((gradient - again[name]).norm()) < 1e-6 * float(size), name


@pytest.mark.parametrize("i2v", [0.0, 1.0])
def test_a_critics_turn_encodes_no_more_than_given_frames(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, i2v: float
) -> None:
    """It moves the critic as it would with the clips' latents at hand, which it only needs the shape of."""
    video = torch.randint(256, (2, 5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    seen, encode = [], codec.encode_video
    monkeypatch.setattr(codec, "encode_video", lambda frames: (seen.append(tuple(frames.shape)), encode(frames))[1])
    critics = []
    for ready in (False, True):
        stage = onpolicy_stage(codec, conditioning=Conditioning(i2v_prob=i2v))
        clips = {"latents": encode(video)} if ready else {"frames": video}
        for _ in range(2):
            stage.begin_pass()
            stage.training_step({**clips, "caption": CAPTIONS[:2]}, 0)
        critics.append(weights_of(stage, "critic"))
    assert seen == [(2, 5, 32, 32, 3), *([(2, 1, 32, 32, 3)] if i2v else [])]
    for one, other in zip(*critics, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
