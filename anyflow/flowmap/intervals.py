"""Drawing the intervals (t, r) of a training batch, with shares that hold over the whole batch of all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow.flowmap.schedule import TIMESTEPS, at_least_float32, shift_sigma


@dataclass(frozen=True)
class Intervals:
    """The intervals of N samples, each field ``[N]``: times in float32 or better, r <= t, and r = t for diffusion."""

    timestep: Tensor
    r_timestep: Tensor
    is_diffusion: Tensor

    def for_rank(self, rank: int, world_size: int) -> Intervals:
        """Return every ``world_size``-th interval from ``rank`` on: this rank's samples.

        Dealing the samples out in turn, rather than in blocks, gives each rank about the same mix: a diffusion sample
        costs less than an interval, and the slowest rank sets the pace.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must lie in 0..{world_size - 1}")
        own = slice(rank, None, world_size)
        return Intervals(self.timestep[own], self.r_timestep[own], self.is_diffusion[own])

    def to(self, device: torch.device | str) -> Intervals:
        """Return the same intervals on another device."""
        return Intervals(self.timestep.to(device), self.r_timestep.to(device), self.is_diffusion.to(device))


def draw_intervals(
    uniforms: Tensor, diffusion_share: float = 0.5, consistency_share: float = 0.25, shift: float = 5.0
) -> Intervals:
    """Turn the uniforms ``[N, 2]`` of the GLOBAL batch into intervals (sec. 3, steps 1 and 2).

    ``t`` is the larger uniform and ``r`` the smaller. The first ``round(diffusion_share * N)`` samples get ``r = t``
    (they learn the instantaneous velocity and anchor the rest), the next ``round(consistency_share * N)`` get ``r =
    0`` (they learn the whole jump to data: quality at 1 step), the others keep a free interval (quality at 2 steps and
    more). Both are then shifted and scaled to timesteps. Every rank calls this with the same uniforms and takes its
    part with :meth:`Intervals.for_rank`: rounding the shares by rank would give a wrong mix at small batches.

    ``round`` is Python's: halves go to the even number, so N = 1 at share 0.5 has no diffusion sample.
    """
    if uniforms.ndim != 2 or uniforms.shape[1] != 2:
        raise ValueError(f"uniforms has shape {tuple(uniforms.shape)}; expected [N, 2]")
    if min(diffusion_share, consistency_share) < 0 or diffusion_share + consistency_share > 1 + 1e-9:
        raise ValueError(
            f"diffusion_share {diffusion_share} and consistency_share {consistency_share} must not be negative, "
            "nor exceed 1 together"
        )
    count = uniforms.shape[0]
    num_diffusion = round(diffusion_share * count)
    num_consistency = round(consistency_share * count)
    position = torch.arange(count, device=uniforms.device)
    is_diffusion = position < num_diffusion
    is_consistency = ~is_diffusion & (position < num_diffusion + num_consistency)

    start, end = at_least_float32(uniforms).max(dim=1).values, at_least_float32(uniforms).min(dim=1).values
    end = torch.where(is_diffusion, start, end)
    end = torch.where(is_consistency, torch.zeros_like(end), end)
    return Intervals(TIMESTEPS * shift_sigma(start, shift), TIMESTEPS * shift_sigma(end, shift), is_diffusion)


def keep_first_frame(
    timestep: Tensor, r_timestep: Tensor, num_frames: int, is_image_to_video: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Spread times ``[B]`` over frames and make the chosen samples image-to-video.

    ``is_image_to_video [B]`` (bool) marks samples whose first latent frame is given: there t = r = 0, so the path
    leaves it clean, and it carries no loss. Returns ``timestep [B, F]``, ``r_timestep [B, F]``, ``loss_frames [B, F]``
    (bool).
    """
    given = torch.zeros(timestep.shape[0], num_frames, dtype=torch.bool, device=timestep.device)
    given[:, 0] = is_image_to_video
    spread = timestep.unsqueeze(1).masked_fill(given, 0.0)
    r_spread = r_timestep.unsqueeze(1).masked_fill(given, 0.0)
    return spread, r_spread, ~given
