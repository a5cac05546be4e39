"""Forward flow-map training: mean velocities learnt from data along the path (section 3).

draw t >= r;  z = path(clean, noise, t)
prediction = fuse guidance into u(z, t, r);  target = v - (t - r) du/dt      (flowmap/objective.py)
balance every interval's loss to the diffusion samples';  loss = mean
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from anyflow.flowmap.chunks import ChunkLayout, Lesson
from anyflow.flowmap.intervals import Intervals, draw_intervals
from anyflow.flowmap.objective import FlowMapLoss, FlowMapObjective, Velocity, flow_map_loss, rebalance
from anyflow.stages.base import global_mean, world
from anyflow.stages.flow import FlowBatch, FlowStage


@dataclass(frozen=True)
class IntervalShares:
    """How the global batch is divided: ``diffusion`` has r = t, ``consistency`` has r = 0, the rest a free r."""

    diffusion: float = 0.5
    consistency: float = 0.25


class ForwardStage(FlowStage):
    """The flow-map objective on data."""

    def __init__(
        self, *args: Any, objective: FlowMapObjective, shares: IntervalShares | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.shares = shares or IntervalShares()

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """The forward loss of one batch."""
        loss = self.forward_loss(self.prepare(batch))
        self.report(loss=loss)
        return loss

    def forward_loss(self, data: FlowBatch) -> Tensor:
        """Section 3, from the drawn intervals to the balanced mean over this rank's samples."""
        layout = self.draw_layout(data)
        result = self.flow_map(data, self.velocity(data.text, layout=layout), self.shares, layout)
        per_sample = result.per_sample
        self.note_losses(per_sample)
        diffusion_mean = global_mean(per_sample, result.is_diffusion)
        if diffusion_mean is not None:
            self.report(diffusion_loss=diffusion_mean)
        if self.objective.rebalance:
            per_sample = rebalance(per_sample, result.is_diffusion, diffusion_mean)
        loss = per_sample.mean()
        return loss + self.bidirectional_loss(data) if self.keeps_bidirectional() else loss

    def flow_map(
        self, data: FlowBatch, velocity: Velocity, shares: IntervalShares, layout: ChunkLayout | None = None
    ) -> FlowMapLoss:
        """The objective of a velocity field on this rank's samples, each at the interval drawn for it."""
        intervals = self.draw_times(len(data.clean), shares)
        lesson = self.lesson(data, intervals.timestep, intervals.r_timestep, layout)
        return self.objective_of(self.objective, velocity, lesson, data.rows)

    def bidirectional_loss(self, data: FlowBatch) -> Tensor:
        """Plain flow matching of all frames at once, guidance fused: what keeps a causal network's other mode alive."""
        timestep = self.draw_logit_normal("bidirectional timestep", len(data.clean), self.objective.shift)
        lesson = self.lesson(data, timestep, timestep)
        unweighted = replace(self.objective, weight="uniform")
        loss = self.objective_of(unweighted, self.velocity(data.text), lesson, data.rows).per_sample.mean()
        self.report(bidirectional_loss=loss.detach())
        return loss

    def objective_of(
        self, objective: FlowMapObjective, velocity: Velocity, lesson: Lesson, rows: Tensor
    ) -> FlowMapLoss:
        """An objective of a velocity field on what is taught."""
        return flow_map_loss(
            objective,
            velocity,
            lesson.clean,
            lesson.noise,
            lesson.timestep,
            lesson.r_timestep,
            rows,
            lesson.loss_frames,
            same_calls=world()[1] > 1,
        )

    def draw_times(self, batch_size: int, shares: IntervalShares) -> Intervals:
        """This rank's part of the global batch's intervals."""
        rank, ranks = world()
        uniforms = self.draw_all("intervals", batch_size * ranks, 2)
        intervals = draw_intervals(uniforms, shares.diffusion, shares.consistency, self.objective.shift)
        return intervals.for_rank(rank, ranks).to(self.device)
