"""Files that are whole or absent: written beside their place, synced, renamed.

What a kill leaves behind is one file or folder of a known name, which the next writer of the same place replaces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
"""What the name of a thing that is being written ends in."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write a file at: it takes the path's place on success and vanishes on failure.

    Raises:
        OSError: it cannot be written; its ``filename`` is never empty.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with naming(path):
            yield partial
            sync(partial)
            partial.replace(path)
    except BaseException:
        with suppress(OSError):  # a full disk or a read-only one was the failure, and is told
            partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file in one step.

    Raises:
        OSError: as :func:`replacing`.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the system the name of the file that was being written, where it has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Force a file, or a folder's list of files, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder's files, and the folders themselves, to disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            sync(path)
