"""Euler sampling along the flow map, at any number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from anyflow.flowmap.schedule import at_least_float32, inference_timesteps, step

BoundVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``velocity(z, t, r)``: a network with its text bound; ``t`` and ``r`` are ``[B]``, or ``[B, F]`` with given frames.
"""

Jump = tuple[float, float]
"""From timestep ``t`` to timestep ``r < t``."""


@torch.no_grad()
def sample(
    velocity: BoundVelocity,
    noise: Tensor,
    num_steps: int,
    shift: float,
    on_step: Callable[[int, Tensor], None] | None = None,
    first_frames: Tensor | None = None,
) -> Tensor:
    """Turn noise ``[B, F, C, H, W]`` (any ``[B, ...]``) into clean latents in ``num_steps`` network calls (sec. 6).

    Nothing is re-noised and guidance is 1: it is fused in the weights. The arguments are :func:`follow`'s.
    """
    return follow(velocity, noise, steps_of(num_steps, shift), on_step, first_frames)


def steps_of(num_steps: int, shift: float) -> list[Jump]:
    """The jumps of a ``num_steps``-step sampler, from 1000 down to 0."""
    schedule = inference_timesteps(num_steps, shift).tolist()
    return list(pairwise(schedule))


def follow(
    velocity: BoundVelocity,
    noise: Tensor,
    jumps: Sequence[Jump],
    on_step: Callable[[int, Tensor], None] | None = None,
    first_frames: Tensor | None = None,
) -> Tensor:
    """Jump along the flow map from noise ``[B, ...]``, one network call a jump; gradients flow through all of them.

    ``on_step(done, latents)`` is called after each jump. ``first_frames [B, k, C, H, W]`` are given clean latents
    (image-to-video): their times stay 0 and they come back as given. The schedule is kept in float64, times reach the
    network in float32, and the result is float32 or better.
    """
    latents = at_least_float32(noise)
    num_given = 0 if first_frames is None else first_frames.shape[1]
    moving = torch.ones(latents.shape[: 1 if first_frames is None else 2], dtype=torch.float64, device=latents.device)
    if first_frames is not None:
        moving[:, :num_given] = 0
        latents = torch.cat([first_frames.to(latents), latents[:, num_given:]], dim=1)
    for done, (start, end) in enumerate(jumps, start=1):
        timestep, r_timestep = moving * start, moving * end
        predicted = velocity(latents, timestep.float(), r_timestep.float())
        latents = step(latents, predicted, timestep, r_timestep)
        if on_step is not None:
            on_step(done, latents)
    return latents
