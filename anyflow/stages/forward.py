"""Forward flow-map training: mean velocities learnt from data along the path (section 3).

draw t >= r;  z = path(clean, noise, t)
prediction = fuse guidance into u(z, t, r);  target = v - (t - r) du/dt      (flowmap/objective.py)
balance every interval's loss to the diffusion samples';  loss = mean
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.protocol import Ask, FlowMapBackbone
from anyflow.flowmap.chunks import ChunkLayout
from anyflow.flowmap.intervals import Intervals, IntervalShares, draw_intervals
from anyflow.flowmap.objective import FlowMapLoss, FlowMapObjective, flow_map_loss, rebalance
from anyflow.stages.base import Stage, Training
from anyflow.stages.batch import Batches, Conditioning, FlowBatch
from anyflow.stages.parts import StageParts
from anyflow.stages.update import Loss, Update, sum_over_ranks, world


class ForwardLoss:
    """The flow-map objective on data, from the drawn intervals to the balanced mean.

    Attributes:
        network: What learns.
        batches: What it learns from.
        objective: The options of the objective.
        shares: How samples are dealt to intervals.
    """

    def __init__(
        self, network: FlowMapBackbone, batches: Batches, objective: FlowMapObjective, shares: IntervalShares
    ) -> None:
        self.network, self.batches, self.objective, self.shares = network, batches, objective, shares
        self._diffusion: Tensor | None = None  # sum and count of the update's diffusion losses, of the passes so far
        self._last_diffusion_loss: Tensor | None = None

    def __call__(self, data: FlowBatch) -> Loss:
        """Section 3, of this rank's samples."""
        update, figures = self.batches.update, {}
        layout = self.batches.draw_layout(self.network, data)
        intervals = draw_times(update, data, self.shares, self.objective.shift)
        result = flow_map(self.network, self.objective, data, intervals, layout)
        per_sample = result.per_sample
        update.note(per_sample)
        diffusion_loss = self.diffusion_loss(per_sample, intervals)
        if diffusion_loss is not None:
            figures["diffusion_loss"] = diffusion_loss
        if self.objective.rebalance:
            per_sample = rebalance(per_sample, result.is_diffusion, diffusion_loss)
        loss = update.mean(per_sample)
        if self.batches.keeps_bidirectional(self.network):
            bidirectional = self.bidirectional_loss(data)
            loss, figures["bidirectional_loss"] = loss + bidirectional, bidirectional.detach()
        return Loss(loss, figures)

    def diffusion_loss(self, per_sample: Tensor, intervals: Intervals) -> Tensor | None:
        """The mean diffusion loss of the update's whole batch, which intervals are weighed against (sec. 3, step 8).

        Diffusion samples come first: when the first interval is weighed, no rank or later pass has one left. An update
        of so few samples that none is a diffusion one takes the mean of the last that had some; None before that.
        """
        update = self.batches.update
        first, samples = update.place_of(len(per_sample))
        count = self.shares.counts(samples, update.position)[0]
        if not count:
            return self._last_diffusion_loss
        if first == 0:
            self._diffusion = None
        if first < count:  # some rank has one in this pass
            own = per_sample.detach()[: intervals.num_diffusion].double()
            total = sum_over_ranks(torch.stack([own.sum(), torch.ones_like(own).sum()]))
            self._diffusion = total if self._diffusion is None else self._diffusion + total
        assert self._diffusion is not None, "an update begins with its diffusion samples"
        self._last_diffusion_loss = (self._diffusion[0] / self._diffusion[1]).to(per_sample.dtype)
        return self._last_diffusion_loss

    def bidirectional_loss(self, data: FlowBatch) -> Tensor:
        """Plain flow matching of all frames at once, guidance fused: what keeps a causal network's other mode alive."""
        update = self.batches.update
        timestep = update.draw_logit_normal("bidirectional timestep", data.clean, self.objective.shift)
        unweighted = replace(self.objective, weight="uniform")
        at_one_time = Intervals(timestep, timestep, len(timestep))
        per_sample = flow_map(self.network, unweighted, data, at_one_time).per_sample
        update.note(per_sample)
        return update.mean(per_sample)

    def counters(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"diffusion_loss": self._last_diffusion_loss}

    def count_from(self, counters: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self._last_diffusion_loss = counters.get("diffusion_loss")


def draw_times(update: Update, data: FlowBatch, shares: IntervalShares, shift: float) -> Intervals:
    """This rank's part of the intervals of the update's whole batch."""
    count = len(data.clean)
    uniforms = update.draw_all("intervals", update.place_of(count)[1], 2)
    intervals = draw_intervals(uniforms, shares, shift, step=update.position)
    return intervals.of(update.own_samples(count)).to(data.clean.device)


def flow_map(
    ask: Ask,
    objective: FlowMapObjective,
    data: FlowBatch,
    intervals: Intervals,
    layout: ChunkLayout | None = None,
) -> FlowMapLoss:
    """The objective of a network or role on this rank's samples, each at the interval drawn for it."""
    on_path = data.on_path(intervals.timestep, intervals.r_timestep, layout)
    return flow_map_loss(
        objective,
        data.velocity(ask, layout),
        on_path.clean,
        on_path.noise,
        on_path.timestep,
        on_path.r_timestep,
        data.rows,
        on_path.loss_frames,
        same_calls=world()[1] > 1,
    )


class ForwardStage(Stage):
    """The flow-map objective on data."""

    def __init__(
        self,
        backbone: FlowMapBackbone,
        codec: Codec,
        training: Training,
        conditioning: Conditioning,
        *,
        objective: FlowMapObjective,
        shares: IntervalShares | None = None,
    ) -> None:
        super().__init__(backbone, training, codec=codec)
        self.backbone = backbone
        self.batches = Batches(codec, conditioning, self.update)
        self.shares = shares or IntervalShares()
        self.loss = ForwardLoss(backbone, self.batches, objective, self.shares)
        self.counted = (self.loss,)

    @classmethod
    def build(cls, parts: StageParts) -> ForwardStage:
        """The stage of a recipe."""
        objective, shares = parts.objective, parts.shares
        return cls(parts.backbone, parts.codec, parts.training, parts.conditioning, objective=objective, shares=shares)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """The forward loss of one batch."""
        loss, figures = self.loss(self.batches.prepare(batch, self.device))
        self.report(loss=loss, **figures)
        return loss
