"""The any-step curve during training, every so many steps, with the averaged weights."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from anyflow.system.signals import Listener, Terminated


class Sampling(Callback):
    """Calls ``measure(label)`` every ``every_steps`` optimiser steps but the last, which the run's end measures.

    Args:
        measure: measures and keeps a curve, or finds that it is kept; raises Terminated when the listener heard a
            signal. The checkpoint of this step is then saved, and the curve is measured when the run goes on.
        every_steps, total_steps: of the run.
        listener: hears the signals.
    """

    def __init__(self, measure: Any, *, every_steps: int, total_steps: int, listener: Listener) -> None:
        self.measure = measure
        self.every_steps = every_steps
        self.total_steps = total_steps
        self.listener = listener

    def on_train_start(self, trainer: lightning.Trainer, stage: Any) -> None:
        """Measure what a run that was stopped meanwhile has left; nothing was trained since it was saved."""
        self.listener.start()
        self._measure(stage)

    def on_train_batch_end(self, trainer: lightning.Trainer, stage: Any, *_: Any) -> None:
        try:
            self._measure(stage)
        except Terminated as stop:
            if stop.at_once:
                raise
            # else whoever listens saves this step and ends the run

    def _measure(self, stage: Any) -> None:
        is_whole = stage.update.is_complete and stage.turn == 0 and 0 < stage.step < self.total_steps
        if not is_whole or stage.step % self.every_steps:  # on all ranks: sampling from sharded weights takes all
            return
        stage.eval()
        try:
            with torch.no_grad():
                self.measure(f"step_{stage.step:08d}")
        finally:
            stage.train()
