"""Drawing the intervals (t, r) of an optimiser step's batch, with shares that hold over all of it.

The batch of a step may be split in ranks and passes; its samples are numbered through, pass by pass, and within a pass
dealt out to the ranks in turn. Diffusion samples come first, so they fill the first passes of all ranks at once: their
mean loss is known when the first interval is weighed against it, and no rank waits for another's finite difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow.flowmap.options import ShareOptions
from anyflow.flowmap.schedule import TIMESTEPS, at_least_float32, shift_sigma

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Its multiples, modulo 1, fill the unit interval more evenly than those of any other number."""

ROUNDING = 1e-9
"""What float arithmetic may add to a whole number of samples."""


@dataclass(frozen=True)
class IntervalShares(ShareOptions):
    """How the samples of an optimiser step are divided: ``diffusion_share`` has r = t, ``consistency_share``
    r = 0, the rest a free r.

    Raises:
        ValueError: a share is negative, or both exceed 1 together.
    """

    def __post_init__(self) -> None:
        shares = self.diffusion_share, self.consistency_share
        if min(shares) < 0 or sum(shares) > 1 + ROUNDING:
            raise ValueError(
                f"diffusion_share {shares[0]} and consistency_share {shares[1]} must not be negative, "
                "nor exceed 1 together"
            )

    def counts(self, samples: int, step: int | None = None) -> tuple[int, int]:
        """How many of a step's samples learn the velocity (r = t), and how many the jump to data (r = 0).

        Args:
            samples: of the whole step: of all ranks and passes.
            step: the step's number. Where a share of the samples is no whole number, the counts of successive steps
                differ by one, so that the shares hold over the steps: a step of one sample is now of one kind, now of
                another. None: the released rounding (Python's, halves to the even number), the same at every step.
        """
        if step is None:
            diffusion = round(self.diffusion_share * samples)
            return diffusion, min(round(self.consistency_share * samples), samples - diffusion)
        offset = min((step * GOLDEN_RATIO) % 1.0, 1.0 - 2 * ROUNDING) + ROUNDING
        diffusion = math.floor(self.diffusion_share * samples + offset)
        both = math.floor((self.diffusion_share + self.consistency_share) * samples + offset)
        return diffusion, both - diffusion

    def are_whole(self, samples: int) -> bool:
        """Whether every step of so many samples has exactly these shares."""
        parts = (self.diffusion_share * samples, self.consistency_share * samples)
        return all(abs(part - round(part)) < samples * ROUNDING for part in parts)

    def told(self, samples: int) -> str:
        """The division of so many samples in words."""
        if self.are_whole(samples):
            diffusion, consistency = self.counts(samples)
            rest = samples - diffusion - consistency
            return f"of a step's {samples} clips {diffusion} have r = t, {consistency} r = 0, {rest} any r between"
        return (
            f"{self.diffusion_share:.1%} of the clips have r = t, {self.consistency_share:.1%} r = 0: a step of "
            f"{samples} cannot be divided so, and the shares hold over the steps"
        )


@dataclass(frozen=True)
class Intervals:
    """The intervals of N samples: ``timestep`` and ``r_timestep`` ``[N]`` in float32 or better, r <= t; the first
    ``num_diffusion`` have r = t.
    """

    timestep: Tensor
    r_timestep: Tensor
    num_diffusion: int

    @property
    def is_diffusion(self) -> Tensor:
        """``[N]`` bool: which have r = t."""
        return torch.arange(len(self.timestep), device=self.timestep.device) < self.num_diffusion

    def of(self, samples: Sequence[int]) -> Intervals:
        """Return the intervals of some samples, which are given in ascending order."""
        chosen = torch.as_tensor(samples, device=self.timestep.device)
        own = sum(sample < self.num_diffusion for sample in samples)
        return Intervals(self.timestep[chosen], self.r_timestep[chosen], own)

    def to(self, device: torch.device | str) -> Intervals:
        """Return the same intervals on another device."""
        return Intervals(self.timestep.to(device), self.r_timestep.to(device), self.num_diffusion)


def draw_intervals(
    uniforms: Tensor, shares: IntervalShares | None = None, shift: float = 5.0, *, step: int | None = None
) -> Intervals:
    """Turn the uniforms ``[N, 2]`` of an optimiser step's WHOLE batch into intervals (sec. 3, steps 1 and 2).

    ``t`` is the larger uniform and ``r`` the smaller. The first samples get ``r = t`` (they learn the instantaneous
    velocity and anchor the rest), the next ones ``r = 0`` (they learn the whole jump to data: quality at 1 step), the
    others keep a free interval (quality at 2 steps and more); :meth:`IntervalShares.counts` says how many of ``step``.
    Both times are then shifted and scaled to timesteps. Every rank and pass calls this with the same uniforms and takes
    its part with :meth:`Intervals.of`: shares rounded by rank or by pass would give a wrong mix at small batches.
    """
    if uniforms.ndim != 2 or uniforms.shape[1] != 2:
        raise ValueError(f"uniforms has shape {tuple(uniforms.shape)}; expected [N, 2]")
    count = uniforms.shape[0]
    num_diffusion, num_consistency = (shares or IntervalShares()).counts(count, step)
    position = torch.arange(count, device=uniforms.device)
    is_diffusion = position < num_diffusion
    is_consistency = ~is_diffusion & (position < num_diffusion + num_consistency)
    start, end = at_least_float32(uniforms).max(dim=1).values, at_least_float32(uniforms).min(dim=1).values
    end = torch.where(is_diffusion, start, end)
    end = torch.where(is_consistency, torch.zeros_like(end), end)
    return Intervals(TIMESTEPS * shift_sigma(start, shift), TIMESTEPS * shift_sigma(end, shift), num_diffusion)


def keep_first_frame(
    timestep: Tensor, r_timestep: Tensor, num_frames: int, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Spread times ``[B]`` over frames and make samples image-to-video: the ``chosen`` ones ``[B]`` (bool), or all.

    Their first latent frame is given: there t = r = 0, so the path leaves it clean, and it carries no loss. Returns
    ``timestep [B, F]``, ``r_timestep [B, F]``, ``loss_frames [B, F]`` (bool).
    """
    given = torch.zeros(timestep.shape[0], num_frames, dtype=torch.bool, device=timestep.device)
    given[:, 0] = True if chosen is None else chosen
    spread = timestep.unsqueeze(1).masked_fill(given, 0.0)
    r_spread = r_timestep.unsqueeze(1).masked_fill(given, 0.0)
    return spread, r_spread, ~given
