"""Random access to the samples of shard folders, and what their members mean."""

from __future__ import annotations

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data import remote
from anyflow.data.card import CARD_NAME, CaptionOverride, load_card
from anyflow.data.controls import Control
from anyflow.data.decode import ClipShape, DecodeError
from anyflow.data.find import is_tars
from anyflow.data.members import Members
from anyflow.data.order import ShardIdentity
from anyflow.data.safety import clean_caption
from anyflow.data.shapes import Noted, frames_needed
from anyflow.data.shards import INDEX_NAME, Sample, Shard, load_index
from anyflow.data.tar_index import ready
from anyflow.data.tars import load_set
from anyflow.errors import UserError, first_line
from anyflow.system.files import file_sha256

TAR_BLOCK = 512
TAR_NAME_LENGTH = 100
OPEN_FILES = 64
MAX_METADATA = 2**24
"""Bytes of a json member: controls of some thousand frames take less than a tenth of it."""


class ShardReader:
    """Random access to the samples of several shard folders by tar offset: one ``pread`` a member, never a scan.

    Args:
        folders: folders with an ``index.json``.
        captions: for each folder, what stands in for a missing caption; none by default.
        strict: refuse a shard that is shorter than its index says, too; else its lost samples are bad clips.
        verify: compare every shard's sha256 with the index (reads everything once).
        tolerant: take shards as they are, missing ones too; their samples are bad clips.

    Raises:
        UserError: an index or a shard is missing, or a shard is not the one of its index.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        captions: Sequence[str | None] | None = None,
        *,
        strict: bool = False,
        verify: bool = False,
        tolerant: bool = False,
    ) -> None:
        self.shards: list[tuple[Path, Shard]] = []
        self._captions: list[str | None] = []
        self._members: list[Members | None] = []
        self.counts: list[int] = []
        """Shards of each folder."""
        for folder, caption in zip(folders, captions or [None] * len(folders), strict=True):
            shards = load_index(folder).shards
            self.shards += [(shard.path(folder), shard) for shard in shards]
            self._captions += [caption] * len(shards)
            tarset = load_set(folder)
            self._members += [tarset.members if tarset else None] * len(shards)
            self.counts.append(len(shards))
        for path, shard in () if tolerant else self.shards:
            if remote.url_of(path.parent) is not None:
                continue  # fetched, and compared with its hash, when its first sample is asked for
            if not path.is_file():
                raise UserError(f"shard {str(path)!r} is missing: fetch or write it again")
            size = path.stat().st_size
            if size > shard.bytes or (strict and size < shard.bytes):
                raise UserError(
                    f"shard {str(path)!r} has {size} bytes, its index says {shard.bytes}: fetch or write it again"
                )
            if verify and shard.sha256 and file_sha256(path) != shard.sha256:
                raise UserError(f"shard {str(path)!r} is damaged, its sha256 is not its index's: fetch it again")
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._damaged: dict[int, str] = {}

    def identities(self) -> tuple[ShardIdentity, ...]:
        """The order's view of the shards; those that were computed again from the same are the same."""
        return tuple(
            ShardIdentity(shard.name, shard.made_from or shard.sha256, len(shard.samples)) for _, shard in self.shards
        )

    def restricted(self, kept: Sequence[Sequence[int]]) -> ShardReader:
        """A reader of some samples alone, given by their numbers in each shard; a shard without any is left out."""
        part = copy.copy(self)
        chosen = [number for number, samples in enumerate(kept) if len(samples)]
        part.shards = []
        for number in chosen:
            path, shard = self.shards[number]
            part.shards.append((path, replace(shard, samples=tuple(shard.samples[n] for n in kept[number]))))
        part._captions = [self._captions[number] for number in chosen]
        part._members = [self._members[number] for number in chosen]
        ends = np.cumsum([0, *self.counts])
        part.counts = [sum(start <= number < end for number in chosen) for start, end in pairwise(ends)]
        part._descriptors, part._damaged = OrderedDict(), {}
        return part

    def sample(self, shard: int, number: int) -> Sample:
        """The index's entry of a sample."""
        return self.shards[shard][1].samples[number]

    def read(self, shard: int, sample: Sample, extension: str) -> bytes:
        """Read one member.

        Raises:
            DecodeError: the member is absent, cut off, or another one than the index says.
        """
        if extension not in sample.parts:
            raise DecodeError(f"no {extension} member")
        offset, size = sample.parts[extension]
        try:
            data = self._bytes(shard, offset - TAR_BLOCK, TAR_BLOCK + size)
        except OSError as error:
            raise DecodeError(f"the shard cannot be read ({error.strerror or first_line(error)})") from error
        if len(data) < TAR_BLOCK + size:
            raise DecodeError("the shard is truncated")
        if not _names(data, self.shards[shard][1].member(sample, extension)):
            raise DecodeError("the shard does not match its index")
        return data[TAR_BLOCK:]

    def video(self, shard: int, sample: Sample) -> bytes:
        """Read the member that holds a sample's video.

        Raises:
            DecodeError: as :meth:`read`.
        """
        members = self._members[shard]
        return self.read(shard, sample, members.video_of(sample.parts) if members else "mp4")

    def describe(self, shard: int, sample: Sample) -> dict[str, Any]:
        """Read a sample's description: caption, attributes, controls, ...

        Raises:
            DecodeError: it cannot be read, or there is no caption.
        """
        members = self._members[shard]
        if members is not None:
            told = members.describe(sample.parts, lambda extension: self.read(shard, sample, extension))
            return checked_metadata(told, self._captions[shard])
        return parse_metadata(self.read(shard, sample, "json"), self._captions[shard])

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        """Part of a shard, wherever it lies."""
        descriptor = self._descriptor(shard)
        if descriptor is not None:
            return os.pread(descriptor, size, offset)
        path, _ = self.shards[shard]
        return remote.read_range(path.parent, path.name, offset, size)

    def _descriptor(self, shard: int) -> int | None:
        """An open file, the least recently used one closed when there are too many. Shared offsets are never used.

        None for a shard elsewhere that the cache cannot hold.

        Raises:
            DecodeError: the shard is not the one of its index.
        """
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if shard in self._damaged:
            raise DecodeError(self._damaged[shard])
        path, entry = self.shards[shard]
        try:
            local = remote.fetch_shard(path.parent, path.name, entry.bytes, entry.sha256, entry.version)
        except remote.Damaged as error:
            self._damaged[shard] = str(error)
            raise DecodeError(str(error)) from error
        if local is None:
            return None
        if len(self._descriptors) >= OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = os.open(local, os.O_RDONLY)
        return self._descriptors[shard]

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()


def _names(block: bytes, name: str) -> bool:
    """Whether a header names a member; extensions are compared in lower case.

    Other than ASCII names, and long ones, stand in an extended header, and in this one only in part.
    """
    if not name.isascii() or len(name) > TAR_NAME_LENGTH:
        return True
    known, folder = block[:TAR_NAME_LENGTH].rstrip(b"\0").lower(), block[345:500].rstrip(b"\0").lower()
    return name.lower().encode() in (known, folder + b"/" + known)


def parse_metadata(data: bytes, default_caption: str | None = None) -> dict[str, Any]:
    """A sample's json member; ``default_caption`` stands in for a missing one, a :class:`CaptionOverride` for any.

    Raises:
        DecodeError: it is not a JSON object, or has no caption and there is no default.
    """
    if len(data) > MAX_METADATA:
        raise DecodeError(f"its json member has {len(data)} bytes, more than {MAX_METADATA}")
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DecodeError("its json member is malformed") from error
    if not isinstance(metadata, dict):
        raise DecodeError("its json member is malformed")
    return checked_metadata(metadata, default_caption)


def checked_metadata(metadata: dict[str, Any], default_caption: str | None = None) -> dict[str, Any]:
    """What a sample's members say of it, with a caption; see :func:`parse_metadata`.

    Raises:
        DecodeError: there is no caption and no default, or the attributes are malformed.
    """
    caption = None if isinstance(default_caption, CaptionOverride) else metadata.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        if default_caption is None:
            raise DecodeError("no caption")
        metadata["caption"] = str(default_caption)  # a plain text, as every other
    else:
        clean_caption(caption)  # bounds and encoding; the text itself stays as it is
    if not isinstance(metadata.setdefault("attributes", {}), dict):
        raise DecodeError("its attributes are malformed")
    return metadata


def load_latents(data: bytes, out: np.ndarray) -> None:
    """Write a sample's safetensors member into ``out``, float32 [F, C, H, W].

    Raises:
        DecodeError: it is malformed or has another shape.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        latents = load(data)["latents"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DecodeError("its latents cannot be read") from error
    if latents.shape != out.shape:
        raise DecodeError(f"latents of shape {list(latents.shape)} where {list(out.shape)} is needed")
    out[:] = latents


@dataclass(frozen=True)
class Split:
    """One split of a data set, as the stream needs it.

    Attributes:
        name: of the data set.
        folder: its shards.
        home: the folder in which things derived from it may be kept.
        caption: stands in for a missing one (for every clip's own: a ``CaptionOverride``); None refuses clips without.
        frames, fps, height, width: what every clip has, if a card says so.
        controls: as a card tells them.
        domain: of its clips, if a card names it.
    """

    name: str
    folder: Path
    home: Path
    caption: str | None = None
    frames: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    controls: Mapping[str, Control | str] = field(default_factory=dict)
    domain: str = ""

    def shape_of(self, sample: Sample) -> Noted:
        """A clip's shape: as the index notes it, else as the card says of all; empty if neither does."""
        if sample.shape:
            return sample.shape
        if self.frames and self.height and self.width and self.fps:
            return self.frames, self.height, self.width, self.fps
        return ()


def find_split(
    card: str | Path, split: str, *, index: bool = True, shapes: bool = False, require_shards: bool = True
) -> Split:
    """A split of a card, given by name or path; a folder of shards, or of splits, stands for itself.

    Args:
        card: name, path, address, or tars.
        split: one of its own.
        index: make the index of tars, if it names such, or bring it up to date.
        shapes: note in it what shape each clip has, as well.
        require_shards: refuse a card whose shards are not here; else what it says is enough.

    Raises:
        UserError: there is no such card or split, or its tars cannot be indexed.
    """
    given = Path(card)
    for folder in () if remote.is_url(card) or is_tars(card) else (given, given / split):
        if (folder / INDEX_NAME).is_file() and not (given / CARD_NAME).is_file():
            return Split(given.name, folder, given)
    found = load_card(card, require_shards)
    if split not in found.splits:
        raise UserError(f"card {str(card)!r} has no split {split!r}: choose one of {', '.join(sorted(found.splits))}.")
    if index:
        ready(found.splits[split], shapes)
    return Split(
        found.name,
        found.splits[split],
        found.path.parent,
        found.stand_in,
        found.frames,
        found.fps,
        found.height,
        found.width,
        found.controls,
        found.domain,
    )


def split_folders(card: str | Path, split: str) -> list[Path]:
    """The shard folders of a card's split.

    Raises:
        UserError: there is no such card or split.
    """
    return [find_split(card, split).folder]


def check_length(split: Split, shape: ClipShape) -> None:
    """Refuse a shape for which a data set's clips are too short.

    Raises:
        UserError: more frames are asked for than a clip gives at the frame rate asked for.
    """
    if split.frames is None or split.fps is None:
        return
    needed = frames_needed(shape, split.fps)
    if needed > split.frames:
        raise UserError(
            f"data.frames={shape.frames} needs {needed} frames of every clip of {split.name!r}, which have "
            f"{split.frames} at {split.fps:g} frames/s: ask for fewer frames or a higher fps."
        )
