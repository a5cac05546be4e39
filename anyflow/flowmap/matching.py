"""Distribution matching: moving the student's samples to where the teacher thinks data is (sec. 4; DMD2).

Two velocity fields are asked about the same noised sample: the teacher's, which knows the data, and the critic's, which
learns the distribution of the student's samples as they are now. The difference of their clean predictions points from
where samples are to where they should be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow.flowmap.objective import Velocity, flow_matching_loss
from anyflow.flowmap.schedule import TIMESTEPS, interpolate, like_latents, shift_sigma, step


@dataclass(frozen=True)
class MatchingGradient:
    """What one batch of samples gave; all detached.

    Attributes:
        gradient: Normalised ``(fake - real) / normaliser``, shaped as the latents; numbers that are none are 0.
        normaliser: ``[B]`` mean distance of the sample to the teacher's prediction: it makes the pull equally strong
            at every noise level. A falling one says that samples come to please the teacher.
        raw: ``fake - real`` as it was.
    """

    gradient: Tensor
    normaliser: Tensor
    raw: Tensor


def matching_timestep(uniforms: Tensor, shift: float) -> Tensor:
    """Shifted uniform timesteps for the noised samples, kept within 0..1000; keeps the shape."""
    return (TIMESTEPS * shift_sigma(uniforms, shift)).clamp(0, TIMESTEPS)


@torch.no_grad()
def matching_gradient(
    critic: Velocity,
    teacher: Velocity,
    samples: Tensor,
    noise: Tensor,
    timestep: Tensor,
    rows: Tensor,
    *,
    extra_guidance: float = 3.0,
    given_frames: Tensor | None = None,
) -> MatchingGradient:
    """The direction in which samples leave the teacher's distribution; descending along it brings them back.

    Args:
        critic: the seam of the network that learns the student's samples.
        teacher: the seam of the frozen data model.
        samples: the student's clean latents ``[B, F, C, H, W]``; their graph is not touched.
        noise: standard normal, as ``samples``.
        timestep: ``[B]``, or ``[B, F]`` with given frames at 0.
        rows: ``[B]`` int64 whose conditions each sample was made with; row B + i has the negative prompt.
        extra_guidance: what the released recipe calls guidance: ``real = cond + extra * (cond - uncond)`` of the
            teacher's clean predictions. It comes ON TOP of the conditional prediction: the usual classifier-free
            guidance scale is ``1 + extra_guidance``, so the released 3 is a scale of 4. 0 is no guidance, and saves the
            teacher's second pass.
        given_frames: ``[B, F]`` bool mask of frames that were given, not sampled: they get no gradient.
    """
    z = interpolate(samples, noise, timestep)

    def clean_prediction(velocity: Velocity, which: Tensor) -> Tensor:
        return step(z, velocity(z, timestep, timestep, which), timestep, torch.zeros_like(timestep))

    fake = clean_prediction(critic, rows)
    real = clean_prediction(teacher, rows)
    if extra_guidance != 0:
        unconditional = clean_prediction(teacher, rows % len(samples) + len(samples))
        real = real + extra_guidance * (real - unconditional)
    raw = fake - real
    distance = (samples - real).abs()
    if given_frames is not None:
        sampled = like_latents((~given_frames).to(raw.dtype), raw)
        raw, distance = raw * sampled, distance * sampled
        normaliser = distance.flatten(1).mean(dim=1) / sampled.flatten(1).mean(dim=1)
    else:
        normaliser = distance.flatten(1).mean(dim=1)
    gradient = torch.nan_to_num(raw / like_latents(normaliser, raw), nan=0.0, posinf=0.0, neginf=0.0)
    return MatchingGradient(gradient, normaliser, raw)


def matching_loss(samples: Tensor, gradient: Tensor) -> Tensor:
    """Per-sample losses ``[B]`` in float64 whose derivative is the gradient: ``|x - stop_grad(x - gradient)|^2``.

    Their mean over the batch is the released loss; its derivative by the samples is ``2 * gradient / numel``.
    """
    target = (samples.double() - gradient.double()).detach()
    return (samples.double() - target).square().flatten(1).mean(dim=1)


def critic_loss(
    critic: Velocity,
    samples: Tensor,
    noise: Tensor,
    timestep: Tensor,
    rows: Tensor,
    loss_frames: Tensor | None = None,
) -> Tensor:
    """Per-sample losses ``[B]`` of the critic: plain flow matching on the student's samples, which get no gradient."""
    return flow_matching_loss(critic, samples.detach(), noise, timestep, rows, loss_frames)
