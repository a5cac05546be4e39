"""Reading what strangers wrote: paths that stay inside, texts and JSON within bounds, nothing that runs code."""

from __future__ import annotations

import codecs
import json
import math
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from anyflow.data.decode import DecodeError

MAX_CAPTION = 4000
"""Characters; a text encoder reads some 500 words."""
MAX_TEXT_BYTES = 64 * 2**20
"""Of one description file; tables of a whole data set may be larger."""
MAX_TABLE_BYTES = 8 * 2**30
PICKLES = (".pickle", ".pkl", ".pt", ".pth", ".joblib")

_DEMUXED = """
mp4 mov mkv webm avi m4v gif ts mts m2ts m2t mpg mpeg mpe mpv m1v m2v m2p mp4v vob evo wmv asf flv f4v 3gp 3g2 ogv ogm
mxf mj2 dv dif nut y4m ivf obu h261 h263 h264 264 avc h26l hevc h265 265 vvc h266 266 mjpeg mjpg qt divx xvid rm rmvb
wtv gxf mk3d nsv nuv apng smk bik roq fli flc flic ismv isma psp dav amv trp tp tod
"""
VIDEO_SUFFIXES = tuple(f".{name}" for name in _DEMUXED.split())
"""What names of videos end in: the containers and streams that FFmpeg demuxes, usual ones first."""


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, for a name that a data set's own files give.

    Raises:
        DecodeError: the name is empty, absolute, leads out of the folder, or is no path at all.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if (
        not name
        or "\0" in name
        or path.is_absolute()
        or ".." in path.parts
        or (path.parts and ":" in path.parts[0][1:2])
    ):
        raise DecodeError(f"the path {name[:200]!r} leads out of the data set")
    return folder / path


def within(folder: Path, home: Path, name: str) -> Path:
    """The file that a table in ``home`` names: anywhere in ``folder``, the data set, also by ``..`` or in full.

    Raises:
        DecodeError: the name leads out of the data set.
    """
    name = name.strip(" \t\r\n")
    try:
        return inside(home, name)
    except DecodeError:
        given = name.replace("\\", "/")
        if not name or "\0" in name or given[1:2] == ":":
            raise
        for base in (folder.absolute(), folder.resolve()):
            relative = os.path.relpath(os.path.normpath(base / home.relative_to(folder) / given), base)
            if relative != "." and not relative.startswith(".."):
                return folder / relative
        raise


def is_safe_name(name: str) -> bool:
    """Whether a tar member's name stays inside the folder that it would be unpacked in."""
    try:
        inside(Path(), name)
    except DecodeError:
        return False
    return True


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """A text file.

    Raises:
        DecodeError: it is missing, too large or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise DecodeError(f"{path.name} cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise DecodeError(f"{path.name} is larger than {limit} bytes")
    return decode_text(data, path.name)


_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def encoding_of(head: bytes, name: str) -> str:
    """The encoding of a text by its first bytes: that of its byte order mark, else UTF-8.

    Raises:
        DecodeError: it is UTF-16 without such a mark.
    """
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    zeros = max(head[0::2].count(0), head[1::2].count(0))
    if len(head) >= 4 and 5 * zeros >= len(head):  # of plain text every other byte is zero then
        raise DecodeError(f"{name} is not UTF-8 but UTF-16 without a byte order mark: save it as UTF-8")
    return "utf-8-sig"


def decode_text(data: bytes, name: str) -> str:
    """A text's characters; ``name`` is said of it where it is wrong.

    Raises:
        DecodeError: it is neither UTF-8 nor UTF-16 or UTF-32 with a byte order mark.
    """
    encoding = encoding_of(data[:4096], name)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise DecodeError(f"{name} is not UTF-8, and not the {encoding.upper()} that it begins as") from error
        byte = error.object[error.start]
        raise DecodeError(
            f"{name} is not UTF-8 (byte {error.start} is {byte:#04x}; Latin-1 or Windows-1252?): save it as UTF-8"
        ) from error


def lines_of(text: str) -> list[str]:
    """A text's lines, which end at newlines alone: other characters that Python takes for line ends belong to them."""
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def parse_json(text: str | bytes, name: str) -> Any:
    """A JSON document.

    Raises:
        DecodeError: it is malformed.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"{name} is not JSON ({str(error)[:80]})") from error


def read_json(path: Path, limit: int = MAX_TEXT_BYTES) -> Any:
    """A JSON file; see :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, limit), path.name)


def read_json_object(path: Path, limit: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        DecodeError: it cannot be read, or holds something else.
    """
    document = read_json(path, limit)
    if not isinstance(document, dict):
        raise DecodeError(f"{path.name} holds no JSON object")
    return document


def clean_captions(given: Any) -> tuple[str, ...]:
    """The captions of a text or of a list of texts, each once and in one line, without empty ones.

    Raises:
        DecodeError: one is no text, too long, or not Unicode.
    """
    texts = given if isinstance(given, list | tuple) else [given]
    return tuple(dict.fromkeys(filter(None, map(clean_caption, texts))))


def clean_caption(text: Any) -> str:
    """A caption in one line; empty if there is none.

    Raises:
        DecodeError: it is no text, too long, or not Unicode.
    """
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DecodeError("its caption is no text")
    if len(text) > MAX_CAPTION:
        raise DecodeError(f"its caption has {len(text)} characters, more than {MAX_CAPTION}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DecodeError("its caption is not UTF-8") from error
    return " ".join(text.replace("\0", " ").split())


def plain(value: Any, depth: int = 8) -> Any:
    """A value as JSON can hold it, the same on every machine: floats to 6 digits, NaN and infinity as null.

    Raises:
        DecodeError: it is no such value, or nested too deeply.
    """
    if depth == 0:
        raise DecodeError("a value is nested too deeply")
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", errors="replace").decode()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth - 1) for item in value]
    raise DecodeError(f"a value is of type {type(value).__name__}, which JSON cannot hold")


def find_pickles(folder: Path, most: int = 1000) -> list[str]:
    """Names of files that would run code if they were loaded; they are never opened."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICKLES)
    return [path.relative_to(folder).as_posix() for path, _ in zip(found, range(most), strict=False)]
