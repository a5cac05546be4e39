"""What an importer finds in a folder: recordings, each one stretch of footage without a gap, not yet cut into clips."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from anyflow.data.controls import Control

MAX_KEY = 72
"""A tar header holds 100 bytes of name: room is left for the clip's number and the extension."""


PATH = Control(
    "per frame: [x, y, heading], as seen from the clip's first: metres ahead, metres and degrees to the left",
    3,
    unit=("m", "m", "degree"),
    numbers=("x", "y", "heading"),
)
"""What a relative :class:`Track` of a car holds."""
PLAYER = Control(
    "per frame: [x, y, z, yaw, pitch], in blocks and degrees",
    5,
    unit=("block", "block", "block", "degree", "degree"),
    numbers=("x", "y", "z", "yaw", "pitch"),
)
"""The pose of a player in Minecraft."""


@dataclass(frozen=True)
class VideoFile:
    """A video file, or the span of one that lies inside another file (a tar's member)."""

    path: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class ImageFiles:
    """Pictures and the time of each, in seconds after the first one, ascending."""

    paths: tuple[str, ...]
    times: tuple[float, ...]


@dataclass(frozen=True)
class ParquetCell:
    """A video file's bytes in a parquet table: row ``row`` of a row group, in ``column`` (binary, or {bytes, path})."""

    path: str
    row_group: int
    row: int
    column: str


@dataclass(frozen=True)
class ParquetImages:
    """The rows of a parquet table that hold a recording's pictures, one row a picture, in the order of time.

    Attributes:
        path: the table. column: of pictures: an image file's bytes, or {bytes, path}.
        root: the folder from which such a path leads.
        where: (column, value) of the rows that belong to the recording. clock: the column of their seconds.
    """

    path: str
    column: str
    root: str
    where: tuple[str, int]
    clock: str


@dataclass(frozen=True)
class Views:
    """What several cameras saw of one moment, as one picture.

    Attributes:
        parts: a recording a camera, in the picture's order; they begin together.
        columns: cameras side by side in one row.
    """

    parts: tuple[Recording, ...]
    columns: int


Footage = VideoFile | ImageFiles | ParquetCell | ParquetImages | Views


def files_of(footage: Footage) -> Iterator[str]:
    """The files that pictures come from."""
    if isinstance(footage, Views):
        for part in footage.parts:
            yield from files_of(part.footage)
    elif isinstance(footage, ImageFiles):
        yield from footage.paths
    else:
        yield footage.path


def by_number(name: str) -> list[Any]:
    """Sorts names as people do: camera 2 before camera 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Track:
    """One control over a recording's time.

    Attributes:
        times: seconds after the recording's start, ascending, [N].
        values: [N] or [N, D] numbers, or any N values that JSON can hold.
        linear: interpolate between the values; else the last one at or before a time holds.
        relative: a path [N, 3] of (x, y, heading in degrees): told as seen from the clip's first frame.
        action: of one that leads from a value's time to the next one's: what a clip's frame gets of several.
    """

    times: np.ndarray
    values: Sequence[Any] | np.ndarray
    linear: bool = False
    relative: bool = False
    action: Control | None = None


@dataclass(frozen=True)
class Recording:
    """One stretch of footage with one caption.

    Attributes:
        name: unique within the source and the same each time; it becomes the clips' key.
        group: what must not be torn between training and held-out clips: the episode, scene, route or session.
        footage: the pictures.
        start, end: seconds within the footage; None for its end.
        fps: the rate of a stream that carries no time stamps; None where it does.
        stated_fps: the rate that the source's description states and counts its times by; None where it states none.
        caption: from the source, if it has one; of several, each clip takes one (:meth:`caption_of`).
        camera: which of several. Recordings of one group with several cameras show one moment.
        clock: seconds after the moment's beginning at which this recording starts.
        split: "train" or "heldout", if the source says so itself.
        fields: plain values, for caption templates and as the clips' labels.
        notes: what had to be guessed of it, in words.
        details: what the importer's ``controls`` needs again; nobody else looks into it.
    """

    name: str
    group: str
    footage: Footage
    start: float = 0.0
    end: float | None = None
    fps: float | None = None
    stated_fps: float | None = None
    caption: str | Sequence[str] | None = None
    camera: str = ""
    clock: float = 0.0
    split: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name as a tar member may have it: unique, for a short digest follows whatever had to be changed."""
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", self.name)
        if plain == self.name and len(plain) <= MAX_KEY:
            return plain
        digest = hashlib.blake2b(self.name.encode(errors="surrogateescape"), digest_size=4).hexdigest()
        return f"{plain[: MAX_KEY - 9]}-{digest}"

    def caption_of(self, clip: str, seed: int) -> str:
        """The caption of one of its clips, drawn for that clip alone where there are several; empty without any."""
        if self.caption is None or isinstance(self.caption, str):
            return self.caption or ""
        draw = hashlib.blake2b(f"{seed}/caption/{clip}".encode(errors="surrogateescape"), digest_size=8).digest()
        return self.caption[int.from_bytes(draw) % len(self.caption)]


@dataclass(frozen=True)
class Unusable:
    """Something in a source that cannot be used, and why."""

    name: str
    reason: str
    footage: Footage | None = None


@dataclass(frozen=True)
class LeftOut:
    """A recording that is not asked for, and why: no fault, so it does not count for the budget."""

    name: str
    reason: str
    footage: Footage | None = None


@dataclass(frozen=True)
class Unread:
    """A file, by its path within the source, that is read neither as footage nor as a description, and why."""

    name: str
    reason: str


Found = Recording | Unusable | LeftOut | Unread


class Source(Protocol):
    """What a module of ``anyflow.data.importing.formats`` has.

    Attributes:
        LOOKS_FOR: what ``detect`` looks for, in words.
        DOMAIN: the domain if none is given. CONTROLS: control -> what it holds, for the card, without the range;
            in words alone where only the data set itself can tell the width (``described_controls``).
    """

    LOOKS_FOR: str
    DOMAIN: str
    CONTROLS: Mapping[str, Control | str]

    def detect(self, folder: Path) -> bool:
        """Whether a folder is in this format; cheap, and never an exception."""
        ...

    def recordings(self, folder: Path) -> Iterator[Found]:
        """All recordings, in an order that is the same each time; reads descriptions, no pictures."""
        ...

    def controls(self, folder: Path, recording: Recording) -> Mapping[str, Track]:
        """A recording's controls; called in a worker.

        Raises:
            DecodeError: they cannot be read.
        """
        ...
