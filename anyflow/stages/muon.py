"""Muon: momentum, orthogonalised, for weights that are matrices (a convolution's kernel is the matrix of its filters).

The update is ``torch.optim.Muon``'s with ``adjust_lr_fn="match_rms_adamw"``. It is written out here for speed: torch
orthogonalises matrix by matrix in bfloat16, which processors without units for it emulate, thirty times slower
than float32. Here matrices of one shape go together, in float32 on CPUs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, steepest at zero (Jordan et al., 2024)."""

TOGETHER = 2**24
"""Most numbers that are orthogonalised at once: it bounds the memory of the copies."""


class Muon(Optimizer):
    """Momentum whose direction has all singular values near 1, scaled to the size of AdamW's updates."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every weight that has a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            moved = [weight for weight in group["params"] if weight.grad is not None]
            for weights in _alike(moved):
                directions = orthogonalise(torch.stack([self._direction(w, group["momentum"]) for w in weights]))
                scale = 0.2 * math.sqrt(max(directions.shape[1:]))  # the RMS of an AdamW update
                for weight, direction in zip(weights, directions, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(direction.view_as(weight), alpha=-group["lr"] * scale)
        return loss

    def _direction(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's momentum of a weight, as a matrix."""
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum).flatten(1)


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss of an optimiser step's closure, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def orthogonalise(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Matrices ``[n, rows, columns]`` with their singular values brought near 1, between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    found = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    is_tall = found.shape[1] > found.shape[2]
    if is_tall:
        found = found.mT
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return (found.mT if is_tall else found).to(matrices.dtype)


def _alike(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Weights by shape, precision and device, at most :data:`TOGETHER` numbers at once."""
    kinds: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for weight in weights:
        kinds[weight.shape, weight.dtype, weight.device].append(weight)
    for found in kinds.values():
        size = max(1, TOGETHER // found[0].numel())
        yield from (found[start : start + size] for start in range(0, len(found), size))
