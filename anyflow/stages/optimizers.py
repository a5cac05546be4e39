"""Optimisers and learning-rate schedules, by name.

``adamw`` is what the released runs use. ``muon`` orthogonalises the update of every weight that is a matrix (a
convolution's kernel counts as the matrix of its flattened filters) and leaves vectors, embeddings and heads to AdamW:
from scratch and on a small budget it learns noticeably faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anyflow.backbone.roles import Role
from anyflow.stages.muon import Muon, evaluate
from anyflow.stages.options import OptimizerSettings


@dataclass(frozen=True)
class OptimizerGroup:
    """One optimiser of a stage: whose weights it moves, how, and how often in a whole run.

    Attributes:
        role: Whose weights.
        settings: How they move.
        updates: How many updates its schedule is for.
        field: Where the recipe has the settings.
    """

    role: Role
    settings: OptimizerSettings
    updates: int
    field: str

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[Optimizer, LambdaLR]:
        """The optimiser over named weights, and its schedule."""
        optimizer = build_optimizer(self.settings, parameters)
        return optimizer, build_schedule(self.settings, optimizer, self.updates)


def build_optimizer(settings: OptimizerSettings, parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """The optimiser over the named parameters that require gradients.

    Raises:
        ValueError: Unknown name.
    """
    trainable = [(name, p) for name, p in parameters if p.requires_grad]
    adamw: dict[str, Any] = {"lr": settings.lr, "betas": tuple(settings.betas), "weight_decay": settings.weight_decay}
    if settings.name == "adamw":
        return AdamW([p for _, p in trainable], **adamw, fused=True)
    if settings.name == "muon":
        matrices = [p for name, p in trainable if _is_matrix(name, p)]
        others = [p for name, p in trainable if not _is_matrix(name, p)]
        return MuonWithAdamW(matrices, others, **adamw)
    raise ValueError(f"unknown optimizer {settings.name!r}: adamw or muon")


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon serves this weight: a hidden layer's matrix or kernel, neither a table nor a read-out."""
    return parameter.ndim >= 2 and not any(part in name for part in ("embedding", "proj_out", "table", "norm", "gamma"))


class MuonWithAdamW(Optimizer):
    """Muon over the matrices, AdamW over the rest, as one optimiser with one learning rate to schedule."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        adamw_ratio: float = 0.3,
    ) -> None:
        groups = [{"params": matrices, "lr": lr}, {"params": others, "lr": lr * adamw_ratio}]
        super().__init__([group for group in groups if group["params"]], {"lr": lr})
        self._inner: list[Optimizer] = []
        if matrices:
            self._inner.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
        if others:
            self._inner.append(AdamW(others, lr=lr * adamw_ratio, betas=betas, weight_decay=weight_decay, fused=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of both."""
        loss = evaluate(closure)
        for inner, group in zip(self._inner, self.param_groups, strict=True):
            inner.param_groups[0]["lr"] = group["lr"]
            inner.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers' states."""
        return {"param_groups": super().state_dict()["param_groups"], "inner": [o.state_dict() for o in self._inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the states of :meth:`state_dict`."""
        super().load_state_dict({"param_groups": state_dict["param_groups"], "state": {}})
        for inner, state in zip(self._inner, state_dict["inner"], strict=True):
            inner.load_state_dict(state)


def build_schedule(settings: OptimizerSettings, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Linear warm-up, then constant or cosine; stepped once for each optimiser step."""

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        if settings.schedule == "constant":
            return 1.0
        progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)
