"""Data sets in a bucket or on a web server: a mirror of what is needed, verified, resumed, within a bound.

A folder elsewhere (``s3://bucket/set/train``) has a folder in the cache that stands for it: small files are copied when
they are first asked for, and a shard when its first sample is. A shard comes in ranges, is compared with the hash in
its index and only then takes its name; the shards that were not used for longest make room. Shards that are larger
than the whole cache are never stored: their samples are read one by one.

Credentials come from the environment, by each provider's own rules; an address that holds any is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from anyflow.errors import UserError
from anyflow.system.files import file_sha256, placing
from anyflow.system.locks import locked

CACHE_VARIABLE = "ANYFLOW_CACHE"
LIMIT_VARIABLE = "ANYFLOW_CACHE_GB"
DEFAULT_LIMIT_GB = 50.0
MARK = "remote.json"
TARS = "tars.json"
"""Written here alone, by :mod:`anyflow.data.tars`."""
SCHEMES = ("http", "https", "s3", "gs", "gcs", "hf")
URL = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")

BLOCK = 8 * 2**20
"""Bytes of one request: what is lost when a connection breaks."""
TARS_AT_ONCE = 32
"""Tars of somebody else's, which may be large, that the cache must have room for: two windows of an order. Where it has
not, they would be fetched again and again; they are read clip by clip."""
TRIES = 6
GONE = (404, 410)
"""What web servers answer where there is no such file."""
TIMEOUT = 60.0
"""Seconds for one block; a connection that stalls for longer is given up and tried anew."""
BACK_OFF, LONGEST_WAIT = 0.25, 10.0
_jitter = random.Random()
"""Its own: the run's random state must not depend on the network."""

T = TypeVar("T")


class Damaged(Exception):
    """What came is not what the index says; the message is the reason, in words."""


def is_url(place: str | Path) -> bool:
    """Whether a place is elsewhere: ``s3://...``, ``https://...``."""
    return isinstance(place, str) and URL.match(place) is not None


def join(url: str, name: str) -> str:
    """``url/name``."""
    return f"{url.rstrip('/')}/{name}"


def check_address(url: str) -> None:
    """Refuse an address that is of an unknown kind, or holds credentials.

    Raises:
        UserError: it is such a one.
    """
    match = URL.match(url)
    scheme = match[1].lower() if match else ""
    rest = url.partition("://")[2]
    if scheme not in SCHEMES:
        raise UserError(f"address {scheme}://...: {', '.join(SCHEMES)} are known")
    if "@" in rest.split("/")[0] or "?" in rest:
        raise UserError(
            f"an address of {scheme}:// holds a name, a password or a signature: leave them out and give credentials "
            "by the environment (such as AWS_ACCESS_KEY_ID or HF_TOKEN)"
        )


def mirror(url: str) -> Path:
    """The folder in the cache that stands for the folder at ``url``; made, but nothing is fetched yet.

    Raises:
        UserError: as :func:`check_address`.
    """
    url = url.rstrip("/")
    check_address(url)
    rest = url.partition("://")[2]
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", rest)[-60:].strip("-")
    folder = cache_root() / f"{name}-{hashlib.blake2b(url.encode(), digest_size=6).hexdigest()}"
    if not (folder / MARK).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with placing(folder / MARK) as place:
            place.write_text(json.dumps({"url": url}))
    return folder


def cache_root() -> Path:
    """Where mirrors lie: ``$ANYFLOW_CACHE``, or ``~/.cache/anyflow/shards``."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "anyflow" / "shards"


def cache_limit() -> int:
    """Bytes that the cached shards may take: ``$ANYFLOW_CACHE_GB``, or 50 GB.

    Raises:
        UserError: it is no number from 0 on.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text) if text else DEFAULT_LIMIT_GB
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1e9:
        raise UserError(f"{LIMIT_VARIABLE}={text!r}: give a number of gigabytes, such as 200")
    return int(limit * 1e9)


def url_of(folder: Path) -> str | None:
    """The address that a folder of the cache stands for; None for any other folder."""
    try:
        return str(json.loads((folder / MARK).read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stands_for_tars(folder: Path) -> bool:
    """Whether a folder of the cache stands for tars that lie anywhere; an index that came from elsewhere never does."""
    return folder.parent == cache_root() and (folder / TARS).is_file()


_fresh: set[tuple[int, Path]] = set()


def fetch_small(folder: Path, name: str) -> Path:
    """A small file of a folder, fetched once a process if the folder is elsewhere.

    Raises:
        FileNotFoundError: it is not there. UserError: it cannot be fetched.
    """
    path = folder / name
    url = url_of(folder)
    if url is None or ((os.getpid(), path) in _fresh and path.is_file()):
        return path
    address = join(url, name)

    def fetch() -> bytes:
        files, place = _filesystem(address)
        return _within(files, "_cat_file", place)

    content = _persist(fetch, address)
    with placing(path) as place:  # other machines may share the cache
        place.write_bytes(content)
    _fresh.add((os.getpid(), path))
    return path


def fetch_shard(folder: Path, name: str, size: int, sha256: str, version: str = "") -> Path | None:
    """A shard's file, fetched and verified if the folder is elsewhere; None if it is too large for the cache.

    One without ``sha256`` is verified by its size; its copy is kept under its ``version``.

    Raises:
        Damaged: what is there differs from the index, also when fetched again.
        UserError: it cannot be fetched.
    """
    url = url_of(folder)
    if url is None:
        return folder / name
    path = folder / (name if sha256 else f"{version}-{name}")
    if _touch(path, size):
        return path
    if size * (1 if sha256 else TARS_AT_ONCE) > cache_limit():
        return None
    with locked(folder / f".{path.name}.lock"):
        if _touch(path, size):
            return path
        partial = folder / f"{path.name}.{size}.part"
        for _ in range(2):  # a proxy or a broken wire may spoil one copy; twice the same is what lies there
            with locked(cache_root() / ".lock"):
                _make_room(size, partial)
                partial.touch()
            _download(join(url, name), partial, size)
            if not sha256 or file_sha256(partial) == sha256:
                partial.replace(path)
                return path
            partial.unlink()
    raise Damaged("the shard's bytes differ from the sha256 in its index")


def read_range(folder: Path, name: str, offset: int, size: int) -> bytes:
    """Some bytes of a file elsewhere.

    Raises:
        UserError: they cannot be fetched.
    """
    url = url_of(folder)
    assert url is not None
    return read_at(join(url, name), offset, offset + size)


def read_at(address: str, start: int, end: int) -> bytes:
    """The bytes from ``start`` to ``end`` of a file elsewhere.

    Raises:
        FileNotFoundError: it is not there. UserError: they cannot be fetched.
    """
    return _persist(lambda: _range(address, start, end), address)


def ask(address: str, method: str, **named: Any) -> Any:
    """Call a method of the file system that an address is of, such as ``_info``, as often as it takes.

    Raises:
        FileNotFoundError: it is not there. UserError: there is no answer.
    """

    def call() -> Any:
        files, place = _filesystem(address)
        try:
            return _within(files, method, place, **named)
        except FileNotFoundError as error:
            if error.__cause__ is not None and not isinstance(error.__cause__, FileNotFoundError):
                raise error.__cause__ from None  # fsspec's way of telling that a web server failed
            raise

    return _persist(call, address)


def _download(address: str, partial: Path, size: int) -> None:
    """Fill ``partial`` up to ``size`` bytes, from where it ends."""
    with partial.open("ab") as file:
        while (start := file.tell()) < size:
            end = min(start + BLOCK, size)
            file.write(_persist(lambda start=start, end=end: _range(address, start, end), address))  # type: ignore[misc]
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())


def _range(address: str, start: int, end: int) -> bytes:
    files, place = _filesystem(address)
    data: bytes = _within(files, "_cat_file", place, start=start, end=end)
    if len(data) >= end > end - start:  # a server without ranges sends all of it
        data = data[start:end]
    if len(data) != end - start:
        raise OSError(f"{len(data)} of {end - start} bytes came")
    return data


def _filesystem(address: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except ImportError as error:
        raise UserError(
            f"{address.partition('://')[0]}:// needs another package: pip install -e '.[remote]'"
        ) from error


def _within(files: Any, method: str, *words: Any, **named: Any) -> Any:
    """Call a file system's method, for TIMEOUT seconds at most where it can be given up."""
    if getattr(files, "async_impl", False):
        from fsspec.asyn import sync

        return sync(files.loop, getattr(files, method), *words, timeout=TIMEOUT, **named)
    return getattr(files, method.removeprefix("_"))(*words, **named)


def _persist(action: Callable[[], T], address: str) -> T:
    """Try again, after longer and longer waits, whatever may pass: broken connections, stalls, a server's errors.

    Raises:
        FileNotFoundError: it is not there. UserError: it is forbidden, or did not come in TRIES tries.
    """
    for attempt in range(TRIES):
        try:
            return action()
        except (FileNotFoundError, UserError):
            raise
        # Every provider's library has errors of its own, without a common parent.
        except Exception as error:
            status = getattr(error, "status", None)
            if status in GONE:
                raise FileNotFoundError(errno.ENOENT, f"the server answers {status}", address) from error
            forbidden = isinstance(error, PermissionError) or (
                isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
            )
            if forbidden or attempt == TRIES - 1:
                reason = f"{type(error).__name__} {str(error)[:120]}".strip()
                what = "it is forbidden" if forbidden else f"it did not come in {TRIES} tries"
                raise UserError(
                    f"{address}: {what} ({reason}); check the address, the credentials in the environment and the "
                    "network, then start again"
                ) from error
            time.sleep(min(LONGEST_WAIT, BACK_OFF * 2**attempt) * (0.5 + _jitter.random() / 2))
    raise AssertionError("the last try returns or raises")


def _make_room(size: int, partial: Path) -> None:
    """Remove the shards that were not used for longest until ``size`` more bytes fit; a part counts as the whole."""
    shards: list[tuple[float, int, Path]] = []
    taken = 0
    for path in cache_root().glob("*/*"):
        try:
            if path.name.endswith(".tar"):
                stat = path.stat()
                shards.append((stat.st_mtime, stat.st_size, path))
                taken += stat.st_size
            elif path.name.endswith(".part") and path != partial:
                declared = path.name.split(".")[-2]
                taken += int(declared) if declared.isdigit() else path.stat().st_size
        except OSError:
            continue  # another process was quicker
    limit = cache_limit()
    for _, length, path in sorted(shards):
        if taken + size <= limit:
            return
        path.unlink(missing_ok=True)  # whoever has it open reads on
        taken -= length


def _touch(path: Path, size: int) -> bool:
    """Whether a shard is in the cache; says that it was used."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
        return True
    except OSError:
        return False
