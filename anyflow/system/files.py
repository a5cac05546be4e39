"""Files that are whole or absent: written beside their place, synced, renamed.

What a kill leaves behind is one file or folder of a known name, which the next writer of the same place replaces.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from anyflow.errors import UserError

UMASK = os.umask(0)
os.umask(UMASK)

PARTIAL = ".partial"
"""What the name of a thing that is being written ends in."""


def require_place(folder: Path, option: str, remedy: str = "name another folder") -> None:
    """Refuse a folder, there already or not, that nothing can be written in; nothing is left in it.

    Args:
        folder: Where results are to be written.
        option: What it was given by: ``--out``, ``run.out``.
        remedy: What to do about it.

    Raises:
        UserError: It is a file, or lies in one, or may not be written in, or not with this name.
    """
    try:
        above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if above.is_dir():
            with tempfile.TemporaryFile(dir=above):
                return
        why = "it is a file" if above == folder else f"{above} is a file"
    except OSError as error:
        why = f"nothing can be written there ({error.strerror or error})"
    raise UserError(f"{option} {folder}: {why}: {remedy}")


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
        with suppress(OSError):  # a full or read-only disk was the failure, and is reported
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def placing(path: Path) -> Iterator[Path]:
    """As :func:`replacing`, for a file that several processes, on any machines, may write at once: the last one stays.

    Raises:
        OSError: it cannot be written.
    """
    with partial_folder(path) as folder:
        place = folder / path.name
        yield place
        with naming(path):
            sync(place)
            place.replace(path)


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
    except Exception as error:
        link: BaseException | None = error
        while link is not None:  # a library's own error may stand before it
            if isinstance(link, OSError) and link.filename is None and link.errno is not None:
                link.filename = str(path)
            link = link.__cause__ or link.__context__
        raise


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to fill; who fills it gives it its name, else it vanishes.

    What killed writers of the same path have left is removed: living ones hold a lock beside theirs.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        _remove_unless_held(leftover)
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(folder)
    with lock.open("w") as file:
        _try_to_lock(file)
        try:
            with naming(path):
                folder.mkdir()
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _remove_unless_held(folder: Path) -> None:
    with suppress(OSError), _lock_of(folder).open("w") as file:
        if _try_to_lock(file):
            shutil.rmtree(folder, ignore_errors=True)
            _lock_of(folder).unlink()


def _try_to_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody holds it, or the file system has no locks
        return False
    return True


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def file_sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or a folder's list of files, to disk; a file gets the rights of any new file here.

    safetensors writes for the owner alone, and a lab's others are to load what is exported.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:  # what lies elsewhere too keeps its rights
            with suppress(OSError):  # the file system knows no rights
                os.fchmod(descriptor, stat.S_IMODE(found.st_mode) | 0o666 & ~UMASK)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder's files, and the folders themselves, to disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            sync(path)
