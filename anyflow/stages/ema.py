"""An exponential moving average of the trainable weights, kept in the module's own state dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anyflow.stages.options import EmaSettings


class Ema(nn.Module):
    """Shadow weights as buffers, so that checkpoints and sharding carry them like any other weight.

    Of the parameters given it holds those that are trained: a frozen base needs no average.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: EmaSettings) -> None:
        super().__init__()
        self.settings = settings
        self._sources = [p for p in parameters if p.requires_grad]
        for index, parameter in enumerate(self._sources):
            self.register_buffer(f"shadow_{index}", parameter.detach().clone())

    @property
    def shadows(self) -> list[Tensor]:
        """The averaged weights, in the order of the trained parameters."""
        return [self.get_buffer(f"shadow_{index}") for index in range(len(self._sources))]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average after optimiser step ``step`` (counted from 1)."""
        decay = self.settings.decay if step > self.settings.start_step else 0.0
        torch._foreach_lerp_(self.shadows, [p.detach() for p in self._sources], 1.0 - decay)

    def adopt(self) -> None:
        """Go on training from the averaged weights."""
        self._assign(self.shadows)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module computes with the averaged weights."""
        kept = [p.detach().clone() for p in self._sources]
        self._assign(self.shadows)
        try:
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._sources, values, strict=True):
            parameter.copy_(value)
