"""The members of a sample in somebody else's tar: which is the video, the caption, a control, and what they say.

``KEY.EXTENSION`` is a member's name, as in every WebDataset: the key ends at the first dot after the last slash.
A member is named by its extension (``mp4``, ``front.mp4``); a field of a JSON member by both (``json:meta.caption``).
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from anyflow.data.decode import DecodeError
from anyflow.data.safety import PICKLES, VIDEO_SUFFIXES, clean_caption, decode_text, parse_json, plain
from anyflow.errors import UserError

VIDEOS = tuple(suffix.removeprefix(".") for suffix in VIDEO_SUFFIXES)
TEXTS = ("txt", "caption", "text", "cap")
CAPTION_FIELDS = ("caption", "text", "prompt", "description")
"""Fields of a JSON member that hold the caption, where none is named; the first that is there."""
MAX_MEMBER = 2**24
"""Bytes of a member that is no video."""
DOTS = ("first dot", "last dot")
MISSING = ("keep", "skip")

_FIRST_DOT = re.compile(r"((?:.*/|)[^./]+)[.]([^/]+)", re.DOTALL)
_LAST_DOT = re.compile(r"((?:.*/|)[^./][^/]*)[.]([^/.]+)", re.DOTALL)


@dataclass(frozen=True)
class Members:
    """Which members of a sample hold what.

    Attributes:
        video: extensions; the first that a sample has.
        caption: extensions of texts, or ``json`` (its usual fields), or ``json:FIELD``; the first that a sample has.
        controls: control -> extension of an npy, or ``json:FIELD``.
        missing_controls: "keep" a clip that lacks one of them, or "skip" it.
        key_ends_at: the "first dot" of a name, or the "last dot" where keys have dots.
    """

    video: tuple[str, ...] = VIDEOS
    caption: tuple[str, ...] = (*TEXTS, "json")
    controls: Mapping[str, str] = field(default_factory=dict)
    missing_controls: str = "keep"
    key_ends_at: str = "first dot"

    def to_dict(self) -> dict[str, Any]:
        """As YAML or JSON can hold it; :func:`parse_members` reads it."""
        document = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in document.items()}

    def split(self, name: str) -> tuple[str, str] | None:
        """(key, extension in lower case) of a member's name; None for one without an extension."""
        match = (_LAST_DOT if self.key_ends_at == "last dot" else _FIRST_DOT).fullmatch(name)
        return (match[1], match[2].lower()) if match else None

    def wants(self, extension: str) -> bool:
        """Whether a member with this extension may be read; a pickle never is."""
        named = (*self.video, *self.caption, *self.controls.values(), "json")
        wanted = {place.partition(":")[0] for place in named}
        is_named = extension in wanted or any(extension.endswith(f".{one}") for one in wanted)
        return is_named and not f".{extension}".endswith(PICKLES)

    def video_of(self, parts: Collection[str]) -> str:
        """The extension of a sample's video.

        Raises:
            DecodeError: it has none, or several without one that is named exactly.
        """
        found = _pick(parts, self.video, "videos", "members.video")
        if found is None:
            raise DecodeError(f"no video among its members ({', '.join(sorted(parts))[:100]})")
        return found

    def describe(self, parts: Collection[str], read: Callable[[str], bytes]) -> dict[str, Any]:
        """What a sample's members say: caption, attributes, controls, and fps, domain and licence where they stand.

        Args:
            parts: extensions of the sample's members. read: gives a member's bytes.

        Raises:
            DecodeError: a member that is asked for cannot be read, or holds something else.
        """
        documents: dict[str, dict[str, Any]] = {}

        def document(member: str) -> dict[str, Any]:
            if member not in documents:
                documents[member] = _object(_bounded(read(member), member), member)
            return documents[member]

        beside = _pick(parts, ("json",), "", "") if "json" in parts else None
        own = document(beside) if beside else {}
        told = {
            name: own[name] for name in ("fps", "domain", "licence") if isinstance(own.get(name), str | int | float)
        }
        controls = own["controls"] if isinstance(own.get("controls"), dict) else {}
        for name, place in self.controls.items():
            values = self._control(parts, place, read, document)
            if values is not None:
                controls = {**controls, name: values}
            elif self.missing_controls == "skip":
                raise DecodeError(f"its control {name!r} ({place}) is missing")
        return {
            **told,
            "caption": self._caption(parts, read, document),
            "attributes": own["attributes"] if isinstance(own.get("attributes"), dict) else {},
            "controls": controls,
        }

    def _caption(
        self, parts: Collection[str], read: Callable[[str], bytes], document: Callable[[str], dict[str, Any]]
    ) -> str:
        """The first caption that is there; empty if there is none."""
        for place in self.caption:
            extension, colon, path = place.partition(":")
            member = _pick(parts, (extension,), "captions", "members.caption")
            if member is None:
                continue
            if colon or member.rpartition(".")[2] == "json":
                holder = document(member)
                found = _field(holder, path) if colon else next(filter(None, map(holder.get, CAPTION_FIELDS)), None)
                text = clean_caption(found)
            else:
                text = clean_caption(decode_text(_bounded(read(member), member), "its caption"))
            if text:
                return text
        return ""

    def _control(
        self,
        parts: Collection[str],
        place: str,
        read: Callable[[str], bytes],
        document: Callable[[str], dict[str, Any]],
    ) -> Any:
        extension, colon, path = place.partition(":")
        member = _pick(parts, (extension,), "controls", "members.controls")
        if member is None:
            return None
        if colon:
            return plain(_field(document(member), path))
        return plain(load_npy(_bounded(read(member), member), member))


def parse_members(document: Any, where: str) -> Members:
    """``members:`` of a card.

    Raises:
        UserError: an unknown key or a value that cannot be; ``where`` is the card.
    """
    if not isinstance(document, Mapping):
        raise UserError(f"{where}: members={document!r}: give keys with values, such as `video: mp4`")
    known = Members.__dataclass_fields__
    values: dict[str, Any] = dict(document)
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown key members.{key}; known keys: {', '.join(known)}")
        choices = {"missing_controls": MISSING, "key_ends_at": DOTS}.get(key)
        if choices and value not in choices:
            raise UserError(f"{where}: members.{key}={value!r}: give {' or '.join(map(repr, choices))}")
        if key == "controls" and not (isinstance(value, dict) and _is_texts([*value, *value.values()])):
            raise UserError(f"{where}: members.controls={value!r}: give names with members, such as `actions: npy`")
        if key in ("video", "caption"):
            values[key] = tuple(value) if isinstance(value, list | tuple) else (value,)
            if not values[key] or not _is_texts(values[key]):
                raise UserError(
                    f"{where}: members.{key}={value!r}: give an extension, such as `mp4`, or a list of them"
                )
            values[key] = tuple(_lowered(place) for place in values[key])
    for key in ("video", "caption", "controls"):
        places = values.get(key, ())
        for place in places.values() if isinstance(places, Mapping) else places:
            if f".{_lowered(place)}".endswith(PICKLES):
                raise UserError(f"{where}: members.{key} names {place!r}: a pickle is never read, for it may run code")
    values["controls"] = {name: _lowered(place) for name, place in values.get("controls", {}).items()}
    return Members(**values)


def _is_texts(values: Any) -> bool:
    return all(isinstance(text, str) and text.strip(" .:") for text in values)


def _lowered(place: str) -> str:
    """A member's name as it is compared: in lower case and without a first dot; a field's name stays as it is."""
    extension, colon, path = place.partition(":")
    return extension.strip().lstrip(".").lower() + colon + path.strip()


def _pick(parts: Collection[str], names: Collection[str], what: str, field_of_card: str) -> str | None:
    """The first of the names that a sample has, exactly or behind a dot."""
    for name in names:
        if name in parts:
            return name
    for name in names:
        found = sorted(part for part in parts if part.endswith(f".{name}"))
        if len(found) > 1:
            raise DecodeError(
                f"{len(found)} {what} ({', '.join(found)[:100]}): name one in a card's {field_of_card}, or set "
                "members.key_ends_at: last dot where keys have dots"
            )
        if found:
            return found[0]
    return None


def _bounded(data: bytes, member: str) -> bytes:
    if len(data) > MAX_MEMBER:
        raise DecodeError(f"its {member} member has {len(data)} bytes, more than {MAX_MEMBER}")
    return data


def _object(data: bytes, member: str) -> dict[str, Any]:
    found = parse_json(data, f"its {member} member")
    if not isinstance(found, dict):
        raise DecodeError(f"its {member} member holds no JSON object")
    return found


def _field(document: Mapping[str, Any], path: str) -> Any:
    """A field by its name, or through nested objects by names with dots between; None if it is not there."""
    if path in document:
        return document[path]
    found: Any = document
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def load_npy(data: bytes, member: str) -> np.ndarray:
    """An array of numbers; never a pickle, and never more memory than the bytes that came.

    Raises:
        DecodeError: it is no such array.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, kind = read_header(file)
        if kind.hasobject or kind.kind not in "biuf":
            raise ValueError(f"it holds {kind}, not numbers")
        count = int(np.prod(shape, dtype=object)) if shape else 1
        values = np.frombuffer(data, kind, count, file.tell())
        return values.reshape(shape, order="F" if by_columns else "C")
    except (ValueError, TypeError, OverflowError, SyntaxError, RecursionError, EOFError, tokenize.TokenError) as error:
        raise DecodeError(f"its {member} member is no npy of numbers ({str(error)[:80]})") from error
