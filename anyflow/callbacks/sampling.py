"""The any-step curve during training, every so many steps, with the averaged weights."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback


class Sampling(Callback):
    """Calls ``measure(label)`` every ``every_steps`` optimiser steps but the last, which the run's end measures."""

    def __init__(self, measure: Any, *, every_steps: int, total_steps: int) -> None:
        self.measure = measure
        self.every_steps = every_steps
        self.total_steps = total_steps

    def on_train_batch_end(self, trainer: lightning.Trainer, stage: Any, *_: Any) -> None:
        is_whole = stage.is_between_updates and stage.turn == 0 and 0 < stage.step < self.total_steps
        if is_whole and stage.step % self.every_steps == 0:  # on all ranks: sampling from sharded weights takes all
            stage.eval()
            with torch.no_grad():
                self.measure(f"step_{stage.step:08d}")
            stage.train()
