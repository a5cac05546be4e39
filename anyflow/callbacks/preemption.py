"""Stop well: on SIGTERM or Ctrl-C finish the step, save, and let the run exit with a code that says what happened."""

from __future__ import annotations

import signal
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from anyflow.callbacks.checkpoints import Checkpoints


class Preemption(Callback):
    """Turn the first signal into a saved stop; a second Ctrl-C stops at once.

    Attributes:
        received: The signal that stopped the run, or None.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, *_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)

    def on_train_batch_end(self, trainer: lightning.Trainer, stage: Any, *_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            self.received = self.received or signal.SIGTERM
            self.checkpoints.save(trainer, stage)
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.min_steps = None

    def teardown(self, *_: Any, **__: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
