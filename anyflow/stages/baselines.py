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

from functools import partial
from itertools import count
from typing import Any

from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.roles import Roles
from anyflow.flowmap.endpoint import Renoise, consistency_loss, normalised
from anyflow.flowmap.intervals import IntervalShares
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.flowmap.rollout import BackwardSimulation, RenoisingSimulation
from anyflow.flowmap.sampling import Take, take_jump
from anyflow.stages.base import Stage, Training
from anyflow.stages.batch import Batches, Conditioning, FlowBatch
from anyflow.stages.forward import draw_times
from anyflow.stages.onpolicy import Correction, Rollouts, correct, onpolicy_groups
from anyflow.stages.options import OnPolicySettings
from anyflow.stages.parts import StageParts
from anyflow.stages.update import Loss, world

TO_DATA = IntervalShares(0.0, 1.0)
"""Every sample learns the jump to the data."""


class ConsistencyLoss:
    """The normalised consistency loss on data, over chunks where the teacher sees chunks."""

    def __init__(self, roles: Roles, batches: Batches, objective: FlowMapObjective) -> None:
        self.roles, self.batches, self.objective = roles, batches, objective

    def __call__(self, data: FlowBatch) -> Loss:
        """The mean over this rank's samples."""
        roles, update = self.roles, self.batches.update
        layout = self.batches.draw_layout(roles.student, data) if roles.network("teacher").is_causal else None
        times = draw_times(update, data, TO_DATA, self.objective.shift)
        on_path = data.on_path(times.timestep, times.r_timestep, layout)
        per_sample = consistency_loss(
            self.objective,
            data.velocity(partial(roles, "student"), layout),
            data.velocity(partial(roles, "teacher"), layout),
            on_path.clean,
            on_path.noise,
            on_path.timestep,
            data.rows,
            on_path.loss_frames,
            same_calls=world()[1] > 1,
        )
        update.note(per_sample)
        return Loss(update.mean(normalised(per_sample)), {})


class ConsistencyStage(Stage):
    """Consistency distillation of a teacher, along its own path."""

    shares = TO_DATA

    def __init__(
        self,
        roles: Roles,
        codec: Codec,
        training: Training,
        conditioning: Conditioning,
        *,
        objective: FlowMapObjective,
    ) -> None:
        super().__init__(roles.student, training, codec=codec, roles=roles)
        self.backbone = roles.student
        self.batches = Batches(codec, conditioning, self.update)
        self.loss = ConsistencyLoss(roles, self.batches, objective)

    @classmethod
    def build(cls, parts: StageParts) -> ConsistencyStage:
        """The stage of a recipe."""
        return cls(parts.taught, parts.codec, parts.training, parts.conditioning, objective=parts.objective)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """The consistency loss of one batch."""
        loss, _ = self.loss(self.batches.prepare(batch, self.device))
        self.report(loss=loss)
        return loss


class RenoisingRollouts(Rollouts):
    """Samples of a re-noising sampler of a few steps."""

    def draw(self) -> BackwardSimulation:
        plan = super().draw()
        return RenoisingSimulation(plan.num_steps, plan.index, plan.shift)

    def sample(self, data: FlowBatch, plan: BackwardSimulation, take: Take = take_jump) -> Tensor:
        jumps = count()
        fresh = Renoise(lambda like: self.update.draw_noise(f"fresh noise {next(jumps)}", like))
        return super().sample(data, plan, fresh)


class DmdStage(Stage):
    """Distribution matching on samples of a re-noising sampler."""

    shares = TO_DATA

    def __init__(
        self,
        roles: Roles,
        codec: Codec,
        training: Training,
        conditioning: Conditioning,
        *,
        objective: FlowMapObjective,
        settings: OnPolicySettings,
    ) -> None:
        groups = onpolicy_groups(training.optimizer, settings, training.total_steps)
        super().__init__(roles.student, training, codec=codec, roles=roles, groups=groups)
        self.backbone = roles.student
        self.batches = Batches(codec, conditioning, self.update)
        on_data = ConsistencyLoss(roles, self.batches, objective)
        rollouts = RenoisingRollouts(roles, self.update, settings, objective.shift)
        self.correction = Correction(roles, rollouts, on_data, settings)
        self.counted = (self.correction,)

    @classmethod
    def build(cls, parts: StageParts) -> DmdStage:
        """The stage of a recipe."""
        objective, settings = parts.objective, parts.options.onpolicy
        return cls(
            parts.taught, parts.codec, parts.training, parts.conditioning, objective=objective, settings=settings
        )

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One pass of the student's update or of the critic's."""
        data = self.batches.prepare(batch, self.device, from_samples=self.learns_from_samples)
        return correct(self, self.correction, data)
