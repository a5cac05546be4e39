"""What became of every file of a source: it holds footage, describes some, or is left out, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from anyflow.data.importing.recording import Found, LeftOut, Unread, Unusable, files_of
from anyflow.data.importing.walk import is_video, stem_of, walk
from anyflow.system.pool import batches

ARCHIVES = ".zip .7z .rar .gz .tgz .bz2 .tbz2 .xz .txz .zst .lz4 .br .cab .iso"
DESCRIPTIONS = ".txt .caption .text .cap .json .jsonl .csv .tsv .parquet"
README = "README.md"
"""Of the source's own folder: its licence is read."""
KNOWN = ".wav .mp3 .m4a .m4b .flac .aac .ogg .jpg .jpeg .png .webp .bmp .tif .tiff .heic .avif .srt .vtt .npy .npz"
"""Kinds that are no videos, whatever they begin with."""
THREADS, AT_ONCE = 16, 64
"""Videos whose beginnings are read at the same time, and in a row: on a network disk waiting takes nearly all of it."""
NAMED = 100
"""Files that a report names, of those that are left out for one reason."""

HEADS = (
    (4, b"ftyp", "MP4", ".mp4 .mov .m4v .qt .3gp .3g2 .f4v .mj2 .ismv .isma .psp .mp4v .divx"),
    (0, b"\x1aE\xdf\xa3", "Matroska", ".mkv .webm .mk3d"),
    (8, b"AVI ", "AVI", ".avi .divx .xvid"),
    (0, b"GIF8", "GIF", ".gif"),
    (0, b"FLV\x01", "FLV", ".flv .f4v"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "ASF", ".wmv .asf"),
    (0, b"\0\0\x01\xba", "MPEG-PS", ".mpg .mpeg .mpe .mpv .vob .evo .m2p .mod .tod"),
    (0, b"OggS", "Ogg", ".ogv .ogm"),
)
"""(place, bytes, container, suffixes that announce it)."""


@dataclass(frozen=True)
class Survey:
    """How a source's files add up: ``found`` = ``footage`` + ``descriptions`` + all that is left out.

    Attributes:
        footage: files that hold recordings, usable and asked for or not. descriptions: texts, tables and the like.
        left_out: reason -> files; a folder that is not entered counts as one. unread: the first of each reason.
        odd: files that hold another container than their names say: they are read as what they are.
    """

    found: int
    footage: int
    descriptions: int
    left_out: Mapping[str, int]
    unread: tuple[Unread, ...]
    odd: tuple[str, ...]

    @property
    def counts(self) -> dict[str, Any]:
        """The numbers alone, for JSON."""
        return {name: getattr(self, name) for name in ("found", "footage", "descriptions", "left_out")}


def survey(folder: Path, format: str, found: Sequence[Found]) -> Survey:
    """Look at every file below a source's folder."""
    held = (item.footage for item in found if not isinstance(item, Unread))
    footage = {path for item in held if item is not None for path in files_of(item)}
    told = {item.name: item.reason for item in found if isinstance(item, Unread)}
    bad = {item.name for item in found if isinstance(item, Unusable | LeftOut)}
    bad |= {name.partition(":")[0] for name in bad}  # a member of a tar
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    unread: list[Unread] = []
    names: list[str] = []
    for met in walk(folder):
        name = met.path.relative_to(folder).as_posix()
        counts["found"] += 1
        stem = stem_of(name)
        is_bad = bad & {name, stem, name.partition("/")[2], stem.partition("/")[2]}  # some formats leave a folder out
        can_hold = is_video(met.path) or met.path.suffix.lower() == ".tar"
        is_footage = str(met.path) in footage or bool(is_bad and can_hold and name not in told)
        reason = met.left or told.pop(name, "") or ("" if is_footage or name == README else _why_not(met.path, format))
        if reason:
            left_out[reason] += 1
            unread += [Unread(name, reason)] if left_out[reason] <= NAMED else []
        elif is_footage:
            counts["footage"] += 1
            names.append(name)
        else:
            counts["descriptions"] += 1
    unread += [Unread(name, reason) for name, reason in told.items()]  # members of a tar, which are no files
    return Survey(
        counts["found"],
        counts["footage"],
        counts["descriptions"],
        dict(sorted(left_out.items())),
        tuple(unread),
        tuple(islice(_odd(folder, names), NAMED)),
    )


def _odd(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """The videos that hold another container than their names say; many are looked into at a time."""

    def look(part: range) -> list[str]:
        return [f"{names[place]} ({held})" for place in part for held in _held(folder / names[place])]

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for found in pool.map(look, batches(len(names), AT_ONCE)):
                yield from found
        finally:
            pool.shutdown(cancel_futures=True)


def _why_not(path: Path, format: str) -> str:
    """Why a file that holds no recording is not read; empty if it can be a description."""
    suffix = path.suffix.lower()
    if is_video(path):
        return f"a video that the format {format} does not read"
    if suffix == ".tar" and format != "webdataset":
        return f"a tar, which the format {format} does not read: try --format webdataset"
    if suffix and suffix in ARCHIVES.split():
        return "an archive, which is not opened: unpack it"
    if suffix in DESCRIPTIONS.split():
        return ""
    if suffix not in KNOWN.split() and (held := container_of(path)):
        return f"a video ({held}) whose name does not end as one: rename it"
    return f"a kind that is not read ({suffix})" if suffix else ""


def container_of(path: Path) -> str:
    """The container that a file begins as; empty if that is no known one."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return ""
    return next((name for place, mark, name, _ in HEADS if head[place : place + len(mark)] == mark), "")


def _held(path: Path) -> Iterator[str]:
    """The container that a video holds, where its suffix announces another one."""
    held, suffix = container_of(path), path.suffix.lower()
    announced = {name for _, _, name, suffixes in HEADS if suffix in suffixes.split()}
    if held and announced and held not in announced:
        yield held
