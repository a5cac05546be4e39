"""Plain folders: a table (metadata.csv, .jsonl or .json), captions.txt beside videos.txt, or a.mp4 beside a.txt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.recording import Found, Recording, Track, Unread, Unusable, VideoFile
from anyflow.data.importing.walk import is_video, stem_of, walk, walk_videos
from anyflow.data.safety import clean_captions, lines_of, parse_json, read_text, within
from anyflow.data.tables import CAPTION_COLUMNS, FILE_COLUMNS, pick, read_rows, require_utf8

LOOKS_FOR = (
    "videos (.mp4, .mov, ...) with a.txt beside a.mp4, a metadata.csv, .jsonl or .json, or captions.txt and videos.txt"
)
DOMAIN = "video"
CONTROLS: Mapping[str, Control | str] = {}

TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.parquet")
LISTS = (("captions.txt", "videos.txt"), ("prompts.txt", "videos.txt"), ("prompt.txt", "videos.txt"))
TEXTS = (".txt", ".caption", ".text", ".cap")
HELD_OUT = ("test", "val", "valid", "validation", "eval", "heldout")


class _Files:
    """What lies in a source: ``names`` of the files of every folder, in order; ``videos`` of them, by their stems."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[Path, list[str]] = {}
        self.videos: dict[Path, list[Path]] = {}
        for met in walk(folder):
            if not met.left:
                self.names.setdefault(met.path.parent, []).append(met.path.name)
                if is_video(met.path):
                    self.videos.setdefault(met.path.with_name(stem_of(met.path.name)), []).append(met.path)

    def relative(self, path: Path) -> str:
        """A path as it is told, from the source's folder on."""
        return path.relative_to(self.folder).as_posix()

    def recording(self, video: Path, caption: Any, fields: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Recording:
        """A recording, called by its file without the suffix, unless another video beside it is called the same."""
        stem = video.with_name(stem_of(video.name))
        name = self.relative(video if len(self.videos.get(stem, [])) > 1 else stem)
        split = split_of(video.relative_to(self.folder))
        footage = VideoFile(str(video))
        return Recording(name, name, footage, caption=caption, split=split, fields=dict(fields), notes=notes)


def detect(folder: Path) -> bool:
    """Whether there is any video, or a table or pair of lists that describes some."""
    return next(walk_videos(folder), None) is not None or bool(_described(_Files(folder)))


def recordings(folder: Path) -> Iterator[Found]:
    """The rows of the tables, the lines of the lists; without any, every video below the folder."""
    files = _Files(folder)
    described = _described(files)
    if not described:
        for place in files.names:
            yield from _plain(files, place)
        return
    for paths in described.values():
        for path in paths[1:]:
            yield Unread(files.relative(path), f"{paths[0].name} beside it is read")
    found: list[Found] = []
    for path, *_ in described.values():
        try:
            found += _lists(files, path) if path.suffix.lower() == ".txt" else _table(files, path)
        except DecodeError as error:
            found.append(Unusable(files.relative(path), str(error)))
    yield from _merged(found)
    named = {item.footage.path for item in found if isinstance(item, Recording) and isinstance(item.footage, VideoFile)}
    for video in (video for videos in files.videos.values() for video in videos):
        if str(video) not in named:
            yield Unread(files.relative(video), "a video that no table names")


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """None: such folders have no controls."""
    return {}


def split_of(path: Path) -> str | None:
    """The split that a path's folders name: train, or one of the usual names for held-out data."""
    for part in path.parts[:-1]:
        if part.lower() in HELD_OUT:
            return "heldout"
    return "train" if "train" in (part.lower() for part in path.parts[:-1]) else None


def _described(files: _Files) -> dict[Path, list[Path]]:
    """Folder -> the files in it that describe videos; the first is read."""
    described: dict[Path, list[Path]] = {}
    for place, names in files.names.items():
        spelt = {name.lower(): name for name in names}
        found = [spelt[name] for name in TABLES if name in spelt]
        found = found or [spelt[texts] for texts, videos in LISTS if texts in spelt and videos in spelt]
        if found:
            described[place] = [place / name for name in found]
    return described


def _table(files: _Files, path: Path) -> Iterator[Found]:
    for number, row in read_rows(path):
        place = f"{files.relative(path)}:{number}"
        if isinstance(row, DecodeError):
            yield Unusable(place, str(row))
            continue
        file = pick(row, FILE_COLUMNS)
        if file is None:
            yield Unusable(place, f"no column {FILE_COLUMNS[0]!r} (it has {', '.join(map(str, row))[:200] or 'none'})")
            continue
        described = {name: value for name, value in row.items() if name != file}
        caption = _caption(described)
        try:
            require_utf8(caption, place)
        except DecodeError as error:
            yield Unusable(str(row[file])[:200], str(error))
            continue
        yield _named(files, path.parent, str(row[file]), caption, _fields(described))


def _lists(files: _Files, path: Path) -> Iterator[Found]:
    spelt = {name.lower(): name for name in files.names[path.parent]}
    videos = path.with_name(spelt[dict(LISTS)[path.name.lower()]])
    names, captions = lines_of(read_text(videos)), lines_of(read_text(path))
    while names and not names[-1].strip():
        names.pop()
    while len(captions) > len(names) and not captions[-1].strip():
        captions.pop()
    if len(names) != len(captions):
        raise DecodeError(f"{videos.name} has {len(names)} lines and {path.name} {len(captions)}")
    for name, caption in zip(names, captions, strict=True):
        yield _named(files, path.parent, name, caption, {})


def _named(files: _Files, home: Path, name: str, caption: Any, fields: Mapping[str, Any]) -> Found:
    """A recording whose file a description names, with its suffix or without."""
    try:
        video = within(files.folder, home, name)
    except DecodeError as error:
        return Unusable(name[:200], str(error))
    if not video.is_file():
        meant = files.videos.get(video, [])
        if len(meant) != 1:
            names = ", ".join(other.name for other in meant)
            return Unusable(files.relative(video), f"it may be any of {names}" if meant else "there is no such file")
        video = meant[0]
    return files.recording(video, caption, fields)


def _merged(found: list[Found]) -> list[Found]:
    """Rows that describe one video as one recording, which has the captions of all of them."""
    merged: list[Found] = []
    places: dict[str, int] = {}
    for item in found:
        if not isinstance(item, Recording):
            merged.append(item)
            continue
        try:
            captions = clean_captions(item.caption)
        except DecodeError as error:
            merged.append(Unusable(item.name, str(error)))
            continue
        place = places.setdefault(item.name, len(merged))
        if place == len(merged):
            merged.append(replace(item, caption=captions or None))
            continue
        first = merged[place]
        assert isinstance(first, Recording)
        both = (*(first.caption or ()), *captions)
        merged[place] = replace(first, caption=both, fields={**item.fields, **first.fields})
    return merged


def _plain(files: _Files, place: Path) -> Iterator[Found]:
    """The videos of a folder, each with its caption in a file of its name: a text, or a .json with other fields."""
    texts: dict[tuple[str, str], str] = {}
    for name in files.names[place]:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in (*TEXTS, ".json"):
            texts.setdefault((stem, suffix.lower()), name)
    used: set[str] = set()
    for video in (place / name for name in files.names[place] if is_video(place / name)):
        places = [(stem, suffix) for suffix in (*TEXTS, ".json") for stem in (stem_of(video.name), video.name)]
        beside = [texts[key] for key in places if key in texts]
        used.update(beside)
        try:
            yield files.recording(video, *_beside(place, beside))
        except DecodeError as error:
            yield Unusable(files.relative(video), str(error))
    for name in texts.values():
        if name not in used and not name.lower().endswith(".json"):
            yield Unread(files.relative(place / name), "a text without a video of its name")


def _beside(place: Path, names: list[str]) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """(caption, fields, notes) of the files that lie beside a video, the one that counts first."""
    caption, fields, notes, taken = None, dict[str, Any](), tuple[str, ...](), ""
    for name in names:
        text = read_text(place / name)
        kind = os.path.splitext(name)[1].lower()
        given: Any = text
        if kind == ".json":
            document = described(parse_json(text, name), name)
            given, fields = _caption(document), {**_fields(document), **fields}
        if not caption:
            caption, taken = given, kind
        else:
            notes += other_caption(caption, taken, given, kind)
    return caption, fields, notes


def described(document: Any, name: str) -> dict[str, Any]:
    """What a JSON document beside a video says of it: an object; a text or a list of texts is its captions.

    Raises:
        DecodeError: it is anything else; ``name`` is said of it.
    """
    if isinstance(document, dict):
        return document
    if isinstance(document, str) or (isinstance(document, list) and all(isinstance(text, str) for text in document)):
        return {"captions": document}
    raise DecodeError(f"{name} holds no JSON object, and no list of texts")


def other_caption(taken: Any, kind: str, given: Any, other: str) -> tuple[str, ...]:
    """What is to be told where another file beside a video has another caption than the one that was taken."""
    theirs = clean_captions(given)
    if not theirs or theirs == clean_captions(taken):
        return ()
    return (f"captions beside a video that differ in {kind} and {other}: that of {kind} was taken",)


def _caption(row: Mapping[str, Any]) -> Any:
    column = pick(row, CAPTION_COLUMNS)
    return None if column is None else row[column]


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """What else a row or document says, for templates and as labels: plain values alone."""
    others = (name for name in row if pick({name: "x"}, CAPTION_COLUMNS) is None)
    return {str(name): row[name] for name in others if _is_plain(row[name])}


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and 0 < len(value) <= 200)
