"""Forward flow-map training: mean velocities learnt from data along the path (section 3).

draw t >= r;  z = path(clean, noise, t)
prediction = fuse guidance into u(z, t, r);  target = v - (t - r) du/dt      (flowmap/objective.py)
balance every interval's loss to the diffusion samples';  loss = mean
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anyflow.flowmap.chunks import ChunkLayout, Lesson
from anyflow.flowmap.intervals import Intervals, IntervalShares, draw_intervals
from anyflow.flowmap.objective import FlowMapLoss, FlowMapObjective, Velocity, flow_map_loss, rebalance
from anyflow.stages.base import sum_over_ranks, world
from anyflow.stages.flow import FlowBatch, FlowStage
from anyflow.stages.parts import StageParts


class ForwardStage(FlowStage):
    """The flow-map objective on data."""

    def __init__(
        self, *args: Any, objective: FlowMapObjective, shares: IntervalShares | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.shares = shares or IntervalShares()
        self._diffusion: Tensor | None = None  # sum and count of the update's diffusion losses, of the passes so far
        self._last_diffusion_loss: Tensor | None = None

    @classmethod
    def build(cls, parts: StageParts) -> ForwardStage:
        """The stage of a recipe."""
        return cls(parts.backbone, parts.codec, **parts.mapped)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """The forward loss of one batch."""
        loss = self.forward_loss(self.prepare(batch))
        self.report(loss=loss)
        return loss

    def forward_loss(self, data: FlowBatch) -> Tensor:
        """Section 3, from the drawn intervals to the balanced mean over this rank's samples."""
        layout = self.draw_layout(data)
        intervals = self.draw_times(len(data.clean), self.shares)
        result = self.flow_map(data, self.velocity(data.text, layout=layout), intervals, layout)
        per_sample = result.per_sample
        self.note_losses(per_sample)
        diffusion_loss = self.diffusion_loss(per_sample, intervals)
        if self.objective.rebalance:
            per_sample = rebalance(per_sample, result.is_diffusion, diffusion_loss)
        loss = self.mean_of_update(per_sample)
        return loss + self.bidirectional_loss(data) if self.keeps_bidirectional() else loss

    def flow_map(
        self, data: FlowBatch, velocity: Velocity, intervals: Intervals, layout: ChunkLayout | None = None
    ) -> FlowMapLoss:
        """The objective of a velocity field on this rank's samples, each at the interval drawn for it."""
        lesson = self.lesson(data, intervals.timestep, intervals.r_timestep, layout)
        return self.objective_of(self.objective, velocity, lesson, data.rows)

    def diffusion_loss(self, per_sample: Tensor, intervals: Intervals) -> Tensor | None:
        """The mean diffusion loss of the update's whole batch, which intervals are weighed against (sec. 3, step 8).

        Diffusion samples come first: when the first interval is weighed, no rank or later pass has one left. An update
        of so few samples that none is a diffusion one takes the mean of the last that had some; None before that.
        """
        first, samples = self.place_of(len(per_sample))
        count = self.shares.counts(samples, self.position)[0]
        if not count:
            return self._last_diffusion_loss
        if first == 0:
            self._diffusion = None
        if first < count:  # some rank has one in this pass
            own = per_sample.detach()[: intervals.num_diffusion].double()
            total = sum_over_ranks(torch.stack([own.sum(), torch.ones_like(own).sum()]))
            self._diffusion = total if self._diffusion is None else self._diffusion + total
        assert self._diffusion is not None, "an update begins with its diffusion samples"
        mean = (self._diffusion[0] / self._diffusion[1]).to(per_sample.dtype)
        self._last_diffusion_loss = mean
        self.report(diffusion_loss=mean)
        return mean

    def counters(self) -> dict[str, Any]:
        return {**super().counters(), "diffusion_loss": self._last_diffusion_loss}

    def count_from(self, counters: dict[str, Any]) -> None:
        super().count_from(counters)
        self._last_diffusion_loss = counters.get("diffusion_loss")

    def bidirectional_loss(self, data: FlowBatch) -> Tensor:
        """Plain flow matching of all frames at once, guidance fused: what keeps a causal network's other mode alive."""
        timestep = self.draw_logit_normal("bidirectional timestep", len(data.clean), self.objective.shift)
        lesson = self.lesson(data, timestep, timestep)
        unweighted = replace(self.objective, weight="uniform")
        per_sample = self.objective_of(unweighted, self.velocity(data.text), lesson, data.rows).per_sample
        self.note_losses(per_sample)
        loss = self.mean_of_update(per_sample)
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
        """This rank's part of the intervals of the update's whole batch."""
        uniforms = self.draw_all("intervals", self.place_of(batch_size)[1], 2)
        intervals = draw_intervals(uniforms, shares, self.objective.shift, step=self.position)
        return intervals.of(self.own_samples(batch_size)).to(self.device)
