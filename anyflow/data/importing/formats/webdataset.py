"""Existing WebDataset shards: tars of KEY.mp4 with KEY.txt or KEY.json. They are read in place, never unpacked."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.card import CARD_NAME, load_card
from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.footage import read_bytes
from anyflow.data.importing.formats.folder import described, other_caption, split_of
from anyflow.data.importing.recording import Found, LeftOut, Recording, Track, Unread, Unusable, VideoFile
from anyflow.data.importing.walk import walk, walk_videos
from anyflow.data.safety import MAX_TEXT_BYTES, VIDEO_SUFFIXES, decode_text, is_safe_name, parse_json
from anyflow.data.tables import CAPTION_COLUMNS, pick
from anyflow.errors import UserError

LOOKS_FOR = "*.tar files with KEY.mp4 and KEY.txt or KEY.json"
DOMAIN = "video"
CONTROLS: Mapping[str, Control | str] = {}

TEXTS = ("txt", "caption", "text", "cap")
VIDEOS = tuple(suffix.removeprefix(".") for suffix in VIDEO_SUFFIXES)
Span = tuple[int, int]


def detect(folder: Path) -> bool:
    """Whether there is a tar, here or one folder below; further down where no video lies beside the tars."""
    tars = _tars(folder)
    near = any(len(tar.relative_to(folder).parts) <= 2 for tar in tars)
    return near or (bool(tars) and next(walk_videos(folder), None) is None)


def recordings(folder: Path) -> Iterator[Found]:
    """Every sample with a video. Those of one tar are a group: neighbours often come from one longer video."""
    tars = _tars(folder)
    for tar in tars:
        place = tar.relative_to(folder).as_posix()
        samples: dict[str, list[tuple[str, Span]]] = {}
        told: list[Found] = []
        for item in _members(tar, place):
            if isinstance(item, Unusable | Unread):
                told.append(item)
            else:
                key, extension, span = item
                samples.setdefault(key, []).append((extension, span))
        others = Counter(extension for members in samples.values() for extension, _ in members if _is_other(extension))
        for extension, count in sorted(others.items()):
            told.append(Unread(f"{place}:*.{extension} ({count})", f"members that are not read (.{extension})"))
        asked = {key: members for key, members in samples.items() if not all(_is_other(name) for name, _ in members)}
        if not asked and all(isinstance(item, Unread) for item in told):
            told.append(Unread(place, "a tar without a member that is read" if told else "a tar without members"))
        yield from told
        for key, members in asked.items():
            yield from _sample(tar, place, key, members, alone=len(tars) == 1)


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
    told = described_controls(folder)
    return {str(name): Track(np.arange(len(v)) / fps, v, action=_movement(told.get(name))) for name, v in lists.items()}


@lru_cache(maxsize=1)
def described_controls(folder: Path) -> Mapping[str, Control | str]:
    """As the card tells them that lies beside shards of this project."""
    try:
        return load_card(folder / CARD_NAME, require_shards=False).controls if (folder / CARD_NAME).is_file() else {}
    except UserError:
        return {}


def _movement(told: Control | str | None) -> Control | None:
    """A control that is summed wherever the rates differ."""
    return told if isinstance(told, Control) and told.at == "transition" and told.skipped == "sum" else None


def _tars(folder: Path) -> list[Path]:
    return sorted(met.path for met in walk(folder) if not met.left and met.path.suffix.lower() == ".tar")


def _is_other(extension: str) -> bool:
    return extension.rpartition(".")[2] not in (*TEXTS, *VIDEOS, "json")


def _sample(tar: Path, place: str, key: str, members: Sequence[tuple[str, Span]], alone: bool) -> Iterator[Found]:
    """The recording of a key; where only what follows a dot is a video (``take.01.mp4``), those of the longer keys."""
    parts = dict(members)
    plain = [name for name in VIDEOS if name in parts]
    dotted = [name for name in parts if name.rpartition(".")[2] in VIDEOS and name not in plain]
    if len(parts) < len(members):
        times = max(Counter(name for name, _ in members).values())
        for number in range(1, times + 1):
            why = f"the shard holds its key {times} times, so which video has which caption cannot be told"
            yield Unusable(f"{place}:{key} ({number} of {times})", why)
        return
    if dotted and not plain:
        ends = dict.fromkeys(name.rpartition(".")[0] for name in dotted)
        shared = {name: span for name, span in parts.items() if name.rpartition(".")[0] not in ends}
        for end in ends:
            own = {name.removeprefix(f"{end}."): span for name, span in parts.items() if name.startswith(f"{end}.")}
            yield from _sample(tar, place, f"{key}.{end}", [*({**shared, **own}).items()], alone)
        return
    for name in (*plain[1:], *dotted):
        yield LeftOut(f"{place}:{key}.{name}", f"a further video of its sample, beside .{plain[0]}")
    try:
        yield _recording(tar, place, key, parts, alone)
    except DecodeError as error:
        yield Unusable(f"{place}:{key}", str(error))


def _members(tar: Path, place: str) -> Iterator[tuple[str, str, Span] | Unusable | Unread]:
    """(key, extension, (offset, size)) of every plain file; what is unsafe, damaged or hidden is named."""
    size, hidden = tar.stat().st_size, 0
    try:
        with tarfile.open(tar, "r:") as file:  # "r:": a compressed tar is refused, for it may be a bomb
            for member in file:
                name = member.name.encode(errors="replace").decode()[:200]
                if member.isdir():
                    continue
                if not is_safe_name(member.name):
                    yield Unusable(f"{place}:{name}", "the member's path leads out of the shard")
                elif (not member.isreg() or member.issparse()) and not _is_other(name.lower()):
                    yield Unusable(f"{place}:{name}", "the member is a link or a device, no file")
                elif member.offset_data + member.size > size:
                    yield Unusable(f"{place}:{name}", "the shard is truncated")
                else:
                    folder, _, base = member.name.rpartition("/")
                    if base.startswith("."):  # as WebDataset has it; a Mac puts a "._NAME" beside each
                        hidden += 1
                        continue
                    key, _, extension = base.partition(".")
                    yield f"{folder}/{key}" if folder else key, extension.lower(), (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        yield Unusable(place, f"the shard cannot be read to its end ({str(error)[:80]})")
    if hidden:
        yield Unread(f"{place}:.* ({hidden})", "hidden members")


def _recording(tar: Path, place: str, key: str, parts: Mapping[str, Span], alone: bool) -> Recording:
    video = next((name for name in VIDEOS if name in parts), None)
    if video is None:
        raise DecodeError(f"no video among its members ({', '.join(sorted(parts))[:100]})")
    description = _json(str(tar), parts["json"]) if "json" in parts else {}
    column = pick(description, CAPTION_COLUMNS)
    caption = None if column is None else description[column]
    text = next((name for name in TEXTS if name in parts), None)
    notes: tuple[str, ...] = ()
    if text is not None:
        given, caption = caption, decode_text(_bytes(str(tar), parts[text]), "its caption")
        notes = other_caption(caption, f".{text}", given, ".json")
    labels = description.get("attributes")
    fields = {**description, **labels} if isinstance(labels, dict) else description
    own = {"caption", "fps", "domain", "licence"}
    return Recording(
        name=f"{place.removesuffix('.tar')}/{key}",
        group=key if alone else place,
        footage=VideoFile(str(tar), *parts[video]),
        stated_fps=_rate(description),
        caption=caption,
        notes=notes,
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
    return described(document, "its json member")


def _bytes(tar: str, span: Span) -> bytes:
    if span[1] > MAX_TEXT_BYTES:
        raise DecodeError(f"a text member has {span[1]} bytes")
    return read_bytes(VideoFile(tar, *span))
