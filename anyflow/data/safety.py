"""Reading what strangers wrote: paths that stay inside, texts and JSON within bounds, nothing that runs code."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
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

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


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
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodeError(f"{path.name} is not UTF-8 (byte {error.start})") from error


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


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | DecodeError]]:
    """The rows of a table with its row's number, or why a row cannot be read: .csv, .jsonl, or .json.

    A ``.json`` holds a list of objects, or an object of them whose names become the column ``file_name``; a text in
    the place of an object is its caption.

    Raises:
        DecodeError: the file as a whole cannot be read.
    """
    if path.suffix == ".json":
        yield from enumerate(_json_rows(read_json(path, MAX_TABLE_BYTES), path.name), start=1)
        return
    try:
        with path.open(
            encoding="utf-8-sig", errors="surrogateescape", newline="" if path.suffix == ".csv" else None
        ) as file:
            rows = _csv_rows(file, path.name) if path.suffix == ".csv" else _line_rows(file, path.name)
            yield from rows
    except OSError as error:
        raise DecodeError(f"{path.name} cannot be read ({error.strerror})") from error


def _json_rows(document: Any, name: str) -> Iterator[dict[str, Any] | DecodeError]:
    if isinstance(document, dict):
        named = {key: {"caption": value} if isinstance(value, str) else value for key, value in document.items()}
        document = [{"file_name": key, **value} if isinstance(value, dict) else value for key, value in named.items()]
    if not isinstance(document, list):
        raise DecodeError(f"{name} holds no list of objects")
    for number, row in enumerate(document, start=1):
        yield row if isinstance(row, dict) else DecodeError(f"{name}:{number} is no JSON object")


def _csv_rows(file: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, Any] | DecodeError]]:
    csv.field_size_limit(MAX_TEXT_BYTES)  # a huge caption is refused by itself, not with the rest of its table
    reader = csv.DictReader(file)
    number = 1
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, DecodeError(f"{name}:{number} is malformed ({error})")
            continue
        row.pop(None, None)  # type: ignore[call-overload]  # cells beyond the header's columns
        yield number, {key: value for key, value in row.items() if value not in (None, "")}


def _line_rows(file: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, Any] | DecodeError]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{name}:{number}")
            yield number, row if isinstance(row, dict) else DecodeError(f"{name}:{number} is no JSON object")
        except DecodeError as error:
            yield number, error


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
