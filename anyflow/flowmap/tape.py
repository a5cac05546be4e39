"""A rollout's gradient with the activations of one jump: jumps are noted, and taken again when their turn comes.

Backward simulation keeps the graph of every jump until its loss is known: three passes' activations at once, though the
backward pass works through one of them at a time. A tape runs jumps without a graph, notes where each began, and after
the loss takes them again, the last one first, each with a graph of its own. The chain rule is the same, so the gradient
is the same; the price is one more forward pass for every noted jump.

Each jump has a backward call of its own (not a call nested in the loss's): sharded and replicated networks, which
count backward passes, see what they see of any other pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow.flowmap.sampling import BoundVelocity, take_jump

Pull = Callable[[Tensor, Tensor], None]
"""``pull(end, gradient)``: the backward pass from ``end``, whose gradient is known."""


class _Taken(NamedTuple):
    again: Callable[[Tensor], Tensor]
    start: Tensor
    end: Tensor


class Tape:
    """Takes jumps without their graph, and gives their gradient afterwards.

    Args:
        limit: how many jumps are noted, from the first; those that follow keep their graph. The last jump of a rollout
            gains nothing from a second pass. None: all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._taken: list[_Taken] = []

    def take(self, velocity: BoundVelocity, latents: Tensor, timestep: Tensor, r_timestep: Tensor) -> Tensor:
        """One jump, as :func:`anyflow.flowmap.sampling.take_jump`; a leaf that asks for a gradient if it was noted."""
        again = partial(take_jump, velocity, timestep=timestep, r_timestep=r_timestep)
        if not torch.is_grad_enabled() or len(self._taken) == self.limit:
            return again(latents)
        with torch.no_grad():
            end = again(latents)
        self._taken.append(_Taken(again, latents, end.requires_grad_()))
        return end

    def backward(self, pull: Pull) -> None:
        """Gradients of the noted jumps, once the loss has had its backward pass."""
        while self._taken:
            again, start, end = self._taken.pop()
            if end.grad is not None:  # None: the loss knew nothing of it
                pull(again(start), end.grad)
