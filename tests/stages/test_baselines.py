"""The baselines: what moves, what is asked at one time, and how their samples are made."""

from __future__ import annotations

from typing import Any

import torch
from tiny_stage import NETWORK, batch, moved, onpolicy_stage, prepared, quiet, settings, turn, weights_of

from anyflow.backbone.codec import Codec
from anyflow.backbone.load import new_backbone
from anyflow.backbone.roles import SeparateRoles
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.flowmap.rollout import RenoisingSimulation
from anyflow.stages.baselines import ConsistencyStage, DmdStage
from anyflow.stages.batch import Conditioning
from anyflow.stages.onpolicy import OnPolicySettings

FOUR_STEPS = OnPolicySettings(budgets=(4,), forward_weight=0.0)


def consistency_stage(
    codec: Codec, architecture: str = "bidirectional", config: dict[str, Any] = NETWORK, **changes: Any
) -> ConsistencyStage:
    networks = [new_backbone(config, seed, architecture) for seed in (0, 1)]
    torch.manual_seed(3)
    for network in networks:
        torch.nn.init.normal_(network.transformer.proj_out.weight, std=0.1)
    objective = FlowMapObjective(guidance_scale=2.0, weight="uniform")
    return quiet(
        ConsistencyStage(SeparateRoles(*networks, has_critic=False), codec, objective=objective, **settings(**changes))
    )


def watch_times(network: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The times that a network is asked at, from now on."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1:3]))
    return seen


def test_consistency_moves_the_student_alone_and_knows_one_time(codec: Codec) -> None:
    stage = consistency_stage(codec)
    assert stage.roles.frozen is not None and "critic" not in stage.roles.others
    asked, taught = watch_times(stage.backbone), watch_times(stage.roles.frozen)
    stage.update.position = 1
    loss = stage.training_step(batch(), 0)
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert all(torch.equal(t, r) for t, r in [*taught, *asked]) and asked and taught
    gradients = [weight.grad for weight in stage.backbone.parameters() if weight.requires_grad]
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    assert all(weight.grad is None for weight in stage.roles.frozen.parameters())
    assert not any("roles" in name or "frozen" in name for name in stage.state_dict()), "a teacher is not saved"


def test_consistency_keeps_a_given_first_frame(codec: Codec) -> None:
    stage = consistency_stage(codec, conditioning=Conditioning(i2v_prob=1.0))
    asked = watch_times(stage.backbone)
    stage.update.position = 1
    stage.training_step(batch(), 0)
    assert all(not t[:, 0].any() and t[:, 1].all() for t, _ in asked)


def test_a_causal_student_is_taught_in_chunks_by_a_causal_teacher(codec: Codec) -> None:
    network = {**NETWORK, "chunk_partition": [1, 1], "full_chunk_limit": 2}
    stage = consistency_stage(codec, "causal", network)
    asked, taught = watch_times(stage.backbone), watch_times(stage.roles.frozen)
    stage.update.position = 1
    stage.training_step(batch(), 0).backward()
    assert all(t.shape[1] == 4 and not t[:, 2:].any() for t, _ in [*asked, *taught]), "noisy frames and clean copies"


def test_dmd_takes_turns_on_samples_of_a_few_noised_steps(codec: Codec) -> None:
    stage = onpolicy_stage(codec, DmdStage, settings=FOUR_STEPS)
    asked = watch_times(stage.roles.student)
    for mover, rester in [("student", "critic"), ("critic", "student")]:
        moving, resting = weights_of(stage, mover), weights_of(stage, rester)
        turn(stage)
        assert moved(moving, weights_of(stage, mover)) and not moved(resting, weights_of(stage, rester))
    assert stage.step == 1
    assert all(torch.equal(t, r) for t, r in asked)
    steps = {float(t[0]) for t, _ in asked}
    assert 1000.0 in steps and len(steps) <= 4


def test_dmd_rollouts_are_of_the_drawn_step_and_the_same_for_the_same_position(codec: Codec) -> None:
    stage = onpolicy_stage(codec, DmdStage, settings=FOUR_STEPS)
    stage.update.position = 1
    data = prepared(stage, batch())
    plan = stage.correction.rollouts.draw()
    assert isinstance(plan, RenoisingSimulation) and plan.num_steps == 4
    asked = watch_times(stage.roles.student)
    samples = stage.correction.rollouts.sample(data, RenoisingSimulation(4, 2, 5.0))
    assert len(asked) == 3
    assert torch.equal(samples, stage.correction.rollouts.sample(data, RenoisingSimulation(4, 2, 5.0)))
    stage.update.position = 2
    assert not torch.equal(samples, stage.correction.rollouts.sample(data, RenoisingSimulation(4, 2, 5.0)))


def test_dmd_may_be_held_by_the_consistency_loss(codec: Codec) -> None:
    """rCM proper: without a pull of the distribution, what moves the student is the teacher's path."""
    stage = onpolicy_stage(codec, DmdStage, settings=OnPolicySettings(budgets=(4,), extra_guidance=0.0))
    stage.update.position = 1
    asked = watch_times(stage.roles.frozen)
    stage.correction.generator_turn(prepared(stage, batch()), stage.manual_backward)
    assert len(asked) == 2, "once by the distribution matching, once by the consistency loss"
    assert any(weight.grad is not None and weight.grad.any() for _, weight in stage.roles.parameters("student"))


def test_given_frames_come_back_from_a_noised_rollout(codec: Codec) -> None:
    stage = onpolicy_stage(codec, DmdStage, settings=FOUR_STEPS, conditioning=Conditioning(i2v_prob=1.0))
    stage.update.position = 1
    data = prepared(stage, batch())
    assert torch.equal(stage.correction.rollouts.sample(data, RenoisingSimulation(4, 3, 5.0))[:, 0], data.clean[:, 0])
