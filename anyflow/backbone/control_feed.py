"""Controls of a video that is streamed: they are asked for when the frames are made that they belong to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from anyflow.backbone.controls import by_latent_frame


class ControlFeed:
    """Controls of a video while it is made: they are asked for when the frames are that they belong to.

    It stands where a tensor ``[B, F, P, W]`` would, and is asked ``feed[:, start:stop]``, never far back.

    Args:
        parts: numbers ``[B, n, W]`` of the pixel frames to come, as many at a time as one likes: whole latent frames.
        pixel_frames: P.
    """

    kept = 64
    """Latent frames that can be asked for again."""

    def __init__(self, parts: Iterator[Tensor], pixel_frames: int) -> None:
        self._parts, self._pixel_frames = parts, pixel_frames
        self._known: Tensor | None = None
        self._first = 0

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        """Of latent frames ``start:stop``.

        Raises:
            ValueError: the parts end before, or they are no whole latent frames.
        """
        frames = place[1]
        while self._known is None or self._first + self._known.shape[1] < frames.stop:
            part = next(self._parts, None)
            if part is None:
                raise ValueError(f"the controls end before latent frame {frames.stop}")
            if (part.shape[1] - (self._known is None)) % self._pixel_frames:
                raise ValueError(f"controls of {part.shape[1]} pixel frames are no whole latent frames")
            self._known = followed(self._known, part, self._pixel_frames)
        found = self._known[:, frames.start - self._first : frames.stop - self._first]
        surplus = max(0, self._known.shape[1] - self.kept)
        self._known, self._first = self._known[:, surplus:], self._first + surplus
        return found


def followed(known: Tensor | None, part: Tensor, pixel_frames: int) -> Tensor:
    """Controls of latent frames so far ``[B, n, P, W]``, and with them those of the next pixel frames ``[B, f, W]``."""
    if known is None:
        return by_latent_frame(part, pixel_frames)
    return torch.cat([known, part.unflatten(1, (-1, pixel_frames))], dim=1)
