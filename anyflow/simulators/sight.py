"""What people see first in clips of a domain: shares of clips by the name of the figure, read from pixels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from anyflow.simulators.simulated import HEIGHT, WIDTH
from anyflow.simulators.whole_cars import Frames, whole_frames

EYES: Mapping[str, tuple[str, str, Callable[[Frames], float]]] = {
    "driving-open": ("whole_cars", "whole_frames", whole_frames)
}
"""By domain: the figures of whole clips and of their frames, and the share of a clip's frames that are whole."""


def seen_shares(clips: Tensor, domains: Sequence[str]) -> dict[str, float]:
    """The shares of clips and of frames that are whole, by figure; nothing of domains without an eye.

    Args:
        clips: uint8 ``[N, F, H, W, 3]``; those of another size than the simulators' are brought to it.
        domains: one a clip.
    """
    found: dict[str, list[float]] = {}
    for clip, domain in zip(clips, domains, strict=True):
        if domain in EYES:
            clip_figure, frame_figure, share_of = EYES[domain]
            share = share_of(_sized(clip))
            found.setdefault(clip_figure, []).append(share == 1)
            found.setdefault(frame_figure, []).append(share)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _sized(clip: Tensor) -> Frames:
    if clip.shape[1:3] == (HEIGHT, WIDTH):
        return clip.numpy()
    pictures = functional.interpolate(clip.permute(0, 3, 1, 2).float(), (HEIGHT, WIDTH), mode="area")
    return pictures.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
