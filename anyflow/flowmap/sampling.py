"""Euler sampling along the flow map, at any number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from anyflow.flowmap.schedule import at_least_float32, inference_timesteps, step

BoundVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``velocity(z, t, r)``: a network with its text bound; ``t`` and ``r`` are ``[B]``, or ``[B, F]`` with given frames.
"""

Jump = tuple[float, float]
"""From timestep ``t`` to timestep ``r < t``."""


After = Callable[[Tensor, Sequence[int]], BoundVelocity]
"""``after(clean, chunks)``: the velocity of the chunk after clean frames ``[B, f, ...]``, which are these chunks."""


Take = Callable[[BoundVelocity, Tensor, Tensor, Tensor], Tensor]
"""``take(velocity, latents, timestep, r_timestep)``: how a jump is taken: :func:`take_jump`, a tape's, another way."""


@torch.no_grad()
def sample(
    velocity: BoundVelocity,
    noise: Tensor,
    num_steps: int,
    shift: float,
    on_step: Callable[[int, Tensor], None] | None = None,
    first_frames: Tensor | None = None,
    take: Take | None = None,
) -> Tensor:
    """Turn noise ``[B, F, C, H, W]`` (any ``[B, ...]``) into clean latents in ``num_steps`` network calls (sec. 6).

    Guidance is 1: it is fused in the weights, or ``velocity`` is guided (:func:`guide`). The arguments are
    :func:`follow`'s.
    """
    return follow(velocity, noise, steps_of(num_steps, shift), on_step, first_frames, take or take_jump)


def steps_of(num_steps: int, shift: float) -> list[Jump]:
    """The jumps of a ``num_steps``-step sampler, from 1000 down to 0."""
    schedule = inference_timesteps(num_steps, shift).tolist()
    return list(pairwise(schedule))


def take_jump(velocity: BoundVelocity, latents: Tensor, timestep: Tensor, r_timestep: Tensor) -> Tensor:
    """One jump of the flow map from ``[B, ...]``; times are float64, and reach the network in float32."""
    predicted = velocity(latents, timestep.float(), r_timestep.float())
    return step(latents, predicted, timestep, r_timestep)


def take_velocity(velocity: BoundVelocity, latents: Tensor, timestep: Tensor, r_timestep: Tensor) -> Tensor:
    """One Euler step of a network of plain flow matching, which knows one time: it is asked ``u(z, t, t)``."""
    time = timestep.float()
    return step(latents, velocity(latents, time, time), timestep, r_timestep)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of two answers ``[B, ...]``, float32 or better.

    It is ``unconditional + scale * (conditional - unconditional)``: 1 gives the conditional answer, more leads farther
    away from the unconditional one.
    """
    return guide_from(conditional, [(unconditional, scale)])


def guide_from(answer: Tensor, others: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Guidance away from several answers ``[B, ...]`` at once, each by a scale of its own.

    It is ``answer + sum of (scale - 1) * (answer - other)``: of one other it is :func:`guide`.
    """
    whole = sum(scale for _, scale in others) - (len(others) - 1)
    found = whole * at_least_float32(answer)
    for other, scale in others:
        found = found + (1 - scale) * at_least_float32(other)
    return found


def follow(
    velocity: BoundVelocity,
    noise: Tensor,
    jumps: Sequence[Jump],
    on_step: Callable[[int, Tensor], None] | None = None,
    first_frames: Tensor | None = None,
    take: Take = take_jump,
) -> Tensor:
    """Jump along the flow map from noise ``[B, ...]``, one network call a jump; gradients flow through all of them.

    ``on_step(done, latents)`` is called after each jump. ``first_frames [B, k, C, H, W]`` are given clean latents
    (image-to-video): their times stay 0 and they come back as given. The schedule is kept in float64, times reach the
    network in float32, and the result is float32 or better. ``take`` is how each jump is taken.
    """
    latents = at_least_float32(noise)
    num_given = 0 if first_frames is None else first_frames.shape[1]
    moving = torch.ones(latents.shape[: 1 if first_frames is None else 2], dtype=torch.float64, device=latents.device)
    if first_frames is not None:
        moving[:, :num_given] = 0
        latents = torch.cat([first_frames.to(latents), latents[:, num_given:]], dim=1)
    for done, (start, end) in enumerate(jumps, start=1):
        latents = take(velocity, latents, moving * start, moving * end)
        if on_step is not None:
            on_step(done, latents)
    return latents


def follow_chunks(
    after: After,
    noise: Tensor,
    jumps: Sequence[Jump],
    chunks: Sequence[int],
    first_frames: Tensor | None = None,
    take: Take = take_jump,
    longest: int | None = None,
) -> Iterator[Tensor]:
    """Go along the flow map chunk by chunk, and yield each chunk's clean latents as soon as they are there (sec. 5).

    Each chunk takes all the jumps, from its own slice of the noise. Gradients flow through a chunk's jumps, and through
    what ``after`` makes of the frames before no further back: those come to it detached.

    With ``longest`` no more frames than these are ever looked at or kept, so neither time nor memory of a chunk depend
    on how many chunks there were.

    Args:
        after: the velocity of the next chunk.
        noise: ``[B, F, ...]``, as :func:`follow`'s.
        jumps: of every chunk.
        chunks: frames of each, ``F`` in all.
        first_frames: given clean latents ``[B, k, ...]`` that fill the first chunks, which are yielded as given.
        take: how each jump is taken.
        longest: most frames of a chunk and those before it; the oldest chunks are forgotten, but never the last one.
            None: nothing is forgotten.

    Raises:
        ValueError: the chunks are not as long as the noise, or the given frames end within one.
    """
    if sum(chunks) != noise.shape[1]:
        raise ValueError(f"chunks {list(chunks)} have {sum(chunks)} frames, the noise has {noise.shape[1]}")
    num_given = 0 if first_frames is None else first_frames.shape[1]
    if num_given not in [sum(chunks[:done]) for done in range(len(chunks) + 1)]:
        raise ValueError(f"{num_given} given frames end within a chunk of {list(chunks)}")
    clean, start = noise[:, :0].detach(), 0
    behind: tuple[int, ...] = ()
    for frames in chunks:
        own = slice(start, start + frames)
        while longest is not None and len(behind) > 1 and sum(behind) + frames > longest:
            clean, behind = clean[:, behind[0] :], behind[1:]
        if first_frames is not None and own.stop <= num_given:
            chunk = at_least_float32(first_frames[:, own])
        else:
            chunk = follow(after(clean, behind), noise[:, own], jumps, take=take)
        clean, behind, start = torch.cat([clean.to(chunk), chunk.detach()], dim=1), (*behind, frames), own.stop
        yield chunk
