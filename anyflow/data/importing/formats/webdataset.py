"""Existing WebDataset shards: tars of KEY.mp4 with KEY.txt or KEY.json. They are read in place, never unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.decode import DecodeError
from anyflow.data.importing.captions import CAPTION_COLUMNS
from anyflow.data.importing.footage import read_bytes
from anyflow.data.importing.formats.folder import split_of
from anyflow.data.importing.recording import Found, Recording, Track, Unusable, VideoFile
from anyflow.data.safety import MAX_TEXT_BYTES, PICKLES, VIDEO_SUFFIXES, is_safe_name, parse_json

LOOKS_FOR = "*.tar files, here or one folder below, with KEY.mp4 and KEY.txt or KEY.json"
DOMAIN = "video"
CONTROLS: Mapping[str, str] = {}

TEXTS = ("txt", "caption", "text", "cap")
VIDEOS = tuple(suffix.removeprefix(".") for suffix in VIDEO_SUFFIXES)
Span = tuple[int, int]


def detect(folder: Path) -> bool:
    """Whether there is a tar."""
    return bool(_tars(folder))


def recordings(folder: Path) -> Iterator[Found]:
    """Every sample with a video. Those of one tar are a group: neighbours often come from one longer video."""
    tars = _tars(folder)
    for tar in tars:
        place = tar.relative_to(folder).as_posix()
        samples: dict[str, dict[str, Span]] = {}
        for item in _members(tar, place):
            if isinstance(item, Unusable):
                yield item
            else:
                key, extension, span = item
                samples.setdefault(key, {})[extension] = span
        for key, parts in samples.items():
            try:
                yield _recording(tar, place, key, parts, alone=len(tars) == 1)
            except DecodeError as error:
                yield Unusable(f"{place}:{key}", str(error))


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """Those of shards that this project wrote: a list for each control, with a value a frame."""
    span, fps = recording.details.get("json"), recording.details.get("fps")
    if span is None or not isinstance(fps, int | float) or fps <= 0:
        return {}
    description = _json(recording.details["tar"], span)
    given = description.get("controls")
    lists = (
        {name: values for name, values in given.items() if isinstance(values, list) and values}
        if isinstance(given, dict)
        else {}
    )
    return {str(name): Track(np.arange(len(values)) / fps, values) for name, values in lists.items()}


def _tars(folder: Path) -> list[Path]:
    return sorted({*folder.glob("*.tar"), *folder.glob("*/*.tar")})


def _members(tar: Path, place: str) -> Iterator[tuple[str, str, Span] | Unusable]:
    """(key, extension, (offset, size)) of every plain file; what is unsafe or damaged is named."""
    size = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as file:  # "r:": a compressed tar is refused, for it may be a bomb
            for member in file:
                name = member.name.encode(errors="replace").decode()[:200]
                if member.isdir():
                    continue
                if not is_safe_name(member.name):
                    yield Unusable(f"{place}:{name}", "the member's path leads out of the shard")
                elif not member.isreg() or member.issparse():
                    yield Unusable(f"{place}:{name}", "the member is a link or a device, no file")
                elif Path(name).suffix in PICKLES:
                    yield Unusable(f"{place}:{name}", "a pickle is never read")
                elif member.offset_data + member.size > size:
                    yield Unusable(f"{place}:{name}", "the shard is truncated")
                else:
                    folder, _, base = member.name.rpartition("/")
                    key, _, extension = base.partition(".")
                    yield f"{folder}/{key}" if folder else key, extension.lower(), (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        yield Unusable(place, f"the shard cannot be read to its end ({str(error)[:80]})")


def _recording(tar: Path, place: str, key: str, parts: Mapping[str, Span], alone: bool) -> Recording:
    video = next((name for name in VIDEOS if name in parts), None)
    if video is None:
        raise DecodeError(f"no video among its members ({', '.join(sorted(parts))[:100]})")
    description = _json(str(tar), parts["json"]) if "json" in parts else {}
    caption = next((description[name] for name in CAPTION_COLUMNS if description.get(name)), None)
    text = next((name for name in TEXTS if name in parts), None)
    if text is not None:
        data = _bytes(str(tar), parts[text])
        try:
            caption = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DecodeError("its caption is not UTF-8") from error
    labels = description.get("attributes")
    fields = {**description, **labels} if isinstance(labels, dict) else description
    own = {"caption", "fps", "domain", "licence"}
    return Recording(
        name=f"{place.removesuffix('.tar')}/{key}",
        group=key if alone else place,
        footage=VideoFile(str(tar), *parts[video]),
        stated_fps=_rate(description),
        caption=caption,
        split=split_of(Path(place)),
        fields={
            name: value
            for name, value in fields.items()
            if name not in own and isinstance(value, str | int | float) and len(str(value)) <= 200
        },
        details={"tar": str(tar), "json": parts.get("json"), "fps": description.get("fps")},
    )


def _rate(description: Mapping[str, Any]) -> float | None:
    """Values a second of the controls that shards of this project have, one a frame."""
    fps = description.get("fps")
    return fps if description.get("controls") and isinstance(fps, int | float) and fps > 0 else None


def _json(tar: str, span: Span) -> dict[str, Any]:
    document = parse_json(_bytes(tar, span), "its json member")
    if not isinstance(document, dict):
        raise DecodeError("its json member holds no object")
    return document


def _bytes(tar: str, span: Span) -> bytes:
    if span[1] > MAX_TEXT_BYTES:
        raise DecodeError(f"a text member has {span[1]} bytes")
    return read_bytes(VideoFile(tar, *span))
