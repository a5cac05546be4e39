"""What the headers of somebody else's tar say, kept in the cache under its address, size and version."""

from __future__ import annotations

import hashlib
import json
import tarfile
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from anyflow.data import remote
from anyflow.data.order import digest
from anyflow.data.places import open_at
from anyflow.data.safety import is_safe_name
from anyflow.errors import first_line
from anyflow.system.files import write_atomically

HEADERS_VERSION = 2
"""1 named pickles among what is left out, and no member again that was there before."""
OUTSIDE = "its path leads out of the tar"

Member = tuple[str, int, int]


@dataclass(frozen=True)
class Headers:
    """What a tar's headers say.

    Attributes:
        bytes: of the tar.
        members: (name, offset of the data, size) of each plain file, in order.
        identity: digest of all of them: the same tar elsewhere has the same one.
        left_out: (name, reason) of members that are never read.
        problem: why the tar could not be read to its end; empty if it could.
    """

    bytes: int
    members: list[Member]
    identity: str
    left_out: list[tuple[str, str]] = field(default_factory=list)
    problem: str = ""


def scan(file: BinaryIO, size: int) -> Headers:
    """Read a tar's headers and nothing else; a tar that is cut off or damaged gives what stands before the damage."""
    members: list[Member] = []
    left_out: list[tuple[str, str]] = []
    problem, content = "", hashlib.blake2b(digest_size=16)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # "r:": no place in a compressed tar can be read by itself
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]
                name = written(member.name)
                content.update(f"{name}\0{member.offset_data}\0{member.size}\0{member.mtime}\n".encode())
                reason = _unusable(member, name)
                if reason:
                    left_out.append((name, reason))
                elif member.offset_data + member.size > size:
                    problem = f"it is cut off in {name}"
                    break
                elif member.isreg():
                    members.append((name, member.offset_data, member.size))
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        problem = f"it cannot be read to its end ({first_line(error)[:80]})"
        if not members:
            problem += "; a compressed tar must be unpacked, or streamed by data.streaming=true"
    return Headers(size, members, content.hexdigest(), left_out, problem)


def written(name: str) -> str:
    """A member's name as it can be written anywhere: tars hold any bytes."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _unusable(member: tarfile.TarInfo, name: str) -> str:
    """Why a member is never read; empty if it may be, or is a folder."""
    if member.isdir():
        return ""
    if not is_safe_name(member.name):
        return OUTSIDE
    return "" if member.isreg() and not member.issparse() else "it is a link or a device, no file"


def headers_of(address: str, stamp: tuple[int, str]) -> Headers:
    """A tar's headers, from the cache where this version of it was read before.

    Raises:
        UserError: a server does not answer.
    """
    name = digest(f"{address}\n{stamp}")
    kept = remote.cache_root() / "tar-headers" / name[:2] / f"{name}.json"
    try:
        document = json.loads(kept.read_text())
        if document.pop("version") == HEADERS_VERSION:
            return Headers(**document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not there, or damaged
    try:
        with closing(open_at(address)) as file:
            found = scan(file, stamp[0])
    except OSError as error:
        return Headers(stamp[0], [], "", [], f"it cannot be read ({error.strerror or first_line(error)})")
    keep(kept, {"version": HEADERS_VERSION, **found.__dict__})
    return found


def keep(path: Path, document: Any) -> None:
    """Keep what was read in the cache; another process may be writing the same, and then its file stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        write_atomically(path, json.dumps(document, separators=(",", ":")))
