"""Stop well: on SIGTERM or Ctrl-C finish the step, save, and let the run exit with a code that says what happened."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch import nn

from anyflow.backbone.parallelize import largest_on_ranks, rank_and_size
from anyflow.system.signals import Listener, Terminated
from anyflow.training.callbacks.checkpoints import Checkpoints


class Preemption(Callback):
    """Turn the first signal into a saved stop; a second Ctrl-C stops at once.

    Attributes:
        listener: hears the signals; other callbacks may ask it.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.listener = Listener()

    @property
    def received(self) -> signal.Signals | None:
        """The signal that stopped the run, or None."""
        return self.listener.received

    def on_train_start(self, *_: Any) -> None:
        self.listener.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, stage: Any, *_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            self.listener.received = self.received or signal.SIGTERM
            self.checkpoints.save(trainer, stage)
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.min_steps = None

    def teardown(self, *_: Any, **__: Any) -> None:
        self.listener.stop()


@contextmanager
def stop_between_calls(network: nn.Module, listener: Listener | None = None) -> Iterator[Callable[[], None]]:
    """Within the block a signal on any rank ends the work on all of them, at the network's next call.

    A rank that stopped by itself would leave the others in a collective. Sampling calls the network equally often on
    every rank; what is given to the block asks between the calls, likewise everywhere.

    Args:
        network: that the block calls.
        listener: that listens already; without one, one process alone is left to whoever listens, and is stopped at
            once.

    Raises:
        Terminated: the signal came.
    """
    with ExitStack() as stack:
        given = listener
        if listener is None:
            if rank_and_size()[1] == 1:
                yield lambda: None
                return
            listener = stack.enter_context(Listener())
        heard: Listener = listener

        def check(*_: Any) -> None:
            number = largest_on_ranks(int(heard.received or 0))
            if number:
                raise Terminated(signal.Signals(number))

        stack.callback(network.register_forward_pre_hook(check).remove)
        yield check
        if heard is not given:
            check()  # after the last call, where nobody would hear of it any more
