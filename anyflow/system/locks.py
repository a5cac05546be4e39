"""One process at a time: a file's lock, which ends with its holder whatever becomes of it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import TextIO

from anyflow.errors import UserError

MOST_ATTEMPTS = 1000
"""Files that are locked and then found removed, in a row: beyond that the disk itself cannot tell files apart."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a disk answers that knows no locks: some network disks, or as they are mounted."""


class NoLocks(UserError):
    """A disk that has no locks, and the remedy; who can do without goes on, and says so."""


@contextmanager
def locked(path: Path, patience: float | None = None, *, passing: bool = False) -> Iterator[TextIO]:
    """Hold the lock of ``path``, a file that is made if need be; a child process that is given the file holds it too.

    Args:
        path: the file.
        patience: seconds to wait for another holder; None: as long as it takes.
        passing: whether the file goes with the lock. Who waited for it then holds a new one.

    Raises:
        BlockingIOError: another process still holds it. NoLocks: the disk has no locks.
    """
    deadline = None if patience is None else time.monotonic() + patience
    for attempt in count():
        with path.open("w") as file:
            _lock(file, path, deadline)
            # Its holder may have removed it meanwhile: whoever comes now locks another file.
            if not _is_at(path, file) and attempt < MOST_ATTEMPTS:
                continue
            try:
                yield file
            finally:
                if passing and _is_at(path, file):
                    path.unlink(missing_ok=True)
            return


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder and hold it, in one act: no other process has it meanwhile. It may be gone afterwards.

    Raises:
        BlockingIOError: another process holds it.
    """
    with ExitStack() as stack:
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / "lock", patience=0))
                break
            except (FileExistsError, FileNotFoundError):
                if folder.exists() and not folder.is_dir():
                    raise  # else its holder has just removed it
        yield


def _lock(file: TextIO, path: Path, deadline: float | None) -> None:
    """Wait for the lock, until the deadline."""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | (0 if deadline is None else fcntl.LOCK_NB))
        except BlockingIOError:
            if deadline is not None and time.monotonic() >= deadline:
                raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise NoLocks(
                f"{path}: its disk knows no file locks, which keep two processes apart ({error.strerror}): mount it "
                "with locks (Lustre: -o flock; NFS: with its lock service), or write to another disk"
            ) from error
        time.sleep(0.2)


def _is_at(path: Path, file: TextIO) -> bool:
    """Whether an open file is the one that a path leads to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
