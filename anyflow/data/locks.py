"""One process at a time: a file's lock, which ends with its holder whatever becomes of it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[TextIO]:
    """Hold the lock of ``path``, a file that is made if need be; a child process that is given the file holds it too.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
