"""What all stages share: counters, seeded draws, optimiser, average, conditioning.

A stage is a LightningModule whose ``training_step`` reads as the algorithm's pseudo-code. Everything random in it comes
from :meth:`Stage.generator`, a function of (seed, purpose, position) alone: the same numbers on every rank, after every
resume, for every number of workers.

An update may take several passes, each with a batch of its own. What is drawn for a sample depends on its number in the
update's whole batch, and losses are averaged over that: how it is split in passes and ranks changes nothing.
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
from anyflow.stages.ema import Ema
from anyflow.stages.optimizers import build_optimizer, build_schedule
from anyflow.stages.options import EmaSettings, OptimizerSettings


class Stage(lightning.LightningModule):
    """A stage of training over one trained module.

    Attributes:
        passes: Batches whose gradients make one update.
        step: Optimiser steps done. Our own count: Lightning's ``global_step`` counts every optimiser's.
        turn: Updates done of the step under way, of a stage whose steps have several.
        position: Updates begun, from which every random draw is derived.
    """

    def __init__(
        self,
        trained: nn.Module,
        *,
        optimizer: OptimizerSettings,
        ema: EmaSettings,
        total_steps: int,
        seed: int,
        passes: int = 1,
    ) -> None:
        super().__init__()
        self.optimizer_settings = optimizer
        self.total_steps = total_steps
        self.seed = seed
        self.passes = passes
        self.step = self.turn = self.position = 0
        self._passes_begun = 0  # of the update under way
        self._place: tuple[int, int] | None = None  # of the batch: see begin_pass
        self._before_update: dict[str, Any] = {}
        self._summed: dict[str, Tensor | float] = {}  # losses of the update's passes so far
        self.strict_loading = False  # frozen weights are not saved; what is missing is looked for in on_load_checkpoint
        self._has_bad_loss: Tensor | bool = False
        self.ema = Ema(trained.parameters(), ema) if ema.decay > 0 else None

    def begin_pass(self, place: tuple[int, int] | None = None) -> None:
        """Go on to the next batch, and to the next update if the one under way has all of its passes.

        ``place`` is where the batch stands in that of the update: the clips before it, and all of them, over all ranks.
        None: all passes have as many clips.
        """
        if self.is_between_updates:
            self._before_update = self.counters()
            self.position += 1
            self._passes_begun = 0
            self._summed = {}
        self._passes_begun += 1
        self._place = place

    @property
    def is_between_updates(self) -> bool:
        """Whether no pass waits for others to make its update: now nothing is lost by a stop."""
        return self._passes_begun in (0, self.passes)

    def place_of(self, batch_size: int) -> tuple[int, int]:
        """Where a batch of this many clips a rank stands in its update's: the clips before it, and all of them."""
        size = batch_size * world()[1]
        return self._place or (max(0, self._passes_begun - 1) * size, self.passes * size)

    def own_samples(self, batch_size: int) -> list[int]:
        """The numbers of this rank's samples in the update's batch: dealt out in turn, as the data stream does."""
        rank, ranks = world()
        first = self.place_of(batch_size)[0]
        return list(range(first + rank, first + batch_size * ranks, ranks))

    def weight_of_pass(self, batch_size: int) -> float:
        """What a batch's mean counts for, so that the mean over ranks and passes is that over the update's batch: 1 if
        all passes have as many clips.
        """
        return batch_size * world()[1] * self.passes / self.place_of(batch_size)[1]

    def mean_of_update(self, per_sample: Tensor) -> Tensor:
        """The mean of losses ``[B]``, weighed with :meth:`weight_of_pass`."""
        return per_sample.mean() * self.weight_of_pass(len(per_sample))

    def generator(self, purpose: str, *position: int) -> torch.Generator:
        """A CPU generator for the current update's ``purpose``, equal on all ranks and in all passes."""
        text = ":".join(map(str, (self.seed, purpose, self.position, *position)))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)

    def report(self, **metrics: Tensor | float) -> None:
        """Log one step's figures; those of a bar of Lightning's own would be fetched from the device at every step."""
        for name, value in metrics.items():
            self.log(name, self._over_passes(name, value), batch_size=1)

    def _over_passes(self, name: str, value: Tensor | float) -> Tensor | float:
        """A loss's mean over the update's passes so far: one pass alone has other kinds of samples than the next."""
        if self.passes == 1 or not name.endswith("loss") or name == "diffusion_loss":
            return value
        own = value.detach() if isinstance(value, Tensor) else value
        self._summed[name] = own + self._summed.get(name, 0.0)
        return self._summed[name] / self._passes_begun

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

    def on_train_batch_start(self, batch: dict[str, Any], batch_index: int) -> None:
        place = batch.get("place")
        self.begin_pass(None if place is None else (place[0], place[1]))

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and optimisers; later steps do not change it."""
        return {"step": self.step, "turn": self.turn, "position": self.position}

    def count_from(self, counters: dict[str, Any]) -> None:
        """Take up what :meth:`counters` kept; the next pass begins an update."""
        self.step, self.position = counters["step"], counters["position"]
        self.turn = counters.get("turn", 0)  # which older checkpoints of most stages do not name
        self._passes_begun = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Passes that wait for their update have changed no weight: a checkpoint is of the moment before them.
        checkpoint["anyflow"] = self.counters() if self.is_between_updates else self._before_update
        frozen = {name for name, weight in self.named_parameters() if not weight.requires_grad}
        for name in frozen & checkpoint.get("state_dict", {}).keys():
            del checkpoint["state_dict"][name]  # a frozen base is loaded from where it came from

    def saved_names(self) -> set[str]:
        """The entries of the state dict that a checkpoint must hold: trained weights, their average, buffers."""
        return self.state_dict().keys() - {name for name, p in self.named_parameters() if not p.requires_grad}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:
            check_complete(self, checkpoint["state_dict"])
        self.count_from(checkpoint["anyflow"])


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


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' ``values``, on every rank."""
    if world()[1] > 1:
        dist.all_reduce(values)
    return values
