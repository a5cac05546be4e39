"""A codec and a velocity in closed form, so that a curve's outcome is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scenes import lane_change
from torch import Tensor
from torch.nn import functional

from anyflow.evaluation import measure
from anyflow.evaluation.curve import CurveResult, HeldOut
from anyflow.evaluation.kept_samples import KeptSamples
from anyflow.evaluation.measurement import CurveCodec, Measurement, SampledModel, Sampler
from anyflow.evaluation.told import Told
from anyflow.flowmap.sampling import sample
from anyflow.flowmap.schedule import like_latents

BLOCK = 16


class BlockCodec:
    """Latents are blocks of pixels, so nothing is lost."""

    def encode_video(self, video: Tensor) -> Tensor:
        pixels = (video.float() / 127.5 - 1).permute(0, 1, 4, 2, 3)
        return functional.pixel_unshuffle(pixels, BLOCK)

    def decode(self, latents: Tensor) -> Tensor:
        pixels = functional.pixel_shuffle(latents, BLOCK).permute(0, 1, 3, 4, 2)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).byte()


def held_out(count: int, offset: int = 0) -> list[HeldOut]:
    """Drawn driving clips: left, right and keep in turn."""
    items = []
    for index in range(offset, offset + count):
        word, change = (("left", -18.0), ("right", 18.0), ("keep", 0.0))[index % 3]
        frames = torch.from_numpy(lane_change(change, begin=1 + index % 4))
        items.append(
            HeldOut(f"clip-{index}", f"The car goes {word} ({index}).", frames, "driving", {"manoeuvre": word})
        )
    return items


def exact_sampler(items: list[HeldOut], error: float = 0.0) -> Sampler:
    """The sampler of data with one clip a caption: ``u(z, t, r) = (z - x) / sigma``, exact at any number of steps.

    ``error`` adds an error that is proportional to the jump ``t - r``: then more steps are better.
    """
    clean = {item.caption: BlockCodec().encode_video(item.frames[None])[0] for item in items}

    def velocity_for(captions: list[str]) -> Callable[..., Tensor]:
        target = torch.stack([clean[caption] for caption in captions])

        def velocity(latents: Tensor, timestep: Tensor, r_timestep: Tensor) -> Tensor:
            sigma, jump = (like_latents(value / 1000, latents) for value in (timestep, timestep - r_timestep))
            return (latents - target) / sigma.clamp(min=1e-6) + error * jump * latents.sign()

        return velocity

    return sampler_over(velocity_for)


def sampler_over(velocity_for: Callable[[list[str]], Callable[..., Tensor]]) -> Sampler:
    """The plain sampler over a velocity for each batch of captions."""

    def sampler(told: Told, noise: Tensor, num_steps: int, shift: float) -> Tensor:
        return sample(velocity_for(told.captions), noise, num_steps, shift, first_frames=told.first_frames)

    return sampler


def measure_curve(
    sampler: Sampler,
    codec: CurveCodec,
    items: list[HeldOut],
    reference: list[HeldOut],
    /,
    kept: KeptSamples | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
    **asked: Any,
) -> CurveResult:
    """The curve of a sampler, with the settings of ``Measurement``."""
    model = SampledModel(sampler, codec)
    return measure.measure_curve(model, items, reference, Measurement(**asked), kept=kept, on_progress=on_progress)
