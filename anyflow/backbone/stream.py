"""Video while it is being made: the frames of each finished part, before the next one is begun."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.guidance import UNGUIDED, Guidance
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.flowmap.sampling import Take, steps_of, take_jump


@torch.no_grad()
def stream_video(
    backbone: FlowMapBackbone,
    codec: Codec,
    captions: list[str],
    noise: Tensor,
    num_steps: int,
    shift: float,
    first_frames: Tensor | None = None,
    take: Take = take_jump,
    guidance: Guidance = UNGUIDED,
) -> Iterator[Tensor]:
    """Yield frames uint8 ``[B, f, H, W, 3]``; joined they are the video.

    A causal network yields a chunk at a time (:meth:`FlowMapBackbone.chunks_of` tells how many there will be), of any
    number: past its trained length the window moves, and time and memory of a chunk stay what they are. Each chunk is
    sampled when it is asked for. A bidirectional network yields the whole video.

    Args:
        backbone: the network.
        codec: encodes the captions, decodes the latents.
        captions: one a video.
        noise: standard normal ``[B, F, C, H, W]``.
        num_steps: of the sampler, for every chunk.
        shift: of its schedule.
        first_frames: given latents ``[B, k, C, H, W]`` (``codec.encode_video`` of given frames); they are shown too.
        take: how the network takes a jump.
        guidance: of a network that has none in its weights.
    """
    conditions = Conditions(codec.encode_text(captions), first_frames)
    way = {"take": take, **guidance.way(backbone, codec)}
    parts = backbone.generate(conditions, noise, steps_of(num_steps, shift), **way)
    if len(backbone.chunks_of(noise.shape[1], conditions.num_given)) == 1:
        yield from (codec.decode(part) for part in parts)
    else:
        yield from codec.decode_parts(parts)
