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
from typing import Any

from torch import Tensor

from anyflow.flowmap.intervals import IntervalShares
from anyflow.stages.flow import FlowBatch
from anyflow.stages.onpolicy import Mover, OnPolicyStage, onpolicy_movers
from anyflow.stages.options import OnPolicySettings, OptimizerSettings
from anyflow.stages.parts import StageParts

ALL_AT_ONE_TIME = IntervalShares(1.0, 0.0)
"""Every sample learns the velocity."""


@dataclass(frozen=True)
class TailPlan:
    """Steps of each part of a run with a tail."""

    forward_steps: int
    teacher_steps: int
    onpolicy_steps: int

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.forward_steps + self.teacher_steps + self.onpolicy_steps


@dataclass(frozen=True)
class DataPhase:
    """A part of the run that learns from data, before the on-policy steps.

    Attributes:
        mover: The optimiser that it moves.
        steps: How many.
        loss: Of a batch.
        reported_as: The loss's names among the figures.
        hand_over: What follows its last step.
    """

    mover: str
    steps: int
    loss: Callable[[FlowBatch], Tensor]
    reported_as: tuple[str, ...]
    hand_over: Callable[[], None]


class FinetuneTailStage(OnPolicyStage):
    """Fine-tuning with the on-policy tail.

    The base has guidance fused, and the teacher's objective keeps it so: in the tail it needs no guidance on top.
    """

    def __init__(
        self,
        *args: Any,
        plan: TailPlan,
        settings: OnPolicySettings,
        optimizer: OptimizerSettings,
        tail_optimizer: OptimizerSettings,
        **kwargs: Any,
    ) -> None:
        movers = {
            "forward": Mover("student", optimizer, plan.forward_steps, "optimizer"),
            "teacher": Mover("teacher", optimizer, plan.teacher_steps, "optimizer"),
            **onpolicy_movers(tail_optimizer, settings, plan.onpolicy_steps, "stage.tail.optimizer"),
        }
        kwargs |= {"settings": settings, "optimizer": optimizer, "movers": movers, "total_steps": plan.total}
        super().__init__(*args, **kwargs)
        self.phases = (
            DataPhase("forward", plan.forward_steps, self.forward_loss, ("loss",), self.go_on_from_the_average),
            DataPhase("teacher", plan.teacher_steps, self.teacher_loss, ("loss", "teacher_loss"), self.start_critic),
        )

    @classmethod
    def build(cls, parts: StageParts) -> FinetuneTailStage:
        """The stage of a recipe."""
        taken, tail = cls.corrected(parts), parts.options.tail
        del taken["total_steps"]
        # the adapted teacher has its guidance fused, as its base
        taken["settings"] = replace(taken["settings"], extra_guidance=0.0)
        plan = TailPlan(parts.options.steps, tail.teacher_steps, tail.steps)
        return cls(parts.taught, parts.codec, plan=plan, tail_optimizer=tail.optimizer, **taken)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One batch of the phase that is due."""
        data, end = self.prepare(batch), 0
        for phase in self.phases:
            end += phase.steps
            if self.step < end:
                loss = self.data_turn(phase, data)
                if self.step == end:
                    phase.hand_over()
                return loss
        return self.onpolicy_turn(data)

    def data_turn(self, phase: DataPhase, data: FlowBatch) -> Tensor:
        """Accumulate the gradient of a phase's loss; update when it is complete."""
        loss = phase.loss(data)
        self.manual_backward(loss / self.passes)
        loss = loss.detach()
        self.report(**dict.fromkeys(phase.reported_as, loss))
        if self.is_between_updates:
            self.update(phase.mover)
            self.step += 1
        return loss

    def go_on_from_the_average(self) -> None:
        """What is corrected on-policy is what would be exported."""
        if self.ema is not None:
            self.ema.adopt()

    def start_critic(self) -> None:
        """It begins as the adapted teacher."""
        self.roles.copy("teacher", "critic")

    def teacher_loss(self, data: FlowBatch) -> Tensor:
        """The teacher's velocities on the domain: the forward objective with r = t for every sample."""
        times = self.draw_times(len(data.clean), ALL_AT_ONE_TIME)
        return self.mean_of_update(self.flow_map(data, self.velocity(data.text, "teacher"), times).per_sample)
