"""What the codec loses: PSNR of encoded and decoded clips, over all pixels and over those that move.

A static background is easy and dominates the plain PSNR; what a world model is about moves. So the second figure is
taken over **moving pixels** alone (``moving_pixels``). Both pool the squared error over all clips of a domain before
the logarithm, which is never larger than the mean of the clips' own PSNR: one bad clip counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

MOVING_THRESHOLD = 16
"""Grey levels (of 255) by which a pixel must change to a neighbouring frame: above h264's noise in the shards."""

MOVING_RADIUS = 1
"""Pixels by which the moving region is dilated, so that a moving thing's soft edge belongs to it."""


class PixelCodec(Protocol):
    """The part of the codec that is measured here."""

    def encode_video(self, video: Tensor) -> Tensor:
        """Map uint8 clips ``[B, F, H, W, 3]`` to latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents to uint8 clips ``[B, F, H, W, 3]``."""


@dataclass(frozen=True)
class Reconstruction:
    """Fidelity of one domain's clips after the codec.

    Attributes:
        psnr: decibels over all pixels, peak 255.
        psnr_moving: decibels over moving pixels; ``nan`` if nothing moves.
        moving_share: the share of pixels that move, 0..1.
        clips: how many clips were measured.
    """

    psnr: float
    psnr_moving: float
    moving_share: float
    clips: int

    def to_json(self) -> dict[str, float | int]:
        """Return a plain dictionary for a report."""
        return asdict(self)


def moving_pixels(clips: Tensor, *, threshold: int = MOVING_THRESHOLD, radius: int = MOVING_RADIUS) -> Tensor:
    """Mark the pixels that move in real clips.

    A pixel of frame f moves if any of its colours differs by more than ``threshold`` grey levels from the same place in
    frame f - 1 or f + 1; the mask is then dilated by ``radius`` pixels (a square).

    Args:
        clips: uint8 ``[N, F, H, W, 3]``.
    Returns:
        bool ``[N, F, H, W]``.
    """
    change = clips.to(torch.int16).diff(dim=1).abs().amax(dim=-1)
    moved = change > threshold
    mask = torch.zeros(clips.shape[:-1], dtype=torch.bool, device=clips.device)
    mask[:, 1:] |= moved
    mask[:, :-1] |= moved
    size = 2 * radius + 1
    return functional.max_pool2d(mask.float(), size, stride=1, padding=radius).bool()


def compare(pairs: Iterable[tuple[Tensor, Tensor]]) -> Reconstruction:
    """Measure decoded clips against real ones.

    Args:
        pairs: batches ``(real, decoded)``, both uint8 ``[B, F, H, W, 3]``. What moves is decided on the real clip.
    """
    from torchmetrics.image import PeakSignalNoiseRatio

    ratios = [PeakSignalNoiseRatio(data_range=255.0, sync_on_compute=False) for _ in range(2)]
    everywhere, moving = (ratio.set_dtype(torch.float64) for ratio in ratios)
    moving_count = pixel_count = clip_count = 0
    for real, decoded in pairs:
        if real.shape != decoded.shape:
            raise ValueError(f"decoded clips {tuple(decoded.shape)} do not match the real ones {tuple(real.shape)}")
        mask = moving_pixels(real)
        truth, guess = real.to(torch.float64), decoded.to(torch.float64)
        everywhere.update(guess, truth)
        if mask.any():
            moving.update(guess[mask], truth[mask])
        moving_count += int(mask.sum())
        pixel_count += mask.numel()
        clip_count += real.shape[0]
    if not clip_count:
        raise ValueError("no clips to measure")
    return Reconstruction(
        psnr=float(everywhere.compute()),
        psnr_moving=float(moving.compute()) if moving_count else float("nan"),
        moving_share=moving_count / pixel_count,
        clips=clip_count,
    )


@torch.no_grad()
def measure_reconstruction(codec: PixelCodec, clips: Tensor, *, batch_size: int = 8) -> Reconstruction:
    """Encode and decode real clips and measure what is lost.

    Args:
        codec: the frozen codec.
        clips: uint8 ``[N, F, H, W, 3]``.
        batch_size: clips per pass.
    """
    batches = clips.split(batch_size)
    return compare((real, codec.decode(codec.encode_video(real)).to(real.device)) for real in batches)


def measure_domains(
    codec: PixelCodec, domains: Mapping[str, Tensor], *, batch_size: int = 8
) -> dict[str, Reconstruction]:
    """Measure each domain's held-out clips: ``{domain: uint8 [N, F, H, W, 3]}`` to ``{domain: Reconstruction}``."""
    return {name: measure_reconstruction(codec, clips, batch_size=batch_size) for name, clips in domains.items()}
