"""A run that resumes with another recipe: a checkpoint's learning rates and decays give way to the recipe's.

An optimiser's checkpoint holds its settings beside its averages, and a schedule's its base rates. Taken up as they are,
they would undo the changes that were asked for.
"""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer


class KeepSettings(Callback):
    """Notes the settings of optimisers before a checkpoint is taken up, and puts them back afterwards."""

    def __init__(self) -> None:
        self._settings: list[list[dict[str, Any]]] = []
        self._rates: list[list[float]] = []

    def on_fit_start(self, trainer: lightning.Trainer, stage: Any) -> None:
        self._settings = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in _all(trainer)
        ]
        self._rates = [[float(rate) for rate in config.scheduler.base_lrs] for config in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: lightning.Trainer, stage: Any) -> None:
        for optimizer, settings in zip(_all(trainer), self._settings, strict=True):
            for group, own in zip(optimizer.param_groups, settings, strict=True):
                group.update(own)
        for config, rates in zip(trainer.lr_scheduler_configs, self._rates, strict=True):
            schedule: Any = config.scheduler
            schedule.base_lrs = rates
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            for group, rate, factor in zip(schedule.optimizer.param_groups, rates, factors, strict=True):
                group["lr"] = rate * factor


def _all(trainer: lightning.Trainer) -> list[Optimizer]:
    """Every optimiser, and those that it is made of."""
    return [part for whole in trainer.optimizers for part in (whole, *getattr(whole, "_inner", ()))]
