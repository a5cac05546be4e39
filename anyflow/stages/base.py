"""What all stages share: counters, seeded draws, optimiser, average, conditioning.

A stage is a LightningModule whose ``training_step`` reads as the algorithm's pseudo-code. Everything random in it comes
from :meth:`Stage.generator`, a function of (seed, purpose, position) alone: the same numbers on every rank, after every
resume, for every number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from anyflow.backbone.parallelize import whole
from anyflow.errors import UserError
from anyflow.stages.ema import Ema, EmaSettings
from anyflow.stages.optimizers import OptimizerSettings, build_optimizer, build_schedule


class Stage(lightning.LightningModule):
    """A stage of training over one trained module.

    Attributes:
        step: Optimiser steps done. Our own count: Lightning's ``global_step`` counts every optimiser's.
        position: Batches begun, from which every random draw is derived.
    """

    def __init__(
        self, trained: nn.Module, *, optimizer: OptimizerSettings, ema: EmaSettings, total_steps: int, seed: int
    ) -> None:
        super().__init__()
        self.optimizer_settings = optimizer
        self.total_steps = total_steps
        self.seed = seed
        self.step = 0
        self.position = 0
        self.strict_loading = False  # frozen weights are not saved; what is missing is looked for in on_load_checkpoint
        self._has_bad_loss: Tensor | bool = False
        self.ema = Ema(trained.parameters(), ema) if ema.decay > 0 else None

    def generator(self, purpose: str, *position: int) -> torch.Generator:
        """A CPU generator for the current batch's ``purpose``, equal on all ranks."""
        text = ":".join(map(str, (self.seed, purpose, self.position, *position)))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)

    def report(self, **metrics: Tensor | float) -> None:
        """Log one step's figures; ``loss`` also goes to the progress bar."""
        for name, value in metrics.items():
            self.log(name, value, prog_bar=name == "loss", batch_size=1)

    def configure_model(self) -> None:
        """Nothing to do: networks come spread over the ranks, if they are (``backbone/parallelize.py``)."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.optimizer_settings, self.named_parameters())
        schedule = build_schedule(self.optimizer_settings, optimizer, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.report(grad_norm=self.clip_norm(optimizer, self.optimizer_settings, "optimizer"))

    def clip_norm(self, optimizer: Any, settings: OptimizerSettings, field: str) -> Tensor:
        """Clip by global norm and stop at the first gradient that is not a number; returns the norm before.

        Raises:
            UserError: the norm is not finite; ``field`` is where the recipe has the settings.
        """
        trainable = [p for group in optimizer.param_groups for p in group["params"]]
        norm = whole(nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None]))
        if not torch.isfinite(norm):
            raise UserError(
                f"{field}.lr={settings.lr:g}: the gradient norm became {float(norm)} at step {self.step}"
                f"{self._where_it_began()}; lower the learning rate or lengthen {field}.warmup_steps, then resume"
            )
        if settings.clip > 0:
            nn.utils.clip_grads_with_norm_(trainable, settings.clip, norm)
        return norm

    def note_losses(self, per_sample: Tensor) -> None:
        """Remember whether this rank's own losses are numbers, before ranks are mixed."""
        self._has_bad_loss = self._has_bad_loss | ~torch.isfinite(per_sample.detach()).all()

    def _where_it_began(self) -> str:
        """The ranks whose own losses were no numbers, in words (a collective: all ranks see the same norm)."""
        bad = [str(rank) for rank, is_bad in enumerate(gather(bool(self._has_bad_loss))) if is_bad]
        if len(bad) in (0, world()[1]) and world()[1] > 1:
            return " on all ranks" if bad else ", though all losses were finite"
        return f" (it began on rank {', '.join(bad)} of {world()[1]})" if world()[1] > 1 else ""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        args[2].zero_grad()  # Lightning would keep them through the next pass, and through sampling
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)

    def on_train_batch_start(self, *_: Any) -> None:
        self.position += 1  # here and not at the batch's end: callbacks save before the module's own end hook runs

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["anyflow"] = {"step": self.step, "position": self.position}
        frozen = {name for name, weight in self.named_parameters() if not weight.requires_grad}
        for name in frozen & checkpoint.get("state_dict", {}).keys():
            del checkpoint["state_dict"][name]  # a frozen base is loaded from where it came from

    def saved_names(self) -> set[str]:
        """The entries of the state dict that a checkpoint must hold: trained weights, their average, buffers."""
        return self.state_dict().keys() - {name for name, p in self.named_parameters() if not p.requires_grad}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:
            check_complete(self, checkpoint["state_dict"])
        self.step = checkpoint["anyflow"]["step"]
        self.position = checkpoint["anyflow"]["position"]


def check_complete(stage: Stage, names: Iterable[str]) -> None:
    """That a checkpoint has every weight that the stage trains.

    Raises:
        UserError: one is missing.
    """
    missing = stage.saved_names() - set(names)
    if missing:
        raise UserError(
            f"the checkpoint lacks {min(missing)} ({len(missing)} weights in all): it is of another stage or model; "
            "resume it with its own recipe"
        )


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """Everybody's ``value``, in the order of the ranks."""
    if world()[1] == 1:
        return [value]
    values: list[Any] = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values


def global_mean(values: Tensor, chosen: Tensor) -> Tensor | None:
    """Mean of ``values[chosen]`` over all ranks, detached; None when no rank has any (all ranks agree on that)."""
    total = torch.stack([values.detach()[chosen].double().sum(), chosen.double().sum()])
    if world()[1] > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).to(values.dtype) if total[1] > 0 else None
