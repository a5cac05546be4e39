"""Fine-tune an any-step model on domain video without losing the few-step ability (section 5b).

Plain flow matching on new data teaches the velocity and lets the long jumps rot. The forward objective on the domain's
clips teaches both at once: it is the same mathematics as forward training, started from any-step weights. A short
on-policy tail may follow:

forward steps:    the student learns the domain by the forward objective
teacher steps:    a teacher, beginning as the base, learns the domain's velocities (the objective's r = t part alone)
on-policy steps:  the student, from its average, is corrected on its own samples against that teacher

The base will not do as a teacher: it knows the old data, and would pull the student back to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.roles import Roles
from anyflow.flowmap.intervals import IntervalShares
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.stages.base import Stage, Training
from anyflow.stages.batch import Batches, Conditioning, FlowBatch
from anyflow.stages.forward import ForwardLoss, draw_times, flow_map
from anyflow.stages.onpolicy import Correction, Rollouts, correct, onpolicy_groups
from anyflow.stages.optimizers import OptimizerGroup
from anyflow.stages.options import OnPolicySettings, OptimizerSettings
from anyflow.stages.parts import StageParts
from anyflow.stages.update import Loss

ALL_AT_ONE_TIME = IntervalShares(1.0, 0.0)
"""Every sample learns the velocity."""


@dataclass(frozen=True)
class TailPlan:
    """Steps of each part of a run with a tail, and how the student moves in the last one."""

    forward_steps: int
    teacher_steps: int
    onpolicy_steps: int
    optimizer: OptimizerSettings

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.forward_steps + self.teacher_steps + self.onpolicy_steps


@dataclass(frozen=True)
class DataPhase:
    """A part of the run that learns from data, before the on-policy steps.

    Attributes:
        group: The optimiser that it moves.
        steps: How many.
        loss: Of a batch.
        reported_as: The loss's names among the figures.
        hand_over: What follows its last step.
    """

    group: str
    steps: int
    loss: Callable[[FlowBatch], Loss]
    reported_as: tuple[str, ...]
    hand_over: Callable[[], None]


class TeacherLoss:
    """A role's velocities on the domain: the forward objective with r = t for every sample."""

    def __init__(self, roles: Roles, batches: Batches, objective: FlowMapObjective) -> None:
        self.ask, self.batches, self.objective = partial(roles, "teacher"), batches, objective

    def __call__(self, data: FlowBatch) -> Loss:
        """The mean over this rank's samples."""
        update = self.batches.update
        times = draw_times(update, data, ALL_AT_ONE_TIME, self.objective.shift)
        return Loss(update.mean(flow_map(self.ask, self.objective, data, times).per_sample), {})


class FinetuneTailStage(Stage):
    """Fine-tuning with the on-policy tail.

    The base has guidance fused, and the teacher's objective keeps it so: in the tail it needs no guidance on top.
    """

    def __init__(
        self,
        roles: Roles,
        codec: Codec,
        training: Training,
        conditioning: Conditioning,
        *,
        plan: TailPlan,
        objective: FlowMapObjective,
        settings: OnPolicySettings,
        shares: IntervalShares | None = None,
        recompute_jumps: bool = False,
    ) -> None:
        groups = {
            "forward": OptimizerGroup("student", training.optimizer, plan.forward_steps, "optimizer"),
            "teacher": OptimizerGroup("teacher", training.optimizer, plan.teacher_steps, "optimizer"),
            **onpolicy_groups(plan.optimizer, settings, plan.onpolicy_steps, "stage.tail.optimizer"),
        }
        super().__init__(roles.student, training, codec=codec, roles=roles, groups=groups)
        self.backbone = roles.student
        self.batches = Batches(codec, conditioning, self.update)
        self.shares = shares or IntervalShares()
        forward = ForwardLoss(roles.student, self.batches, objective, self.shares)
        teacher = TeacherLoss(roles, self.batches, objective)
        rollouts = Rollouts(roles, self.update, settings, objective.shift)
        self.correction = Correction(roles, rollouts, forward, settings, recompute_jumps=recompute_jumps)
        self.counted = (forward, self.correction)
        self.phases = (
            DataPhase("forward", plan.forward_steps, forward, ("loss",), self.go_on_from_the_average),
            DataPhase("teacher", plan.teacher_steps, teacher, ("loss", "teacher_loss"), self.start_critic),
        )

    @classmethod
    def build(cls, parts: StageParts) -> FinetuneTailStage:
        """The stage of a recipe."""
        options, tail = parts.options, parts.options.tail
        plan = TailPlan(options.steps, tail.teacher_steps, tail.steps, tail.optimizer)
        return cls(
            parts.taught,
            parts.codec,
            replace(parts.training, total_steps=plan.total),
            parts.conditioning,
            plan=plan,
            objective=parts.objective,
            settings=replace(options.onpolicy, extra_guidance=0.0),  # the adapted teacher has its guidance fused
            shares=parts.shares,
            recompute_jumps=parts.recompute_jumps,
        )

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One batch of the phase that is due."""
        data, end = self.batches.prepare(batch, self.device, from_samples=self.learns_from_samples), 0
        for phase in self.phases:
            end += phase.steps
            if self.step < end:
                loss = self.learn(phase, data)
                if self.step == end:
                    phase.hand_over()
                return loss
        return correct(self, self.correction, data)

    def learn(self, phase: DataPhase, data: FlowBatch) -> Tensor:
        """Accumulate the gradient of a phase's loss; update when it is complete."""
        loss, figures = phase.loss(data)
        self.manual_backward(loss / self.update.passes)
        loss = loss.detach()
        self.report(**dict.fromkeys(phase.reported_as, loss), **figures)
        self.end_turn(phase.group)
        return loss

    def go_on_from_the_average(self) -> None:
        """What is corrected on-policy is what would be exported."""
        if self.ema is not None:
            self.ema.adopt()

    def start_critic(self) -> None:
        """It begins as the adapted teacher."""
        assert self.roles is not None
        self.roles.copy("teacher", "critic")
