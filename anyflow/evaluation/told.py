"""What samples are made by: prompts, given frames and controls, one row a clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Told(NamedTuple):
    """What samples are made by, one row a clip."""

    captions: list[str]
    """The prompts."""
    first_frames: Tensor | None = None
    """Given clean latents ``[B, k, C, H, W]``; None: no frames are given."""
    controls: Tensor | None = None
    """Numbers of the pixel frames ``[B, F, W]``, NaN where they are not known; None: the model is told none."""

    def of_rows(self, rows: Sequence[int]) -> Told:
        """Of some clips."""
        own = [self.captions[row] for row in rows]
        return Told(own, *(None if part is None else part[list(rows)] for part in self[1:]))

    def to(self, device: torch.device | str) -> Told:
        """On a device."""
        return Told(self.captions, *(None if part is None else part.to(device) for part in self[1:]))
