"""The flow map's finite difference in bfloat16 beside float32, by the precision of what runs from block to block.

A central difference subtracts two answers that are nearly equal, so it is made of their last bits. What is subtracted
here is what forward training subtracts: answers at t + 5 and t - 5 along the path of real clips.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.load import load_backbone, new_backbone
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.data.decode import ClipShape
from anyflow.evaluation.heldout import held_out
from anyflow.flowmap.schedule import interpolate, like_latents
from anyflow.memory.need import PUBLISHED

DELTA = 5.0
SHAPE = ClipShape(17, 64, 96)


def precision_benchmark(
    model: str = "data/models/tiny-open", data: str = "driving-open", clips: int = 16, seed: int = 0
) -> dict[str, Any]:
    """The error of finite difference and velocity in bfloat16, for each ``hardware.residual``.

    A network of 1.3B's width and depth has no weights here: it is asked with random ones, about few tokens.

    Returns:
        By network ``signal`` and ``velocity`` (rms, in float32), and per setting the rms ``error`` of the difference and
        that of the velocity.
    """
    codec, network = Codec.from_folder(model), load_backbone(model)
    found = held_out([data], "heldout", SHAPE, clips)
    clean = codec.encode_video(torch.stack([clip.frames for clip in found]))
    told = Conditions(codec.encode_text([clip.caption for clip in found]))
    large = new_backbone({**PUBLISHED["1.3b"], "text_dim": told.text.embeddings.shape[-1]}, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # a new network's last layer is zero
        large.transformer.proj_out.weight.normal_(std=0.02, generator=generator)
    few = Conditions(told.text.select(torch.arange(1)))
    return {
        model: _errors(network, clean, told, generator),
        "1.3B's shape, random weights": _errors(large, clean[:1], few, generator),
    }


@torch.no_grad()
def _errors(network: FlowMapBackbone, clean: Tensor, told: Conditions, generator: torch.Generator) -> dict[str, Any]:
    noise = torch.randn(clean.shape, generator=generator)
    timestep = DELTA + (1000 - 2 * DELTA) * torch.rand(len(clean), generator=generator)
    r_timestep = timestep * torch.rand(len(clean), generator=generator)
    z, v = interpolate(clean, noise, timestep), noise - clean

    def ask(offset: float) -> Tensor:
        there = z + like_latents(torch.full_like(timestep, offset / 1000), v) * v
        return network(there, timestep + offset, r_timestep, told)

    def answers() -> tuple[Tensor, Tensor]:
        return (ask(DELTA) - ask(-DELTA)) * 1000 / (2 * DELTA), ask(0.0)

    exact = answers()
    found: dict[str, Any] = {"signal": _rms(exact[0]), "velocity": _rms(exact[1]), "settings": {}}
    network.compute = torch.bfloat16
    for residual in ("compute", "float32"):
        network.residual = residual
        difference, velocity = answers()
        errors = {"error": _rms(difference - exact[0]), "velocity_error": _rms(velocity - exact[1])}
        found["settings"][residual] = errors
    return found


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def told(result: dict[str, Any]) -> list[str]:
    """The figure in words."""
    lines = ["finite difference in bfloat16, rms error beside float32:"]
    for name, found in result.items():
        lines.append(f"  {name}: signal {found['signal']:.2f}, velocity {found['velocity']:.3f}")
        for setting, errors in found["settings"].items():
            lines.append(
                f"    hardware.residual={setting:<8} {errors['error']:.3f} ({errors['error'] / found['signal']:.0%} of "
                f"the signal), velocity {errors['velocity_error']:.4f}"
            )
    return lines
