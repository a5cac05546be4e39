"""Time: the shift, the linear path, the flow-map step, train weights and inference schedules.

Units: ``sigma`` lies in [0, 1] (0 is data, 1 is noise); ``timestep = 1000 * sigma`` is what networks take. Times are
float32 or better at every precision of the network: bfloat16 has about 600 distinct timesteps, where ``t + 5`` and
``t - 5`` are rarely 10 apart.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

TIMESTEPS = 1000.0
"""Timestep units between data (0) and noise (1000)."""

WeightKind = Literal["beta08", "gaussian", "uniform"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged where it is already float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def like_latents(time: Tensor, latents: Tensor) -> Tensor:
    """Append dimensions to a time ``[B]`` or ``[B, F]`` until it broadcasts over latents ``[B, F, ...]``."""
    return time.reshape(*time.shape, *[1] * (latents.ndim - time.ndim))


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move times towards noise: ``s * sigma / (1 + (s - 1) * sigma)``.

    Larger ``shift`` spends more of training and sampling at high noise, which large pictures need; Wan uses 5 at 480p,
    and 1 changes nothing. Any shape; keeps dtype.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def inference_timesteps(num_steps: int, shift: float) -> Tensor:
    """Return the ``num_steps + 1`` timesteps of a ``num_steps``-step sampler, 1000 down to 0, in float64."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a sampler needs at least 1 step")
    return TIMESTEPS * shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


def logit_normal_timestep(normals: Tensor, shift: float, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Turn standard normal draws of any shape into shifted logit-normal timesteps (flow matching's usual times)."""
    return TIMESTEPS * shift_sigma(torch.sigmoid(mean + std * at_least_float32(normals)), shift)


def interpolate(clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Return ``z_t = sigma * noise + (1 - sigma) * clean``, the linear path.

    Shapes: latents ``[B, F, ...]`` (or ``[B, ...]``), timestep ``[B]`` or ``[B, F]``. Result: float32 or better.
    """
    sigma = like_latents(at_least_float32(timestep) / TIMESTEPS, clean)
    return sigma * at_least_float32(noise) + (1 - sigma) * at_least_float32(clean)


def step(latents: Tensor, velocity: Tensor, timestep: Tensor, r_timestep: Tensor) -> Tensor:
    """Jump along the flow map: ``z_r = z_t - (sigma_t - sigma_r) * velocity``.

    Times are ``[]``, ``[B]`` or ``[B, F]``, one for each sample or frame (diffusers' scheduler looks only at the first
    of a batch). The update runs in the widest dtype given and returns the latents' dtype, float32 at least.
    """
    jump = like_latents((at_least_float32(timestep) - at_least_float32(r_timestep)) / TIMESTEPS, latents)
    moved = at_least_float32(latents) - jump * at_least_float32(velocity)
    return moved.to(at_least_float32(latents).dtype)


def weight_table(kind: WeightKind, shift: float) -> tuple[Tensor, Tensor]:
    """Return the 1001 timesteps (descending) of the training grid and their weights, both float64.

    - ``beta08``: ``sigma * sqrt(1 - sigma)``, the released runs' choice: nothing at the two ends, most at two thirds.
    - ``gaussian``: a bell around timestep 500 on the shifted grid, zero at both ends.
    - ``uniform``: 1 everywhere: the plain mean squared error.

    The first two are scaled to sum to 1000 over the shifted grid, so a larger shift also changes the loss's scale.
    """
    timesteps = TIMESTEPS * shift_sigma(torch.linspace(1, 0, 1001, dtype=torch.float64), shift)
    sigma = timesteps / TIMESTEPS
    if kind == "uniform":
        return timesteps, torch.ones_like(timesteps)
    if kind == "beta08":
        weight = sigma * (1 - sigma).sqrt()
    elif kind == "gaussian":
        weight = torch.exp(-2 * (sigma - 0.5).square())
        weight = weight - weight.min()
    else:
        raise ValueError(f"weight is {kind!r}; choose one of {', '.join(get_args(WeightKind))}")
    return timesteps, weight * TIMESTEPS / weight.sum()


def train_weight(timestep: Tensor, kind: WeightKind = "beta08", shift: float = 5.0) -> Tensor:
    """Return the train weight of each timestep (any shape), float64: the nearest entry of :func:`weight_table`."""
    timesteps, weights = (table.to(timestep.device) for table in weight_table(kind, shift))
    nearest = (timestep.to(torch.float64).unsqueeze(-1) - timesteps).abs().argmin(dim=-1)
    return weights[nearest]


def is_positive(value: float) -> bool:
    """Tell whether a setting is a finite number above 0."""
    return math.isfinite(value) and value > 0
