"""The teacher: plain flow matching, so that all that follows shares one data distribution (section 2).

sigma ~ shifted logit-normal;  z = path(clean, noise, sigma);  loss = || u(z, t, t) - (noise - clean) ||^2
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.flowmap.chunks import ChunkLayout
from anyflow.flowmap.objective import flow_matching_loss
from anyflow.stages.base import Stage, Training
from anyflow.stages.batch import Batches, Conditioning, FlowBatch
from anyflow.stages.parts import StageParts
from anyflow.stages.update import Loss


class FlowMatching:
    """Plain flow matching of a network, over chunks where it is causal, and now and then over all frames at once."""

    def __init__(self, network: FlowMapBackbone, batches: Batches, shift: float) -> None:
        self.network, self.batches, self.shift = network, batches, shift

    def __call__(self, data: FlowBatch) -> Loss:
        loss = self.at(data, "timestep", self.batches.draw_layout(self.network, data))
        if self.batches.keeps_bidirectional(self.network):
            loss = loss + self.at(data, "bidirectional timestep")
        return Loss(loss, {})

    def at(self, data: FlowBatch, purpose: str, layout: ChunkLayout | None = None) -> Tensor:
        """The loss at times drawn for this purpose, over chunks or all frames at once."""
        update = self.batches.update
        timestep = update.draw_logit_normal(purpose, data.clean, self.shift)
        on_path, velocity = data.on_path(timestep, timestep, layout), data.velocity(self.network, layout)
        per_sample = flow_matching_loss(
            velocity, on_path.clean, on_path.noise, on_path.timestep, data.rows, on_path.loss_frames
        )
        update.note(per_sample)
        return update.mean(per_sample)


class TeacherStage(Stage):
    """Flow matching of a velocity field."""

    def __init__(
        self,
        backbone: FlowMapBackbone,
        codec: Codec,
        training: Training,
        conditioning: Conditioning,
        *,
        shift: float = 5.0,
    ) -> None:
        super().__init__(backbone, training, codec=codec)
        self.backbone = backbone
        self.batches = Batches(codec, conditioning, self.update)
        self.loss = FlowMatching(backbone, self.batches, shift)

    @classmethod
    def build(cls, parts: StageParts) -> TeacherStage:
        """The stage of a recipe."""
        return cls(parts.backbone, parts.codec, parts.training, parts.conditioning, shift=parts.shift)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Regress the velocity of the path at one time."""
        loss, _ = self.loss(self.batches.prepare(batch, self.device))
        self.report(loss=loss)
        return loss
