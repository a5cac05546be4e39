"""Video while it is being made: the frames of each finished part, before the next one is begun."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.control_feed import ControlFeed
from anyflow.backbone.controls import ControlSettings, by_latent_frame, controls_of
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.flowmap.sampling import steps_of


@torch.no_grad()
def stream_video(
    backbone: FlowMapBackbone,
    codec: Codec,
    captions: list[str],
    noise: Tensor,
    num_steps: int,
    shift: float,
    first_frames: Tensor | None = None,
    controls: Tensor | Iterator[Tensor] | None = None,
    **way: Any,
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
        controls: numbers of the pixel frames ``[B, 1 + P * (F - 1), W]``, in the order and the units of the network's
            configuration; NaN where they are not known. Of an iterator each chunk's are asked for with the chunk:
            ``[B, n, W]``, n its pixel frames (the first frame of all is one, then P for each latent frame).
        way: ``take`` and ``ask`` of :meth:`FlowMapBackbone.generate`, of a network that is no flow map or is guided.

    Raises:
        ValueError: the network is told no controls, or others than are given; an iterator ends early.
    """
    told: Any = None
    if controls is not None:
        told = _told(controls, controls_of(backbone.transformer), codec.temporal_factor)
    conditions = Conditions(codec.encode_text(captions), first_frames, told)
    parts = backbone.generate(conditions, noise, steps_of(num_steps, shift), **way)
    if len(backbone.chunks_of(noise.shape[1], conditions.num_given)) == 1:
        yield from (codec.decode(part) for part in parts)
    else:
        yield from codec.decode_parts(parts)


def _told(controls: Tensor | Iterator[Tensor], settings: ControlSettings | None, pixel_frames: int) -> Any:
    if settings is None:
        raise ValueError("controls are given, and this network is told none")
    if isinstance(controls, Tensor):
        return by_latent_frame(settings.checked(controls), pixel_frames)
    return ControlFeed(map(settings.checked, controls), pixel_frames)
