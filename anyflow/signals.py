"""SIGTERM as an exception, for work that has something to tidy before it ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """SIGTERM came."""


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
