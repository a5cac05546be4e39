"""Shards: WebDataset tars with an index of offsets and hashes beside them.

A folder of shards holds ``PREFIX-000000.tar``, ``PREFIX-000001.tar``, ... and ``index.json``::

    {"version": 1, "shards": [{"name", "bytes", "sha256", "made_from" (of computed samples),
                               "samples": [{"key", "parts": {"mp4": [offset, size], ...}, "shape": [...]}]}]}

An index of somebody else's tars (:mod:`anyflow.data.tar_index`) says of each its ``place`` as well.

Offsets are those of the members' data in the tar, so a sample is read with a seek, without unpacking. The tars are
plain WebDataset shards and can be read without the index as well.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from anyflow.data import remote
from anyflow.data.clip import Clip
from anyflow.data.safety import is_safe_name
from anyflow.data.shapes import Noted, note_shape
from anyflow.errors import UserError
from anyflow.system.files import file_sha256, replacing, write_atomically

INDEX_NAME = "index.json"
INDEX_VERSION = 1
CLIPS_PER_SHARD = 100
MAX_MEMBER = 2**31
"""Bytes of one member of a sample; an index that claims more is not believed."""
REQUIRED_PARTS = ({"mp4", "json"}, {"safetensors", "json"})
"""A sample is either footage or latents, with its description."""


@dataclass(frozen=True)
class Sample:
    """Where one sample lies: ``parts`` maps a member's extension to (offset, size) in the shard's file.

    ``shape`` is what the index notes of it (:mod:`anyflow.data.shapes`): older indices note nothing.
    """

    key: str
    parts: Mapping[str, tuple[int, int]]
    shape: Noted = field(default=(), compare=False)

    def frames(self, usual: int | None) -> int:
        """By the index's note, else the usual ones of the card; 0: not known."""
        return int(self.shape[0]) if self.shape else usual or 0


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        name: of its file.
        bytes: its size.
        sha256: of the file.
        samples: in order.
        made_from: of samples that were computed, a digest of what from: computed again, elsewhere or on more threads,
            they are the same samples but for rounding. Empty: the samples are what they are.
        place: path or address of somebody else's tar; ``sha256`` is then empty and ``made_from`` of its headers.
            Empty: it lies beside its index.
        version: of such a tar, by what its server or disk says of it: copies of other versions are not taken for it.
    """

    name: str
    bytes: int
    sha256: str
    samples: tuple[Sample, ...]
    made_from: str = ""
    place: str = ""
    version: str = ""

    @property
    def content(self) -> str:
        """Digest of what is in it, by its bytes or, where they were not read, by its headers."""
        return self.sha256 or self.made_from

    def path(self, folder: Path) -> Path:
        """Its file, or what stands for that in the cache; ``folder`` is that of its index."""
        if not self.place:
            return folder / self.name
        if not remote.is_url(self.place):
            return Path(self.place)
        parent, _, name = self.place.rpartition("/")
        return remote.mirror(parent) / name

    def member(self, sample: Sample, extension: str) -> str:
        """The name that a sample's member has in the tar, but for the case of its extension."""
        key = sample.key.removeprefix(f"{self.name.removesuffix('.tar')}/") if self.place else sample.key
        return f"{key}.{extension}"


@dataclass(frozen=True)
class ShardIndex:
    """A folder's shards."""

    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(len(shard.samples) for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards together."""
        return sum(shard.bytes for shard in self.shards)

    def __iter__(self) -> Iterator[tuple[Shard, Sample]]:
        return ((shard, sample) for shard in self.shards for sample in shard.samples)

    def to_dict(self) -> dict[str, Any]:
        """The index as the JSON file has it."""
        return {
            "version": INDEX_VERSION,
            "shards": [shard_to_dict(shard) for shard in self.shards],
        }


def write_shards(clips: Iterable[Clip], folder: Path, prefix: str, per_shard: int = CLIPS_PER_SHARD) -> ShardIndex:
    """Write clips as shards of ``per_shard`` samples and their index; the same clips give the same bytes.

    Raises:
        UserError: the folder already has an index, there is no clip, or two clips share a key.
    """
    return write_samples(((clip.key, clip.parts()) for clip in clips), folder, prefix, per_shard)


def write_samples(
    samples: Iterable[tuple[str, Mapping[str, bytes]]], folder: Path, prefix: str, per_shard: int = CLIPS_PER_SHARD
) -> ShardIndex:
    """As :func:`write_shards`, for samples of any members: (key, {extension: bytes})."""
    if per_shard < 1:
        raise UserError(f"per_shard {per_shard}: give at least 1")
    if (folder / INDEX_NAME).exists():
        raise UserError(f"folder {str(folder)!r} already holds shards: give another folder, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    seen: set[str] = set()
    remaining = iter(samples)
    while batch := list(islice(remaining, per_shard)):
        for key, _ in batch:
            if key in seen:
                raise UserError(f"clip key {key!r} occurs twice: keys must differ within a data set")
            seen.add(key)
        shards.append(write_tar(batch, folder / f"{prefix}-{len(shards):06d}.tar"))
    if not shards:
        raise UserError(f"folder {str(folder)!r}: no clip was given, so there is nothing to write")
    index = ShardIndex(tuple(shards))
    text = json.dumps(index.to_dict(), separators=(",", ":"))
    write_atomically(folder / INDEX_NAME, text.encode())
    return index


def load_index(folder: Path) -> ShardIndex:
    """Read ``index.json``.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    path = folder / INDEX_NAME
    try:
        document = json.loads(remote.fetch_small(folder, INDEX_NAME).read_text())
        if document["version"] != INDEX_VERSION:
            raise UserError(f"{path}: version {document['version']!r} is unknown; this release reads {INDEX_VERSION}")
        if not remote.stands_for_tars(folder) and any("place" in entry for entry in document["shards"]):
            raise ValueError("a shard lies elsewhere")
        return ShardIndex(tuple(shard_from_dict(entry) for entry in document["shards"]))
    except FileNotFoundError as error:
        raise UserError(f"no {INDEX_NAME} in {str(folder)!r}: render the data set, or correct the folder") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not a shard index ({str(error)[:200]!r}): write the shards again") from error


def read_parts(folder: Path, shard: Shard, sample: Sample, names: Collection[str] | None = None) -> dict[str, bytes]:
    """A sample's members (or those named), read with one seek each: {extension: bytes}.

    Raises:
        UserError: the shard's file is missing or ends too early.
    """
    path = folder / shard.name
    parts = {}
    try:
        with (_fetched(folder, shard) or path).open("rb") as file:
            for name, (offset, size) in sample.parts.items():
                if names is not None and name not in names:
                    continue
                file.seek(offset)
                data = file.read(size)
                if len(data) != size:
                    raise UserError(
                        f"shard {str(path)!r} is truncated at sample {sample.key!r}: fetch or write it again"
                    )
                parts[name] = data
    except FileNotFoundError as error:
        raise UserError(f"shard {str(path)!r} is missing: fetch or write it again") from error
    return parts


def read_clip(folder: Path, shard: Shard, sample: Sample) -> Clip:
    """One clip, with mp4 bytes."""
    return Clip.from_parts(sample.key, read_parts(folder, shard, sample))


def check_folder(folder: Path) -> list[str]:
    """Compare the shards with their index: presence, size, hash, members. Returns one sentence a problem."""
    try:
        index = load_index(folder)
    except UserError as error:
        return [str(error)]
    problems: list[str] = []
    keys: set[str] = set()
    for shard in index.shards:
        try:
            path = _fetched(folder, shard) or folder / shard.name
        except (UserError, OSError) as error:
            problems.append(f"shard {shard.name!r}: {error}")
            continue
        if not path.is_file():
            problems.append(f"shard {str(path)!r} is missing")
            continue
        size = path.stat().st_size
        if size != shard.bytes:
            word = "truncated" if size < shard.bytes else "too long"
            problems.append(f"shard {str(path)!r} is {word}: {size} bytes, the index says {shard.bytes}")
        elif file_sha256(path) != shard.sha256:
            problems.append(f"shard {str(path)!r} is damaged: its sha256 differs from the index")
        else:
            problems += _compare_members(path, shard)
        for sample in shard.samples:
            if sample.key in keys:
                problems.append(f"shard {str(path)!r}: key {sample.key!r} occurs twice")
            keys.add(sample.key)
            if not any(required <= set(sample.parts) for required in REQUIRED_PARTS):
                problems.append(f"shard {str(path)!r}: sample {sample.key!r} has only {sorted(sample.parts)}")
    names = {shard.name for shard in index.shards}
    strays = sorted(path.name for path in folder.glob("*.tar") if path.name not in names)
    problems += [f"shard {str(folder / name)!r} is not in the index" for name in strays]
    return problems


def _fetched(folder: Path, shard: Shard) -> Path | None:
    """A shard's file, fetched if it lies elsewhere; None if the cache cannot hold it.

    Raises:
        UserError: it is damaged or cannot be fetched.
    """
    try:
        return remote.fetch_shard(folder, shard.name, shard.bytes, shard.sha256)
    except remote.Damaged as error:
        raise UserError(f"shard {shard.name!r}: {error}; write it again") from error


def shard_to_dict(shard: Shard) -> dict[str, Any]:
    """A shard's entry in the index."""
    return {
        "name": shard.name,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        **({"made_from": shard.made_from} if shard.made_from else {}),
        **({"place": shard.place, "version": shard.version} if shard.place else {}),
        "samples": [_sample_to_dict(sample) for sample in shard.samples],
    }


def _sample_to_dict(sample: Sample) -> dict[str, Any]:
    spans = {name: list(span) for name, span in sorted(sample.parts.items())}
    shape = {"shape": list(sample.shape)} if sample.shape else {}
    return {"key": sample.key, "parts": spans, **shape}


def _sample_from_dict(entry: Mapping[str, Any]) -> Sample:
    parts = {str(part): (int(span[0]), int(span[1])) for part, span in entry["parts"].items()}
    shape = tuple(entry.get("shape", ()))
    if shape and not (len(shape) == 4 and all(type(n) in (int, float) and 0 < n < MAX_MEMBER for n in shape)):
        raise ValueError(f"sample {entry['key']!r} has the shape {list(shape)!r}")
    return Sample(str(entry["key"]), parts, shape)


def shard_from_dict(entry: Mapping[str, Any]) -> Shard:
    """The inverse of :func:`shard_to_dict`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: it is no such entry, names a file elsewhere, or
            places a sample outside of its shard.
    """
    name, size = entry["name"], int(entry["bytes"])
    place = str(entry.get("place", ""))
    unsafe = not isinstance(name, str) or not name or name.startswith(".") or any(c in name for c in "/\\\0")
    if unsafe and not place:
        raise ValueError(f"{name!r} is no shard's name")
    samples = tuple(_sample_from_dict(sample) for sample in entry["samples"])
    for sample in samples:
        for offset, length in sample.parts.values():
            if offset < 0 or not 0 <= length <= MAX_MEMBER or offset + length > size:
                raise ValueError(f"sample {sample.key!r} lies outside of {name!r}")
    made_from, version = str(entry.get("made_from", "")), str(entry.get("version", ""))
    return Shard(str(name), size, str(entry["sha256"]), samples, made_from, place, version)


def write_tar(batch: Iterable[tuple[str, Mapping[str, bytes]]], path: Path) -> Shard:
    """One tar, whole or not at all: written beside, synced, renamed. Fixed times and owners make it reproducible."""
    import webdataset

    shapes: dict[str, Noted] = {}
    with replacing(path) as temporary:
        with (
            temporary.open("wb") as file,
            webdataset.TarWriter(file, mtime=0, encoder=False, user="anyflow", group="anyflow") as tar,
        ):
            for key, parts in batch:
                tar.write({"__key__": key, **dict(sorted(parts.items()))})
                shapes[key] = note_shape(parts)
        samples = tuple(replace(sample, shape=shapes.get(sample.key, ())) for sample in _read_members(temporary))
        shard = Shard(path.name, temporary.stat().st_size, file_sha256(temporary), samples)
    return shard


def dotless(key: str) -> str:
    """A key that a tar of ours can hold: those of somebody else's clips may have dots, and ours end at the first."""
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.replace(".", "%2E")


def _compare_members(path: Path, shard: Shard) -> list[str]:
    """What a tar's own members say against its index, in sentences."""
    try:
        with tarfile.open(path, "r:") as tar:
            odd = [member.name for member in tar if not member.isreg() or not is_safe_name(member.name)]
        members = _read_members(path)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        return [f"shard {str(path)!r} is no tar that can be read to its end ({str(error)[:80]})"]
    problems = [f"shard {str(path)!r}: member {name[:200]!r} is a link or leads out of the shard" for name in odd]
    if members != shard.samples:
        problems.append(f"shard {str(path)!r}: its members differ from the index")
    return problems


def _read_members(path: Path) -> tuple[Sample, ...]:
    """The samples as the tar itself tells them."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            folder, slash, base = member.name.rpartition("/")  # keys of somebody else's clips may have folders
            key, _, extension = base.partition(".")
            key = folder + slash + key
            samples.setdefault(key, {})[extension] = (member.offset_data, member.size)
    return tuple(Sample(key, parts) for key, parts in samples.items())
