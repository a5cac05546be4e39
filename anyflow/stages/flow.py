"""What the stages of the flow-map network share: latents and texts of a batch, and the velocity seam."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.protocol import FlowMapBackbone, Text
from anyflow.flowmap.chunks import ChunkLayout, Lesson, teach
from anyflow.flowmap.intervals import keep_first_frame
from anyflow.flowmap.objective import Velocity
from anyflow.flowmap.schedule import logit_normal_timestep
from anyflow.stages.base import Stage
from anyflow.stages.options import ConditioningOptions, EmaSettings, OptimizerSettings


@dataclass(frozen=True)
class Conditioning(ConditioningOptions):
    """What the network is told, and how often it is not.

    Attributes:
        negative_prompt: The text that stands for "no text": of dropped samples and of the unconditional pass.
    """

    negative_prompt: str = ""


@dataclass(frozen=True)
class FlowBatch:
    """One rank's batch, ready for the objective.

    Attributes:
        clean: Normalised latents ``[B, F, C, H, W]``, float32.
        noise: Standard normal, as ``clean``.
        text: ``B + 1`` texts: the samples' own, then the negative prompt.
        rows: ``[B]`` which text each sample is trained with: its own, or ``B`` where it was dropped.
        is_first_frame_given: Whether this update trains image-to-video.
    """

    clean: Tensor
    noise: Tensor
    text: Text
    rows: Tensor
    is_first_frame_given: bool

    @property
    def first_frames(self) -> Tensor | None:
        """The given frames ``[B, 1, C, H, W]``, None where there are none."""
        return self.clean[:, :1] if self.is_first_frame_given else None


class FlowStage(Stage):
    """A stage that trains velocities of the flow-map backbone on encoded video."""

    def __init__(
        self,
        backbone: FlowMapBackbone,
        codec: Codec,
        *,
        conditioning: Conditioning,
        optimizer: OptimizerSettings,
        ema: EmaSettings,
        total_steps: int,
        seed: int,
        passes: int = 1,
    ) -> None:
        super().__init__(backbone, optimizer=optimizer, ema=ema, total_steps=total_steps, seed=seed, passes=passes)
        self.backbone = backbone
        self.conditioning = conditioning
        self._codec = (codec,)  # frozen and shared: kept out of this module's parameters and checkpoints

    @property
    def codec(self) -> Codec:
        """Pixels to latents, prompts to embeddings."""
        return self._codec[0]

    def on_fit_start(self) -> None:
        if not self.codec.is_parked:
            self.codec.to(self.device)

    def prepare(self, batch: dict[str, Any]) -> FlowBatch:
        """Encode what is not yet encoded, and draw noise and dropped texts."""
        captions = [*batch["caption"], self.conditioning.negative_prompt]
        is_ready = "latents" in batch and self.codec.remembers(captions)
        with nullcontext() if is_ready else self.codec.lent(self.device):
            clean = batch["latents"] if "latents" in batch else self.codec.encode_video(batch["frames"])
            text = self.codec.encode_text(captions).to(self.device)
        clean = clean.to(self.device, torch.float32)
        drop = self.draw_all("drop", self.place_of(len(clean))[1])[self.own_samples(len(clean))]
        rows = torch.arange(len(clean)).masked_fill(drop < self.conditioning.text_drop, len(clean))
        is_given = bool(torch.rand((), generator=self.generator("i2v")) < self.conditioning.i2v_prob)
        return FlowBatch(clean, self.draw_noise("noise", clean), text, rows.to(self.device), is_given)

    def velocity(self, text: Text, *, layout: ChunkLayout | None = None) -> Velocity:
        """The seam ``u(z, t, r, rows)`` with this batch's texts bound, and the layout of a pass over chunks if any."""
        view = {} if layout is None else {"layout": layout}

        def velocity(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
            return self.backbone(z, t, r, text.select(rows), **view)

        return velocity

    def draw_layout(self, data: FlowBatch) -> ChunkLayout | None:
        """Which chunks of the clips this update trains, equal on all ranks; None: all frames at once."""
        uniforms = torch.rand(2, generator=self.generator("chunks"))
        return self.backbone.draw_layout(data.clean.shape[1], uniforms, self.conditioning.long_context)

    def keeps_bidirectional(self) -> bool:
        """Whether this update also trains a causal network with all frames at once; equal on all ranks."""
        chance = float(torch.rand((), generator=self.generator("bidirectional")))
        return self.backbone.is_causal and chance < self.conditioning.bidirectional_prob

    def lesson(
        self, data: FlowBatch, timestep: Tensor, r_timestep: Tensor, layout: ChunkLayout | None = None
    ) -> Lesson:
        """The batch at times ``[B]`` as the network is taught it: a first frame given or not, in chunks or not."""
        lesson = Lesson(data.clean, data.noise, timestep, r_timestep)
        if data.is_first_frame_given:
            times = keep_first_frame(timestep, r_timestep, data.clean.shape[1])
            lesson = Lesson(data.clean, data.noise, *times)
        return lesson if layout is None else teach(layout, lesson)

    def draw_logit_normal(self, purpose: str, batch_size: int, shift: float) -> Tensor:
        """Shifted logit-normal timesteps ``[B]`` of this rank's samples."""
        own = self.own_samples(batch_size)
        normals = torch.cat([torch.randn(1, generator=self.generator(purpose, i)) for i in own])
        return logit_normal_timestep(normals, shift).to(self.device)

    def draw_noise(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal shaped as latents ``[B, ...]``, sample by sample."""
        own = self.own_samples(len(like))
        return torch.stack([torch.randn(like.shape[1:], generator=self.generator(purpose, i)) for i in own]).to(like)

    def draw_all(self, purpose: str, *size: int) -> Tensor:
        """Uniforms for the update's whole batch, the same on every rank and in every pass."""
        return torch.rand(size, generator=self.generator(purpose))
