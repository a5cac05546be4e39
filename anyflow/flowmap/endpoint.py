"""Endpoint networks, the baselines' mathematics: one jump to the data, and the sampler that noises it again (sec. 7).

An endpoint network knows one time: it is asked ``u(z, t, t)``, and ``f(z, t) = z - sigma_t * u(z, t, t)`` is taken for
the clean sample. A network of plain flow matching answers with the mean of all clean samples behind ``z``; consistency
distillation moves that answer to the end of the teacher's path, and distribution matching to some sample as good.

More steps are taken by noising the answer afresh to the next time. With the exact endpoint of every ``z`` the result
is right at any number of steps; but each jump starts from the last one's result, so the errors of all of them add up.
That is what a flow map, whose jumps are as long as their difference in time, does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from anyflow.flowmap.objective import FlowMapObjective, Velocity, flow_map_loss
from anyflow.flowmap.sampling import BoundVelocity, guide, take_velocity
from anyflow.flowmap.schedule import at_least_float32, interpolate, like_latents

NORM_OFFSET = 0.1
"""What the norm of a consistency error is taken beside, so that a vanishing error is not inflated (sCM's constant)."""


class Renoise:
    """How an endpoint network takes a jump: to the data, and by fresh noise to where the jump ends.

    Gradients flow through a jump to the data alone: what is noised again is detached, as in DMD2 and Self-Forcing.

    Args:
        draw: gives standard normal noise for (and of the shape of) the latents; called once a jump but for the last.
    """

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        self.draw = draw

    def __call__(self, velocity: BoundVelocity, latents: Tensor, timestep: Tensor, r_timestep: Tensor) -> Tensor:
        """The latents ``[B, F, ...]`` at ``r_timestep``; given frames, whose times are 0, stay what they are."""
        is_last = not bool(r_timestep.any())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_last):
            clean = take_velocity(velocity, latents, timestep, torch.zeros_like(timestep))
            return clean if is_last else interpolate(clean, self.draw(clean), r_timestep).to(clean.dtype)


def consistency_loss(
    objective: FlowMapObjective,
    student: Velocity,
    teacher: Velocity,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    rows: Tensor,
    loss_frames: Tensor | None = None,
    *,
    same_calls: bool = False,
) -> Tensor:
    """The weighted losses ``[B]`` (float64) by which ``f`` becomes constant along the teacher's guided path.

    ``df/dsigma = 0`` is the identity ``u = w - sigma * du/dsigma`` with the teacher's velocity ``w``: the flow-map
    objective with ``r = 0`` and the straight path that passes ``z`` with velocity ``w`` in place of the data's.

    Args:
        objective: ``guidance_scale`` is the teacher's, ``w = g * u_text + (1 - g) * u_negative``; derivative, width,
            weight and shift are the student's.
        student: trained; asked at r = t.
        teacher: frozen; asked at r = t.
        clean: ``[B, F, C, H, W]``.
        noise: standard normal, as ``clean``.
        timestep: ``[B]`` or ``[B, F]``.
        rows: whose conditions each sample has; row B + i, a dropped text, is not guided.
        loss_frames: ``[B, F]`` mask of the frames that are trained.
        same_calls: as :func:`anyflow.flowmap.objective.flow_map_loss` takes it.
    """
    z = interpolate(clean, noise, timestep)
    target = guided_velocity(teacher, z, timestep, rows, objective.guidance_scale)
    sigma = like_latents(at_least_float32(timestep) / 1000, z)

    def one_time(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        return student(z, t, t, rows)

    return flow_map_loss(
        replace(objective, guidance_scale=1.0, guided_tangent=False),
        one_time,
        z - sigma * target,
        z + (1 - sigma) * target,
        timestep,
        torch.zeros_like(timestep),
        rows,
        loss_frames,
        same_calls=same_calls,
    ).per_sample


@torch.no_grad()
def guided_velocity(teacher: Velocity, z: Tensor, timestep: Tensor, rows: Tensor, scale: float) -> Tensor:
    """The teacher's velocity under classifier-free guidance, float32 or better: both answers from one call.

    Args:
        teacher: the seam ``u(z, t, r, rows)``, asked at r = t.
        z: noised latents ``[B, ...]``.
        timestep: ``[B]`` or ``[B, F]``.
        rows: whose conditions; row B + i, without its text, is left as it is.
        scale: g of ``g * u_text + (1 - g) * u_negative``; 1 saves the negative pass.
    """
    time = at_least_float32(timestep)
    if scale == 1:
        return at_least_float32(teacher(z, time, time, rows))
    twice, negative = torch.cat([time, time]), rows % len(z) + len(z)
    answers = teacher(torch.cat([z, z]), twice, twice, torch.cat([rows, negative]))
    conditional, unconditional = answers.chunk(2)
    return guide(conditional, unconditional, scale)


def normalised(per_sample: Tensor) -> Tensor:
    """Losses ``[B]`` whose gradients are divided by the norm of the error (sCM's tangent normalisation).

    Errors of long and short jumps differ by orders of magnitude, and there is no diffusion loss to balance them to.
    """
    return per_sample / (per_sample.detach().sqrt() + NORM_OFFSET)
