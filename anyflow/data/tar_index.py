"""The index of somebody else's tars: one pass over their headers, by which they read as shards of our own.

What a tar's headers say is kept in the cache as soon as that tar is read (:mod:`anyflow.data.tar_headers`): an index
that was broken off goes on, a tar that changed is read again, and sets share what they have in common. The index of a
set is put together from these, by the members that the set says its clips are made of.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from anyflow.data import remote
from anyflow.data.decode import DecodeError
from anyflow.data.members import Members
from anyflow.data.order import digest
from anyflow.data.places import list_folder, open_at, stamp_of
from anyflow.data.shapes import Noted, note_file
from anyflow.data.shards import INDEX_NAME, INDEX_VERSION, MAX_MEMBER, Sample, Shard, load_index, shard_to_dict
from anyflow.data.tar_headers import HEADERS_VERSION, OUTSIDE, Headers, headers_of, keep, scan
from anyflow.data.tars import LAST_CLIPS, LOCK, TarSet, load_set
from anyflow.errors import UserError, first_line
from anyflow.system.console import progress_line
from anyflow.system.files import write_atomically
from anyflow.system.locks import locked
from anyflow.system.pool import run_jobs

THREADS = 32
"""Tars elsewhere that are read at a time: waiting for answers takes nearly all of it."""
MANY = 50
"""Tars of a bucket's folder that are looked for by a list of it, not one by one."""
WORKERS = 8
FEW = 16
"""Tars of this machine that are read in this process: fewer than it takes to start others."""
WHOLE_TAR = "*"
"""Stands for a clip's key where a tar is at fault."""

NO_EXTENSION = "(none)"
TWICE = "a member of its key is there twice, so which video has which caption cannot be told"

LeftOut = tuple[str, str, str]
"""(shard, key, reason)."""
Parts = dict[str, tuple[int, int]]
"""Extension -> (offset, size) of a sample's members."""


def make_shard(
    tar: tuple[str, str, str], headers: Headers, tarset: TarSet
) -> tuple[Shard, list[LeftOut], Counter[str]]:
    """A tar as a shard: its clips, what is left out, and how often each extension is not used.

    Args:
        tar: its own name, its address, its version. headers: what it holds. tarset: what it is part of.

    Raises:
        UserError: clips of this tar are to be held out, and it has but one.
    """
    name, address, version = tar
    samples, faults, unused = _samples_of(headers, tarset.members)
    kept = []
    for key, parts in samples.items():
        try:
            tarset.members.video_of(parts)
            kept.append(Sample(f"{name.removesuffix('.tar')}/{key}", parts))
        except DecodeError as error:
            faults.append((key, str(error)))
    if headers.problem:
        faults.insert(0, (WHOLE_TAR, headers.problem))
    left_out = [(name, key, reason) for key, reason in faults]
    if tarset.part and len(kept) == 1:
        raise UserError(
            f"{tarset.name}: one clip ({kept[0].key}) cannot both be trained on and held out: add clips, or name "
            "further tars in a card's splits"
        )
    held = max(1, min(LAST_CLIPS, len(kept) // 5))
    chosen = {"": slice(None), "train": slice(0, -held), "heldout": slice(-held, None)}[tarset.part]
    return Shard(name, headers.bytes, "", tuple(kept[chosen]), headers.identity, address, version), left_out, unused


def _samples_of(headers: Headers, members: Members) -> tuple[dict[str, Parts], list[tuple[str, str]], Counter[str]]:
    """The members of each key that may be read; (key or member, reason) of what is left out; extensions not used."""
    samples: dict[str, Parts] = {}
    unused: Counter[str] = Counter()
    faults: list[tuple[str, str]] = []
    wanted: dict[str, bool] = {}

    def asked(member: str) -> tuple[str, str, bool]:
        """(key, extension, whether it may be read)."""
        key, extension = members.split(member) or ("", NO_EXTENSION)
        if extension not in wanted:
            wanted[extension] = members.wants(extension)
        return key, extension, wanted[extension]

    for member, reason in headers.left_out:
        _, extension, is_wanted = asked(member)
        if is_wanted or reason == OUTSIDE:
            faults.append((member, reason))
        else:
            unused[extension] += 1
    met: set[tuple[str, str]] = set()
    twice: dict[str, None] = {}
    last = ""
    for member, offset, size in headers.members:
        key, extension, is_wanted = asked(member)
        last = key or last
        if key and (key, extension) in met:
            twice[key] = None
        met.add((key, extension))
        if not is_wanted:
            unused[extension] += 1
        elif size > MAX_MEMBER:
            faults.append((member, f"it has {size} bytes"))
        else:
            samples.setdefault(key, {})[extension] = (offset, size)
    if headers.problem:
        samples.pop(last, None)  # its further members may be what is lost
    for key in twice:
        samples.pop(key, None)
    return samples, faults + [(key, TWICE) for key in twice], unused


_ready: set[tuple[int, Path, bool]] = set()


def ready(folder: Path, shapes: bool = False) -> None:
    """Make the index of tars, or bring it up to date, if the folder stands for some; looked at once a process.

    Args:
        folder: any folder of shards. shapes: note each clip's shape as well, which opens every video.

    Raises:
        UserError: no clip is found, or a server does not answer.
    """
    tarset = load_set(folder)
    if tarset is None or (os.getpid(), folder, shapes) in _ready:
        return
    stamps = _stamps(tarset)
    facts = digest(json.dumps([stamps, INDEX_VERSION, HEADERS_VERSION]))
    with locked(folder / LOCK):
        made = _facts_of(folder)
        if made not in ([facts, True], [facts, shapes]):
            index = _make_index(tarset, stamps, shapes)
            _tell(tarset, index)
            text = json.dumps({"facts": [facts, shapes], **index}, separators=(",", ":"))
            write_atomically(folder / INDEX_NAME, text)
    _ready.add((os.getpid(), folder, shapes))


def _facts_of(folder: Path) -> Any:
    try:
        return json.loads((folder / INDEX_NAME).read_text())["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def left_out_of(folder: Path) -> list[LeftOut]:
    """What was left out of an index of tars; nothing for any other folder."""
    if load_set(folder) is None:
        return []
    return [(shard, key, why) for shard, key, why in json.loads((folder / INDEX_NAME).read_text())["left_out"]]


def check_tars(folder: Path) -> list[str]:
    """Read the headers of a set's tars again and compare them with its index; one sentence a problem."""
    problems = [f"{shard}:{key} is left out: {reason}" for shard, key, reason in left_out_of(folder)]
    for shard in load_index(folder).shards:
        try:
            with closing(open_at(shard.place)) as file:
                found = scan(file, stamp_of(shard.place)[0])
        except (OSError, UserError) as error:
            problems.append(f"tar {shard.place!r} cannot be read ({first_line(error)})")
            continue
        if found.identity != shard.made_from:
            problems.append(f"tar {shard.place!r} is not the one of its index: it was changed meanwhile")
    return problems


def _stamps(tarset: TarSet) -> list[tuple[int, str]]:
    """Each tar's bytes and version; (-1, reason) for one that is not there."""

    def stamp(address: str) -> tuple[int, str]:
        try:
            return stamp_of(address)
        except OSError as error:
            return -1, error.strerror or first_line(error)

    folders = Counter(address.rpartition("/")[0] for address in tarset.tars if remote.is_url(address))
    for folder, number in folders.items():
        if number > MANY and not folder.startswith("http"):
            with suppress(OSError):
                list_folder(folder, "*")  # one answer, which is kept, has the stamps of all
    with ThreadPoolExecutor(THREADS) as pool:
        stamps = list(pool.map(stamp, tarset.tars))
    if all(size < 0 for size, _ in stamps):
        raise UserError(
            f"none of the {len(stamps)} tars is there, such as {tarset.tars[0]!r} ({stamps[0][1]}): correct the path"
        )
    return stamps


def _read_all(tarset: TarSet, stamps: Sequence[tuple[int, str]]) -> Iterator[Headers]:
    """Every tar's headers, several at a time, in order."""
    there = [(address, stamp) for address, stamp in zip(tarset.tars, stamps, strict=True) if stamp[0] >= 0]
    if len(there) > FEW and not any(remote.is_url(address) for address, _ in there):
        yield from run_jobs(_headers_of, there, min(WORKERS, os.cpu_count() or 1))
        return
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield from pool.map(_headers_of, there)
        finally:
            pool.shutdown(cancel_futures=True)


def _headers_of(job: tuple[str, tuple[int, str]]) -> Headers:
    return headers_of(*job)


def _make_index(tarset: TarSet, stamps: Sequence[tuple[int, str]], shapes: bool) -> dict[str, Any]:
    shards: list[Shard] = []
    left_out: list[LeftOut] = []
    unused: Counter[str] = Counter()
    with progress_line(f"indexing {tarset.name}") as on_progress:
        coming = _read_all(tarset, stamps)
        for done, (name, address, stamp) in enumerate(zip(tarset.names(), tarset.tars, stamps, strict=True), start=1):
            if stamp[0] < 0:
                left_out.append((name, WHOLE_TAR, f"it is not there ({stamp[1]})"))
            else:
                shard, without, more = make_shard((name, address, digest(str(stamp))[:12]), next(coming), tarset)
                shards += [shard] if shard.samples else []
                left_out += without
                unused += more
            on_progress(done, len(stamps), "tars")
    if not shards:
        why = "; ".join(f"{name}:{key} ({reason})" for name, key, reason in left_out[:3]) or _told_unused(unused)
        raise UserError(
            f"{tarset.name}: no clip among {len(stamps)} tars{f': {why}' if why else ''}; a card's members name what "
            "holds video and caption"
        )
    if shapes:
        shards = _with_shapes(tarset, shards)
        why = "its shape cannot be read"
        left_out += [(shard.name, sample.key, why) for shard in shards for sample in shard.samples if not sample.shape]
        shards = [replace(shard, samples=tuple(s for s in shard.samples if s.shape)) for shard in shards]
    return {
        "version": INDEX_VERSION,
        "left_out": left_out,
        "unused": dict(unused.most_common()),
        "shards": [shard_to_dict(shard) for shard in shards],
    }


def _with_shapes(tarset: TarSet, shards: Sequence[Shard]) -> list[Shard]:
    """The shards with each clip's shape noted, of which again what is done stays done."""
    note = partial(_note_shard, tarset)
    with progress_line(f"shapes of {tarset.name}") as on_progress, ThreadPoolExecutor(THREADS) as pool:
        noted = []
        for done, shard in enumerate(pool.map(note, shards), start=1):
            noted.append(shard)
            on_progress(done, len(shards), "tars")
    return noted


def _note_shard(tarset: TarSet, shard: Shard) -> Shard:
    facts = [shard.place, shard.version, shard.made_from, tarset.members.to_dict(), tarset.part]
    name = digest(json.dumps(facts))
    kept = remote.cache_root() / "tar-shapes" / name[:2] / f"{name}.json"
    try:
        shapes: list[Noted] = [tuple(shape) for shape in json.loads(kept.read_text())]
    except (OSError, ValueError, TypeError):
        with closing(open_at(shard.place)) as file:
            spans = [sample.parts[tarset.members.video_of(sample.parts)] for sample in shard.samples]
            shapes = [note_file(Span(file, *span)) for span in spans]
        keep(kept, shapes)
    samples = (replace(s, shape=shape) for s, shape in zip(shard.samples, shapes, strict=True))
    return replace(shard, samples=tuple(samples))


class Span:
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.place = file, offset, size, 0

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.place)
        self.file.seek(self.offset + self.place)
        data = self.file.read(left if count < 0 else min(count, left))
        self.place += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = max(0, (0, self.place, self.size)[whence] + offset)
        return self.place

    def tell(self) -> int:
        return self.place


def _tell(tarset: TarSet, index: dict[str, Any]) -> None:
    """What was found, and what was not taken, on the user's screen."""
    clips = sum(len(shard["samples"]) for shard in index["shards"])
    lines = [f"{tarset.name}: {clips} clips in {len(index['shards'])} tars"]
    if index["unused"]:
        lines.append(_told_unused(index["unused"]))
    lines += told_left_out(index["left_out"])
    print("\n".join(lines), file=sys.stderr, flush=True)


def _told_unused(unused: Mapping[str, int]) -> str:
    """The extensions that nobody asks for; empty if there are none."""
    named = ", ".join(f"{count} .{name}" for name, count in list(unused.items())[:8])
    return f"not used: {named}" if named else ""


def told_left_out(left_out: Sequence[LeftOut], most: int = 5) -> list[str]:
    """The first things that were left out, a line each, and how many more there are."""
    lines = [f"left out: {shard}:{key[:100]} ({reason})" for shard, key, reason in left_out[:most]]
    rest = len(left_out) - most
    return lines + ([f"left out: {rest} more"] if rest > 0 else [])
