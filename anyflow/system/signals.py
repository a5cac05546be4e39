"""SIGTERM and Ctrl-C for work that has something to tidy or to save before it ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Terminated(BaseException):
    """A signal came that ends the work: ``received``; ``at_once`` if nothing may be finished any more."""

    def __init__(self, received: signal.Signals = signal.SIGTERM, at_once: bool = False) -> None:
        super().__init__(received)
        self.received = received
        self.at_once = at_once


@contextmanager
def sigterm_raises(reason: Callable[[], BaseException]) -> Iterator[None]:
    """Within the block, which the main thread runs, SIGTERM raises what ``reason`` makes."""

    def stop(number: int, frame: Any) -> None:
        raise reason()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C raise :class:`Terminated` at once."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated(signal.Signals(number))

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Listener:
    """Remembers the first SIGTERM or Ctrl-C, for work that ends where it can be gone on with; a second Ctrl-C raises.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def start(self) -> None:
        """Listen, in place of whoever does; again if another handler was set meanwhile."""
        for number in STOPPING:
            previous = signal.signal(number, self._hear)
            self._previous.setdefault(number, previous)

    def stop(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __enter__(self) -> Listener:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _hear(self, number: int, frame: Any) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise Terminated(signal.SIGINT, at_once=True)
        self.received = signal.Signals(number)
