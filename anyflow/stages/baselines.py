"""The baselines: what few-step video models are trained by today, on the same network, data and budget (section 7).

Both train endpoint networks, which know one time and are sampled by noising their answer afresh (flowmap/endpoint.py):

consistency:  u = w - t du/dt along the teacher's guided path w;  loss = |u - target|^2, normalised      (rCM's role)
dmd:          samples = a few re-noising steps from noise, gradient through the last one; then as on-policy:
              gradient = critic's clean prediction - teacher's of the noised samples             (Self-Forcing's role)
              + forward_weight * the consistency loss on data (rCM proper has both)

Plain flow matching is the teacher stage, and plain fine-tuning is the finetune stage with every sample at r = t
(``stage.diffusion_share=1 stage.consistency_share=0``).
"""

from __future__ import annotations

from itertools import count
from typing import Any

from torch import Tensor

from anyflow.backbone.roles import Roles, bind
from anyflow.flowmap.endpoint import Renoise, consistency_loss, normalised
from anyflow.flowmap.intervals import IntervalShares
from anyflow.flowmap.rollout import BackwardSimulation, RenoisingSimulation
from anyflow.flowmap.sampling import Take, take_jump
from anyflow.stages.base import world
from anyflow.stages.flow import FlowBatch
from anyflow.stages.forward import ForwardStage
from anyflow.stages.onpolicy import OnPolicyStage
from anyflow.stages.parts import StageParts

TO_DATA = IntervalShares(0.0, 1.0)
"""Every sample learns the jump to the data."""


class ConsistencyStage(ForwardStage):
    """Consistency distillation of a teacher, along its own path."""

    def __init__(self, roles: Roles, *args: Any, **kwargs: Any) -> None:
        super().__init__(roles.student, *args, **{**kwargs, "shares": TO_DATA})
        self.roles = roles

    @classmethod
    def build(cls, parts: StageParts) -> ConsistencyStage:
        """The stage of a recipe."""
        return cls(parts.taught, parts.codec, **parts.mapped)

    def forward_loss(self, data: FlowBatch) -> Tensor:
        return consistency(self, self.roles, data)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.roles.place(self.device)


class DmdStage(OnPolicyStage):
    """Distribution matching on samples of a re-noising sampler of a few steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "shares": TO_DATA})

    def draw_plan(self) -> BackwardSimulation:
        plan = super().draw_plan()
        return RenoisingSimulation(plan.num_steps, plan.index, plan.shift)

    def simulate(self, data: FlowBatch, plan: BackwardSimulation, take: Take = take_jump) -> Tensor:
        jumps = count()
        return super().simulate(data, plan, Renoise(lambda like: self.draw_noise(f"fresh noise {next(jumps)}", like)))

    def forward_loss(self, data: FlowBatch) -> Tensor:
        return consistency(self, self.roles, data)


def consistency(stage: ForwardStage, roles: Roles, data: FlowBatch) -> Tensor:
    """The mean normalised consistency loss of this rank's samples, over chunks where the teacher sees chunks."""
    layout = stage.draw_layout(data) if roles.network("teacher").is_causal else None
    view = {} if layout is None else {"layout": layout}
    times = stage.draw_times(len(data.clean), stage.shares)
    lesson = stage.lesson(data, times.timestep, times.r_timestep, layout)
    per_sample = consistency_loss(
        stage.objective,
        bind(roles, "student", data.text, **view),
        bind(roles, "teacher", data.text, **view),
        lesson.clean,
        lesson.noise,
        lesson.timestep,
        data.rows,
        lesson.loss_frames,
        same_calls=world()[1] > 1,
    )
    stage.note_losses(per_sample)
    return stage.mean_of_update(normalised(per_sample))
