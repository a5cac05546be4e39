"""Plain folders: a table (metadata.csv, .jsonl or .json), captions.txt beside videos.txt, or a.mp4 beside a.txt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anyflow.data.decode import DecodeError
from anyflow.data.importing.captions import CAPTION_COLUMNS, FILE_COLUMNS
from anyflow.data.importing.recording import Found, Recording, Track, Unusable, VideoFile
from anyflow.data.safety import VIDEO_SUFFIXES, inside, parse_json, read_rows, read_text

LOOKS_FOR = (
    "videos (.mp4, .mov, ...) with a.txt beside a.mp4, a metadata.csv, .jsonl or .json, or captions.txt and videos.txt"
)
DOMAIN = "video"
CONTROLS: Mapping[str, str] = {}

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.json")
LISTS = (("captions.txt", "videos.txt"), ("prompts.txt", "videos.txt"), ("prompt.txt", "videos.txt"))
HELD_OUT = ("test", "val", "valid", "validation", "eval", "heldout")


def detect(folder: Path) -> bool:
    """Whether there is a table, a pair of lists, or any video."""
    return next(_described(folder), None) is not None or next(walk_videos(folder), None) is not None


def recordings(folder: Path) -> Iterator[Found]:
    """The rows of the tables, the lines of the lists; without any, every video below the folder."""
    described = list(_described(folder))
    for path in described:
        try:
            yield from _table(folder, path) if path.name in TABLES else _lists(folder, path)
        except DecodeError as error:
            yield Unusable(path.relative_to(folder).as_posix(), str(error))
    if not described:
        for video in walk_videos(folder):
            yield _beside(folder, video)


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """None: such folders have no controls."""
    return {}


def walk_videos(folder: Path) -> Iterator[Path]:
    """Every video below a folder, in the order of names; hidden ones and linked folders are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(parent) / name
            for name in sorted(files)
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")
        )


def split_of(path: Path) -> str | None:
    """The split that a path's folders name: train, or one of the usual names for held-out data."""
    for part in path.parts[:-1]:
        if part.lower() in HELD_OUT:
            return "heldout"
    return "train" if "train" in (part.lower() for part in path.parts[:-1]) else None


def _described(folder: Path) -> Iterator[Path]:
    """The files that describe videos, in the folder itself and in those one below (``train/metadata.csv``)."""
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return
    for place in (folder, *below):
        for name in TABLES:
            if (place / name).is_file():
                yield place / name
                break
        else:
            yield from (
                place / text for text, videos in LISTS if (place / text).is_file() and (place / videos).is_file()
            )


def _table(folder: Path, path: Path) -> Iterator[Found]:
    columns = 0
    for number, row in read_rows(path):
        place = f"{path.relative_to(folder).as_posix()}:{number}"
        if isinstance(row, DecodeError):
            yield Unusable(place, str(row))
            continue
        file = next((column for column in FILE_COLUMNS if row.get(column)), None)
        if file is None:
            yield Unusable(place, f"no column {FILE_COLUMNS[0]!r} (it has {', '.join(map(str, row))[:200] or 'none'})")
            continue
        columns += 1
        caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), None)
        used = {file, *CAPTION_COLUMNS}
        fields = {str(name): value for name, value in row.items() if name not in used and _is_plain(value)}
        yield _named(folder, path.parent, str(row[file]), caption, fields)


def _lists(folder: Path, path: Path) -> Iterator[Found]:
    videos = path.with_name(dict(LISTS)[path.name])
    names, captions = read_text(videos).splitlines(), read_text(path).splitlines()
    while names and not names[-1].strip():
        names.pop()
    while len(captions) > len(names) and not captions[-1].strip():
        captions.pop()
    if len(names) != len(captions):
        raise DecodeError(f"{videos.name} has {len(names)} lines and {path.name} {len(captions)}")
    for name, caption in zip(names, captions, strict=True):
        yield _named(folder, path.parent, name.strip(), caption, {})


def _named(folder: Path, home: Path, name: str, caption: Any, fields: Mapping[str, Any]) -> Found:
    """A recording whose file a description names."""
    try:
        video = inside(home, name)
    except DecodeError as error:
        return Unusable(name[:200], str(error))
    relative = video.relative_to(folder)
    if not video.is_file():
        return Unusable(relative.as_posix(), "there is no such file")
    key = relative.with_suffix("").as_posix()
    return Recording(key, key, VideoFile(str(video)), caption=caption, split=split_of(relative), fields=dict(fields))


def _beside(folder: Path, video: Path) -> Found:
    """A video with its caption in the file of the same name: .txt, or .json with other fields."""
    relative = video.relative_to(folder)
    key = relative.with_suffix("").as_posix()
    caption, fields = None, {}
    text, document = video.with_suffix(".txt"), video.with_suffix(".json")
    try:
        if text.is_file():
            caption = read_text(text)
        elif document.is_file():
            described = parse_json(read_text(document), document.name)
            if not isinstance(described, dict):
                raise DecodeError(f"{document.name} holds no JSON object")
            caption = next((described[name] for name in CAPTION_COLUMNS if described.get(name)), None)
            fields = {
                name: value for name, value in described.items() if name not in CAPTION_COLUMNS and _is_plain(value)
            }
    except DecodeError as error:
        return Unusable(relative.as_posix(), str(error))
    return Recording(key, key, VideoFile(str(video)), caption=caption, split=split_of(relative), fields=fields)


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 200)
