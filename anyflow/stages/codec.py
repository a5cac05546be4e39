"""Train a small video autoencoder: the codec of an embedded model.

    video -> crop -> encode -> sample latents -> decode
    loss = Charbonnier (heavier where pixels move) + differences in space and time + a little KL

The first part of a run learns from short crops on the latent grid (cheap, many scenes a step); the last part from crops
of full length. Across the picture the autoencoder generalises from crops to whole frames by itself; along time it does
not: trained on 9 frames alone, it is 15 dB worse at the 17th than at the 9th.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from anyflow.backbone.codec import pixels_from_bytes
from anyflow.backbone.wan_vae import decode_latents, encode_moments
from anyflow.stages.base import Stage, Training
from anyflow.stages.options import CodecObjective
from anyflow.stages.parts import StageParts


class CodecStage(Stage):
    """Reconstruction of video by :class:`diffusers.AutoencoderKLWan`."""

    def __init__(
        self,
        vae: AutoencoderKLWan,
        objective: CodecObjective,
        training: Training,
    ) -> None:
        super().__init__(vae, training)
        self.vae = vae
        self.objective = objective

    @classmethod
    def build(cls, parts: StageParts) -> CodecStage:
        """The stage of a recipe."""
        parts.codec.vae.requires_grad_(True)
        return cls(parts.codec.vae, parts.options.codec, parts.training)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Crop, encode, sample, decode, compare."""
        frames = batch["frames"]
        generators = [self.update.generator("codec", i) for i in self.update.own_samples(len(frames))]
        video = self.crop(pixels_from_bytes(frames), generators)
        mean, log_variance = encode_moments(self.vae, video).chunk(2, dim=1)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        reconstruction = decode_latents(self.vae, mean + noise.to(mean) * torch.exp(0.5 * log_variance))

        error = charbonnier(reconstruction - video)
        weight = 1.0 + (self.objective.motion_weight - 1.0) * motion_mask(video)
        pixel_loss = (error * weight).mean()
        gradient_loss = difference_error(reconstruction, video)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        loss = pixel_loss + self.objective.gradient_weight * gradient_loss + self.objective.kl_weight * kl
        with torch.no_grad():
            psnr = -10 * torch.log10((reconstruction - video).div(2).square().mean())
        self.report(loss=loss, pixel_loss=pixel_loss, gradient_loss=gradient_loss, kl=kl, psnr=psnr)
        return loss * self.update.weight_of_pass(len(frames))

    def crop(self, video: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A random crop of every clip on the latent grid; of two candidates half the time the one that moves more."""
        frames, height, width = self.objective.crop_frames, self.objective.crop_height, self.objective.crop_width
        if self.step >= (1.0 - self.objective.whole_share) * self.total_steps:
            frames = video.shape[2]
        grid = self.vae.config.scale_factor_spatial
        crops = []
        for clip, generator in zip(video, generators, strict=True):
            candidates = []
            for _ in range(2):
                f = _draw(clip.shape[1] - frames, 1, generator)
                y = _draw(clip.shape[2] - height, grid, generator)
                x = _draw(clip.shape[3] - width, grid, generator)
                candidates.append(clip[:, f : f + frames, y : y + height, x : x + width])
            if torch.rand((), generator=generator) < 0.5:
                candidates.sort(key=lambda crop: float(crop.diff(dim=1).abs().mean()), reverse=True)
            crops.append(candidates[0])
        return torch.stack(crops)


def charbonnier(error: Tensor, epsilon: float = 1e-2) -> Tensor:
    """A smooth absolute value: quadratic below ``epsilon``, linear above."""
    return torch.sqrt(error.square() + epsilon**2) - epsilon


def motion_mask(video: Tensor, scale: float = 0.1) -> Tensor:
    """How much each pixel moves, 0 to 1: ``[B, 1, F, H, W]``, from the larger of its two temporal differences."""
    change = video.diff(dim=2).abs().amax(dim=1, keepdim=True)
    forward = torch.nn.functional.pad(change, (0, 0, 0, 0, 1, 0))
    backward = torch.nn.functional.pad(change, (0, 0, 0, 0, 0, 1))
    return torch.maximum(forward, backward).div(scale).clamp(max=1.0)


def difference_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of neighbouring differences along time, height and width: punishes blur and flicker."""
    error = prediction - target
    return torch.stack([error.diff(dim=dim).abs().mean() for dim in (2, 3, 4)]).sum()


def _draw(room: int, grid: int, generator: torch.Generator) -> int:
    return int(torch.randint(room // grid + 1, (), generator=generator)) * grid
