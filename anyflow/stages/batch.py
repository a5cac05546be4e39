"""Clips and captions become a batch of latents, noise and conditions, which every loss on the network takes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.controls import by_latent_frame, without
from anyflow.backbone.protocol import Ask, FlowMapBackbone
from anyflow.backbone.roles import bind
from anyflow.flowmap.chunks import ChunkLayout, PathBatch, in_chunks
from anyflow.flowmap.intervals import keep_first_frame
from anyflow.flowmap.objective import Velocity
from anyflow.stages.options import ConditioningOptions
from anyflow.stages.update import Update


@dataclass(frozen=True)
class Conditioning(ConditioningOptions):
    """What the network is told, and how often it is not.

    Attributes:
        negative_prompt: The text that stands for "no text": of dropped samples and of the unconditional pass.
        control_drop: Share of the samples that are trained without their controls.
    """

    negative_prompt: str = ""
    control_drop: float = 0.0


@dataclass(frozen=True)
class FlowBatch:
    """One rank's batch, ready for the objective.

    Attributes:
        clean: Normalised latents ``[B, F, C, H, W]``, float32; zeros where clips were not looked at.
        noise: Standard normal, as ``clean``.
        text: ``B + 1`` texts: the samples' own, then the negative prompt.
        rows: ``[B]`` whose conditions each sample is trained with: ``i``, or ``B + i`` where its text was dropped.
        is_first_frame_given: Whether this update trains image-to-video.
        controls: ``[B, F, P, W]``, see :class:`~anyflow.backbone.conditions.Conditions`; NaN where they were dropped.
    """

    clean: Tensor
    noise: Tensor
    text: Text
    rows: Tensor
    is_first_frame_given: bool
    controls: Tensor | None = None

    @property
    def own_rows(self) -> Tensor:
        """``[B]``: every sample under its own prompt."""
        return torch.arange(len(self.clean), device=self.clean.device)

    @property
    def conditions(self) -> Conditions:
        """What a rollout is made under: each sample's own prompt and controls, and its first frame if given."""
        first_frames = self.clean[:, :1] if self.is_first_frame_given else None
        return self.conditions_of(self.own_rows)._replace(first_frames=first_frames)

    def conditions_of(self, rows: Tensor) -> Conditions:
        """Of some rows: ``i`` sample i's, ``B + i`` the same without its text."""
        count = len(self.clean)
        controls = None if self.controls is None else self.controls[rows % count]
        return Conditions(self.text.select(rows.clamp(max=count)), controls=controls)

    def velocity(self, ask: Ask, layout: ChunkLayout | None = None) -> Velocity:
        """The seam ``u(z, t, r, rows)`` of a network or role under this batch's conditions.

        ``layout`` is that of a pass over chunks, if any.
        """
        if layout is None:
            return bind(ask, self.conditions_of)
        return bind(ask, lambda rows: self.conditions_of(rows).of_frames(layout.frames), layout=layout)

    def on_path(self, timestep: Tensor, r_timestep: Tensor, layout: ChunkLayout | None = None) -> PathBatch:
        """The batch at times ``[B]`` as the network is taught it: a first frame given or not, in chunks or not."""
        on_path = PathBatch(self.clean, self.noise, timestep, r_timestep)
        if self.is_first_frame_given:
            times = keep_first_frame(timestep, r_timestep, self.clean.shape[1])
            on_path = PathBatch(self.clean, self.noise, *times)
        return on_path if layout is None else in_chunks(layout, on_path)


class Batches:
    """Makes the batches of an update.

    Attributes:
        codec: Pixels to latents, prompts to embeddings; frozen.
        conditioning: What samples are told.
        update: The update under way.
    """

    def __init__(self, codec: Codec, conditioning: Conditioning, update: Update) -> None:
        self.codec = codec
        self.conditioning = conditioning
        self.update = update

    def prepare(self, batch: dict[str, Any], device: torch.device, *, from_samples: bool = False) -> FlowBatch:
        """Encode what is not yet encoded, and draw noise, dropped texts and dropped controls.

        An update that learns ``from_samples`` needs the shape of its clips, and their first frames where these are
        given; nothing else is encoded.
        """
        update, captions = self.update, [*batch["caption"], self.conditioning.negative_prompt]
        is_given = update.chance("i2v") < self.conditioning.i2v_prob
        encodes = "latents" not in batch and (is_given or not from_samples)
        with nullcontext() if not encodes and self.codec.remembers(captions) else self.codec.lent(device):
            text = self.codec.encode_text(captions).to(device)
            if "latents" in batch:
                clean = batch["latents"].to(device, torch.float32)
            elif from_samples:
                clean = self._first_frames(batch["frames"], device, encodes)
            else:
                clean = self.codec.encode_video(batch["frames"]).to(device, torch.float32)
        count = len(clean)
        rows = torch.arange(count) + count * self._is_dropped("drop", self.conditioning.text_drop, count)
        controls = batch.get("controls")
        if controls is not None:
            told = by_latent_frame(controls.to(device, torch.float32), self.codec.temporal_factor)
            controls = without(told, self._is_dropped("controls", self.conditioning.control_drop, count))
        return FlowBatch(clean, update.draw_noise("noise", clean), text, rows.to(device), is_given, controls)

    def _first_frames(self, frames: Tensor, device: torch.device, encodes: bool) -> Tensor:
        """Latents of clips ``[B, F, H, W, 3]`` that are zero but for the first frame, and that, too, unless encoded."""
        clean = torch.zeros(len(frames), *self.codec.latent_shape(*frames.shape[1:4]), device=device)
        if encodes:
            clean[:, :1] = self.codec.encode_video(frames[:, :1])  # the autoencoder is causal: it is as of a whole clip
        return clean

    def _is_dropped(self, purpose: str, share: float, count: int) -> Tensor:
        """Which of a batch's samples do without something: ``[count]`` bool, drawn for the update's whole batch."""
        drawn = self.update.draw_all(purpose, self.update.place_of(count)[1])
        return drawn[self.update.own_samples(count)] < share

    def draw_layout(self, network: FlowMapBackbone, data: FlowBatch) -> ChunkLayout | None:
        """Which chunks of the clips this update trains, equal on all ranks; None: all frames at once."""
        uniforms = self.update.draw_all("chunks", 2)
        return network.draw_layout(data.clean.shape[1], uniforms, self.conditioning.long_context)

    def keeps_bidirectional(self, network: FlowMapBackbone) -> bool:
        """Whether this update also trains a causal network with all frames at once; equal on all ranks."""
        return network.is_causal and self.update.chance("bidirectional") < self.conditioning.bidirectional_prob
