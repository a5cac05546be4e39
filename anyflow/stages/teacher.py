"""The teacher: plain flow matching, so that all that follows shares one data distribution (section 2).

sigma ~ shifted logit-normal;  z = path(clean, noise, sigma);  loss = || u(z, t, t) - (noise - clean) ||^2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflow.flowmap.intervals import keep_first_frame
from anyflow.flowmap.objective import flow_matching_loss
from anyflow.flowmap.schedule import logit_normal_timestep
from anyflow.stages.flow import FlowStage


class TeacherStage(FlowStage):
    """Flow matching of a velocity field."""

    def __init__(self, *args: Any, shift: float = 5.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shift = shift

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Regress the velocity of the path at one time."""
        data = self.prepare(batch)
        timestep = self.draw_timestep(len(data.clean))
        loss_frames = None
        if bool(data.first_frame_given.any()):
            timestep, _, loss_frames = keep_first_frame(timestep, timestep, data.clean.shape[1], data.first_frame_given)
        per_sample = flow_matching_loss(
            self.velocity(data.text), data.clean, data.noise, timestep, data.rows, loss_frames
        )
        self.note_losses(per_sample)
        loss = per_sample.mean()
        self.report(loss=loss)
        return loss

    def draw_timestep(self, batch_size: int) -> Tensor:
        """Logit-normal times ``[B]``, shifted."""
        own = self.global_indices(batch_size)
        normal = torch.cat([torch.randn(1, generator=self.generator("timestep", i)) for i in own])
        return logit_normal_timestep(normal, self.shift).to(self.device)
