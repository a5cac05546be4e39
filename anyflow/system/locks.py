"""One process at a time: a file's lock, which ends with its holder whatever becomes of it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[TextIO]:
    """Hold the lock of ``path``, a file that is made if need be; a child process that is given the file holds it too.

    Args:
        path: the file.
        patience: seconds to wait for another holder; None: as long as it takes.

    Raises:
        BlockingIOError: another process still holds it.
    """
    with path.open("w") as file:
        if patience is None:
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            _try_until(file, time.monotonic() + patience)
        yield file


def _try_until(file: TextIO, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)
