"""One process at a time: a file's lock, which ends with its holder whatever becomes of it."""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TextIO

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a disk without locks answers: some network file systems."""


@contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[TextIO]:
    """Hold the lock of ``path``, a file that is made if need be; a child process that is given the file holds it too.

    On a disk without locks nothing is held, and that is told.

    Args:
        path: the file.
        patience: seconds to wait for another holder; None: as long as it takes.

    Raises:
        BlockingIOError: another process still holds it.
    """
    deadline = None if patience is None else time.monotonic() + patience
    while (file := _held(path, deadline)) is None:
        pass
    with file:
        yield file


def _held(path: Path, deadline: float | None) -> TextIO | None:
    """The file with its lock; None if it was removed meanwhile, as whoever held it before may have done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, suppress(FileNotFoundError):
        file = stack.enter_context(path.open("w"))
        _take(file, path, deadline)
        own, there = os.fstat(file.fileno()), path.stat()
        if (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino):
            stack.pop_all()
            return file
    return None


def _take(file: TextIO, path: Path, deadline: float | None) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | (0 if deadline is None else fcntl.LOCK_NB))
        except BlockingIOError:
            if deadline is None or time.monotonic() >= deadline:
                raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{path.parent} is on a disk without locks: nothing keeps a second process out", file=sys.stderr)
            return None
        time.sleep(0.2)


_claims: dict[Path, TextIO] = {}


def claim_numbered(first: Path, is_used: Callable[[Path], bool]) -> Path:
    """The first of ``NAME``, ``NAME-2``, ``NAME-3`` ... that is free and no other process was given; nothing is made.

    The claim ends with this process, or by :func:`give_up_claim`.

    Args:
        first: the path without a number.
        is_used: whether something is there already.
    """
    for number in count(1):
        path = first if number == 1 else first.with_name(f"{first.name}-{number}")
        if not is_used(path) and path not in _claims and _claim(path):
            if not is_used(path):
                return path
            give_up_claim(path)
    raise AssertionError("numbers do not end")


def give_up_claim(path: Path) -> None:
    """End the claim on a path, if this process has one."""
    if (file := _claims.pop(path, None)) is not None:
        _mark(path).unlink(missing_ok=True)
        file.close()


def _claim(path: Path) -> bool:
    _mark(path).parent.mkdir(parents=True, exist_ok=True)
    file = _mark(path).open("w")
    try:
        _take(file, _mark(path), time.monotonic())
    except BlockingIOError:
        file.close()
        return False
    _claims[path] = file
    atexit.register(give_up_claim, path)
    return True


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}.claim")
