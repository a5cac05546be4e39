"""The files of a source folder: every one, in the order of names, links followed, each folder met once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from anyflow.data.safety import VIDEO_SUFFIXES

HIDDEN = "hidden"
BROKEN_LINK = "a link to nothing"
NO_FILE = "no file but a pipe, a socket or a device"
LOOP = "a link to a folder that holds it"
READ_THERE = "a link to a folder that is read under its own name"
READ_BEFORE = "a folder that is read under another name already"


@dataclass(frozen=True)
class Met:
    """A file, or a folder that is not entered: ``left`` says why it is left out, empty if it is not."""

    path: Path
    left: str = ""


class _Entry(NamedTuple):
    """What a folder lists: ``kind`` "dir" or "file", links followed; else empty."""

    name: str
    kind: str
    is_link: bool


_lists: dict[Path, list[_Entry]] | None = None


@contextmanager
def listed_once() -> Iterator[None]:
    """Within the block each folder is listed once, however often it is walked: on network disks lists are slow."""
    global _lists
    before, _lists = _lists, {}
    try:
        yield
    finally:
        _lists = before


def walk(folder: Path) -> Iterator[Met]:
    """Every file below a folder. Linked folders are entered, unless what they hold is met elsewhere.

    Hidden folders, and those that cannot be opened, are met as one entry that is left out.
    """
    links = _Links(folder)
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            entries = _listed(place)
        except OSError as error:
            yield Met(place, f"it cannot be opened ({error.strerror})")
            continue
        below = []
        for entry in entries:
            path = place / entry.name
            left = HIDDEN if entry.name.startswith(".") else ""
            if not left and entry.kind == "dir":
                left = links.why_not(path, entry.is_link)
                if not left:
                    below.append(path)
                    continue
            elif not left and entry.kind != "file":
                left = BROKEN_LINK if entry.is_link and not path.exists() else NO_FILE
            yield Met(path, left)
        waiting += reversed(below)


def walk_videos(folder: Path) -> Iterator[Path]:
    """Every video below a folder, by the ends of their names; hidden ones are left out."""
    for met in walk(folder):
        if not met.left and is_video(met.path):
            yield met.path


def is_video(path: Path) -> bool:
    """Whether a file's name ends as those of videos do; ``.ts`` is also what TypeScript is written in."""
    suffix = path.suffix.lower()
    return suffix in VIDEO_SUFFIXES and (suffix != ".ts" or _is_binary(path))


def stem_of(name: str) -> str:
    """A name without a video's suffix; any other dot belongs to the name: ``take.01.mp4`` and ``take.01`` are one."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in VIDEO_SUFFIXES else name


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError:
        return True  # why it cannot be read is told where it is opened
    return not head or b"\0" in head or head[:1] == b"G"


def _listed(folder: Path) -> list[_Entry]:
    """A folder's entries by name.

    Raises:
        OSError: it cannot be opened.
    """
    if _lists is not None and folder in _lists:
        return _lists[folder]
    with os.scandir(folder) as listing:
        entries = sorted(_Entry(entry.name, _kind(entry), entry.is_symlink()) for entry in listing)
    if _lists is not None:
        _lists[folder] = entries
    return entries


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return "dir" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:  # links in a circle
        return ""


class _Links:
    """Which folders have been entered, so that links and mounts do not lead around for ever."""

    def __init__(self, folder: Path) -> None:
        self._home = Path(os.path.realpath(folder))
        self._above = [_identity(place) for place in (self._home, *self._home.parents)]
        self._entered = {_identity(folder)}

    def why_not(self, path: Path, is_link: bool) -> str:
        """Why a folder is not entered; empty if it is, from now on."""
        identity, target = _identity(path), Path(os.path.realpath(path))
        if identity in self._above or (is_link and Path(os.path.realpath(path.parent)).is_relative_to(target)):
            return LOOP
        if identity in self._entered:
            return READ_BEFORE
        if is_link:
            inside = target.relative_to(self._home).parts if target.is_relative_to(self._home) else (".",)
            if not any(part.startswith(".") for part in inside):
                return READ_THERE
        self._entered.add(identity)
        return ""


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (-1, hash(path))
    return status.st_dev, status.st_ino
