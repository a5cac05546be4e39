"""The teacher: plain flow matching, so that all that follows shares one data distribution (section 2).

sigma ~ shifted logit-normal;  z = path(clean, noise, sigma);  loss = || u(z, t, t) - (noise - clean) ||^2
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyflow.flowmap.chunks import ChunkLayout
from anyflow.flowmap.objective import flow_matching_loss
from anyflow.stages.flow import FlowBatch, FlowStage
from anyflow.stages.parts import StageParts


class TeacherStage(FlowStage):
    """Flow matching of a velocity field."""

    def __init__(self, *args: Any, shift: float = 5.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shift = shift

    @classmethod
    def build(cls, parts: StageParts) -> TeacherStage:
        """The stage of a recipe."""
        return cls(parts.backbone, parts.codec, shift=parts.shift, **parts.conditioned)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Regress the velocity of the path at one time."""
        data = self.prepare(batch)
        loss = self.matching_loss(data, "timestep", self.draw_layout(data))
        if self.keeps_bidirectional():
            loss = loss + self.matching_loss(data, "bidirectional timestep")
        self.report(loss=loss)
        return loss

    def matching_loss(self, data: FlowBatch, purpose: str, layout: ChunkLayout | None = None) -> Tensor:
        """Plain flow matching at times drawn for this purpose, over chunks or all frames at once."""
        timestep = self.draw_logit_normal(purpose, len(data.clean), self.shift)
        lesson = self.lesson(data, timestep, timestep, layout)
        velocity = self.velocity(data.text, layout=layout)
        per_sample = flow_matching_loss(
            velocity, lesson.clean, lesson.noise, lesson.timestep, data.rows, lesson.loss_frames
        )
        self.note_losses(per_sample)
        return self.mean_of_update(per_sample)
