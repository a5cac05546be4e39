"""Files that are read where they lie, here or elsewhere: their size and version, their bytes, their folder."""

from __future__ import annotations

import fnmatch
import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from anyflow.data import remote

FIRST_BLOCK = 2**16
"""Bytes of a first request, and of one after a jump: the headers and texts between two videos."""
VERSIONS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "LastModified", "last_modified", "mtime")
"""What the file systems call the version of a file."""


def stamp_of(address: str) -> tuple[int, str]:
    """(bytes, version) of a file: another version has another text; empty where a server tells none.

    Raises:
        OSError: it is not there or cannot be read. UserError: a server does not answer.
    """
    if not remote.is_url(address):
        stat = os.stat(address)
        return stat.st_size, str(stat.st_mtime_ns)
    facts = remote.ask(address, "_info")
    if facts.get("type") == "directory":
        raise FileNotFoundError(f"{address} is a folder")
    if facts.get("size") is None:
        raise OSError("the server does not tell its size")
    return int(facts["size"]), next((str(facts[name]) for name in VERSIONS if facts.get(name)), "")


def open_at(address: str, ahead: bool = False) -> BinaryIO:
    """A file to read and seek in; ``ahead`` fetches the next block of one elsewhere while this one is used.

    Raises:
        OSError: it is not there or cannot be read. UserError: a server does not answer.
    """
    if not remote.is_url(address):
        return open(address, "rb")
    return RangeFile(address, stamp_of(address)[0], ahead)  # type: ignore[return-value]


def list_folder(place: str, pattern: str) -> list[str]:
    """The files of a folder, here or in a bucket, whose names fit a pattern; sorted.

    Raises:
        OSError: there is no such folder. UserError: a server does not answer.
    """
    if not remote.is_url(place):
        return sorted(str(path) for path in Path(place).iterdir() if fnmatch.fnmatch(path.name, pattern))
    scheme = place.partition("://")[0]
    found = remote.ask(place.rstrip("/"), "_ls", detail=True)
    names = [str(item["name"]) for item in found if item.get("type") != "directory"]
    fitting = sorted(name for name in names if fnmatch.fnmatch(name.rpartition("/")[2], pattern))
    return [name if remote.is_url(name) else f"{scheme}://{name}" for name in fitting]


class RangeFile(io.RawIOBase):
    """A file elsewhere, read by ranges: twice as much at each request while reading goes on, little after a jump.

    Args:
        address: of the file.
        size: its bytes.
        ahead: ask for the next block while this one is read.

    Raises:
        FileNotFoundError: it is gone. UserError: a server does not answer. Both when reading.
    """

    def __init__(self, address: str, size: int, ahead: bool = False) -> None:
        super().__init__()
        self.address, self.size = address, size
        self._place, self._start, self._block = 0, 0, b""
        self._length = remote.BLOCK if ahead else FIRST_BLOCK
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._next: Future[bytes] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill all of ``buffer``, unless the file ends."""
        written, view = 0, memoryview(buffer).cast("B")
        while written < len(view) and self._place < self.size:
            within = self._place - self._start
            if not 0 <= within < len(self._block):
                self._fetch()
                within = 0
            part = self._block[within : within + len(view) - written]
            view[written : written + len(part)] = part
            written, self._place = written + len(part), self._place + len(part)
        return written

    def close(self) -> None:
        if self._pool is not None and not self.closed:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _fetch(self) -> None:
        """The block that begins at the place of reading."""
        goes_on = self._place == self._start + len(self._block) and self._block
        if not self._pool:
            self._length = min(2 * self._length, remote.BLOCK) if goes_on else FIRST_BLOCK
        coming, self._next = self._next, None
        self._block = coming.result() if coming is not None and goes_on else self._read(self._place)
        self._start = self._place
        after = self._start + len(self._block)
        if self._pool is not None and after < self.size:
            self._next = self._pool.submit(self._read, after)

    def _read(self, start: int) -> bytes:
        return remote.read_at(self.address, start, min(start + self._length, self.size))
