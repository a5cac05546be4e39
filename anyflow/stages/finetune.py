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

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from anyflow.flowmap.intervals import IntervalShares
from anyflow.stages.flow import FlowBatch
from anyflow.stages.onpolicy import Mover, OnPolicyStage
from anyflow.stages.options import OptimizerSettings
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


class FinetuneTailStage(OnPolicyStage):
    """Fine-tuning with the on-policy tail.

    The base has guidance fused, and the teacher's objective keeps it so: in the tail it needs no guidance on top.
    """

    def __init__(
        self, *args: Any, plan: TailPlan, optimizer: OptimizerSettings, tail_optimizer: OptimizerSettings, **kwargs: Any
    ) -> None:
        super().__init__(*args, optimizer=tail_optimizer, total_steps=plan.onpolicy_steps, **kwargs)
        self.plan = plan
        self.total_steps = plan.total
        student = self.movers.pop("student")
        self.movers = {
            "forward": Mover("student", optimizer, plan.forward_steps, "optimizer"),
            "teacher": Mover("teacher", optimizer, plan.teacher_steps, "optimizer"),
            "student": Mover("student", tail_optimizer, student.updates, "stage.tail.optimizer"),
            **self.movers,
        }

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
        """One batch of the part that is due."""
        data = self.prepare(batch)
        plan = self.plan
        if self.step < plan.forward_steps:
            loss = self.data_turn("forward", data)
            if self.step == plan.forward_steps and self.ema is not None:
                self.ema.adopt()
        elif self.step < plan.forward_steps + plan.teacher_steps:
            loss = self.data_turn("teacher", data)
            if self.step == plan.forward_steps + plan.teacher_steps:
                self.roles.copy("teacher", "critic")
        else:
            loss = self.onpolicy_turn(data)
        return loss

    def data_turn(self, name: str, data: FlowBatch) -> Tensor:
        """Accumulate the gradient of the student's or the teacher's loss on data; update when it is complete."""
        loss = self.forward_loss(data) if name == "forward" else self.teacher_loss(data)
        self.manual_backward(loss / self.passes)
        loss = loss.detach()
        self.report(**({"loss": loss} if name == "forward" else {"loss": loss, "teacher_loss": loss}))
        if self.is_between_updates:
            self.update(name)
            self.step += 1
        return loss

    def teacher_loss(self, data: FlowBatch) -> Tensor:
        """The teacher's velocities on the domain: the forward objective with r = t for every sample."""
        times = self.draw_times(len(data.clean), ALL_AT_ONE_TIME)
        return self.mean_of_update(self.flow_map(data, self.velocity(data.text, "teacher"), times).per_sample)
