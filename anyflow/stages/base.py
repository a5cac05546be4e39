"""What all stages share: optimisers, averages, counters, checkpoints.

A stage is a LightningModule whose ``training_step`` reads as the algorithm's pseudo-code. It holds what it is made of:
the update under way, what makes batches, the losses; each is an object with plain arguments. Every stage derives from
:class:`Stage`, and from no other stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from anyflow.backbone.codec import Codec
from anyflow.backbone.context import ALONE, Context
from anyflow.backbone.parallelize import whole
from anyflow.backbone.roles import Roles
from anyflow.errors import UserError
from anyflow.flowmap.intervals import IntervalShares
from anyflow.stages.ema import Ema
from anyflow.stages.optimizers import OptimizerGroup
from anyflow.stages.options import EmaSettings, OptimizerSettings
from anyflow.stages.update import Update


@dataclass(frozen=True)
class Training:
    """How a stage trains.

    Attributes:
        optimizer: how weights move.
        ema: their average.
        total_steps: of the run.
        seed: of every draw.
        passes: batches of one update.
        context: the ranks that share this one's clips.
    """

    optimizer: OptimizerSettings
    ema: EmaSettings
    total_steps: int
    seed: int
    passes: int = 1
    context: Context = ALONE


class Counted(Protocol):
    """A part of a stage with numbers that a checkpoint keeps."""

    def counters(self) -> dict[str, Any]:
        """The numbers by name; later steps do not change them."""

    def count_from(self, counters: Mapping[str, Any]) -> None:
        """Take up what :meth:`counters` kept."""


class Stage(lightning.LightningModule):
    """A stage of training.

    Attributes:
        update: The update under way.
        step: Optimiser steps done. Our own count: Lightning's ``global_step`` counts every optimiser's.
        turn: Updates done of the step under way, of a stage whose steps have several.
        groups: The optimisers by name; a stage that has several moves them itself, by :meth:`end_turn`.
        codec: Encodes for it; None: nothing does.
        roles: Networks beside the trained one; None: there are none.
        shares: How samples are dealt to intervals; None: they are not.
        counted: Its parts that count.
    """

    shares: IntervalShares | None = None
    counted: tuple[Counted, ...] = ()

    def __init__(
        self,
        trained: nn.Module,
        training: Training,
        *,
        codec: Codec | None = None,
        roles: Roles | None = None,
        groups: dict[str, OptimizerGroup] | None = None,
    ) -> None:
        super().__init__()
        self.total_steps = training.total_steps
        self.update = Update(training.seed, training.passes, training.context)
        alone = OptimizerGroup("student", training.optimizer, training.total_steps, "optimizer")
        self.groups = groups or {"student": alone}
        self.automatic_optimization = groups is None
        self.step = self.turn = 0
        self.roles = roles
        self.others = nn.ModuleDict({} if roles is None else roles.others)
        self._codec = (codec,)  # frozen and shared: kept out of this module's parameters and checkpoints
        self._before_update: dict[str, Any] = {}
        self.strict_loading = False  # frozen weights are not saved; what is missing is looked for in on_load_checkpoint
        averaged = trained.parameters() if roles is None else [weight for _, weight in roles.parameters("student")]
        self.ema = Ema(averaged, training.ema) if training.ema.decay > 0 else None

    @property
    def codec(self) -> Codec | None:
        """Pixels to latents, prompts to embeddings."""
        return self._codec[0]

    @property
    def learns_from_samples(self) -> bool:
        """Whether the update under way is a critic's, which learns from the student's samples and needs no clips."""
        return self.turn > 0

    def on_fit_start(self) -> None:
        if self.codec is not None and not self.codec.is_parked:
            self.codec.to(self.device)
        if self.roles is not None:
            self.roles.place(self.device)

    def on_train_batch_start(self, batch: dict[str, Any], batch_index: int) -> None:
        if self.update.context.size > 1:
            self.update.context.check_same(batch["key"])
        place = batch.get("place")
        self.begin_pass(None if place is None else (place[0], place[1]))

    def begin_pass(self, place: tuple[int, int] | None = None) -> None:
        """Go on to the next batch; see :meth:`anyflow.stages.update.Update.begin_pass`."""
        if self.update.is_complete:
            self._before_update = self.counters()
        self.update.begin_pass(place)

    def report(self, **figures: Tensor | float) -> None:
        """Log one step's figures; those of a bar of Lightning's own would be fetched from the device at every step."""
        for name, value in figures.items():
            self.log(name, self.update.over_passes(name, value), batch_size=1)

    def configure_model(self) -> None:
        """Nothing to do: networks come spread over the ranks, if they are (``backbone/parallelize.py``)."""

    # Updates --------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.automatic_optimization:
            [group] = self.groups.values()
            optimizer, schedule = group.build(self.named_parameters())
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        assert self.roles is not None, "several optimisers move several roles"
        built = [group.build(self.roles.parameters(group.role)) for group in self.groups.values()]
        return [optimizer for optimizer, _ in built], [schedule for _, schedule in built]  # type: ignore[return-value]

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        [group] = self.groups.values()
        self.report(grad_norm=self.clip_norm(optimizer, group))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        args[2].zero_grad()  # Lightning would keep them through the next pass, and through sampling
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)

    def end_turn(self, group: str, turns: int = 1) -> None:
        """End a pass of a turn: if it completes the update, move the group's weights.

        ``turns`` are those of a step.
        """
        if self.update.is_complete:
            self.move(group)
            self.turn = (self.turn + 1) % turns
            self.step += self.turn == 0

    def move(self, name: str) -> None:
        """One optimiser step of a group, whose gradient is accumulated."""
        group, which = self.groups[name], list(self.groups).index(name)
        optimizer: Any = self.optimizers()[which]  # type: ignore[index]
        schedule: Any = self.lr_schedulers()[which]  # type: ignore[index]
        norm = self.clip_norm(optimizer, group)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        self.report(**{"grad_norm" if group.role == "student" else f"{group.role}_grad_norm": norm})
        if group.role == "student" and self.ema is not None:
            self.ema.update(self.step + 1)

    def clip_norm(self, optimizer: Any, group: OptimizerGroup) -> Tensor:
        """Clip by global norm and stop at the first gradient that is not finite; returns the norm before.

        Raises:
            UserError: the norm is not finite.
        """
        trainable = [p for each in optimizer.param_groups for p in each["params"]]
        norm = whole(nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None]))
        if not torch.isfinite(norm):
            raise UserError(
                f"{group.field}.lr={group.settings.lr:g}: the gradient norm became {float(norm)} at step {self.step}"
                f"{self.update.where_it_began()}; lower the learning rate or lengthen {group.field}.warmup_steps, "
                "then resume"
            )
        if group.settings.clip > 0:
            nn.utils.clip_grads_with_norm_(trainable, group.settings.clip, norm)
        return norm

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and optimisers; later steps do not change it."""
        own = {"step": self.step, "turn": self.turn, "position": self.update.position}
        return own | {name: value for part in self.counted for name, value in part.counters().items()}

    def count_from(self, counters: Mapping[str, Any]) -> None:
        """Take up what :meth:`counters` kept; the next pass begins an update."""
        self.step = counters["step"]
        self.turn = counters.get("turn", 0)  # which older checkpoints of most stages do not name
        self.update.go_on_from(counters["position"])
        for part in self.counted:
            part.count_from(counters)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Passes that wait for their update have changed no weight: a checkpoint is of the moment before them.
        checkpoint["anyflow"] = self.counters() if self.update.is_complete else self._before_update
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
