"""Hugging Face data sets whose tables hold the videos: data/SPLIT-*.parquet with a column of {bytes, path} or of bytes.

Folders of plain videos, of WebDataset tars and the like are read by those formats; the cache's own layout
(``datasets--OWNER--NAME/snapshots/REVISION``) is followed for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.formats.folder import split_of
from anyflow.data.importing.recording import Found, ParquetCell, Recording, Track, Unusable
from anyflow.data.importing.walk import walk
from anyflow.data.safety import read_text
from anyflow.data.tables import CAPTION_COLUMNS, pick

LOOKS_FOR = "parquet tables with a column 'video' (or 'mp4') of bytes"
DOMAIN = "video"
CONTROLS: Mapping[str, Control | str] = {}

VIDEO_COLUMNS = ("video", "mp4", "video_bytes")
SPLIT = re.compile(r"^(?P<split>[A-Za-z]+)(?:[-_]\d+(?:-of-\d+)?)?$")
"""A table's name: ``train-00000-of-00003``, ``test_0``, ``validation``."""


def detect(folder: Path) -> bool:
    """Whether the first table has a column of videos."""
    tables = _tables(folder)
    try:
        return bool(tables) and _video_column(tables[0]) is not None
    except DecodeError:
        return False


def recordings(folder: Path) -> Iterator[Found]:
    """Every row."""
    for path in _tables(folder):
        place = path.relative_to(folder).with_suffix("").as_posix()
        try:
            yield from _rows(path, place, _split_of(path.relative_to(folder)))
        except DecodeError as error:
            yield Unusable(place, str(error))


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """None: such tables have no controls that are known."""
    return {}


def _tables(folder: Path) -> list[Path]:
    return sorted(met.path for met in walk(folder) if not met.left and met.path.suffix.lower() == ".parquet")


def _video_column(path: Path) -> str | None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError) as error:
        raise DecodeError(f"{path.name} is no parquet table ({str(error)[:80]})") from error
    for name in VIDEO_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if arrow.types.is_struct(kind) or arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
                return name
    return None


def _split_of(table: Path) -> str | None:
    """The split that a table's name tells, else its folders: the hub's own copies are ``CONFIG/SPLIT/0000.parquet``."""
    match = SPLIT.match(table.stem)
    return (split_of(Path(match["split"], "x")) if match else None) or split_of(table)


def _rows(path: Path, place: str, split: str | None) -> Iterator[Found]:
    import pyarrow.parquet as parquet

    video = _video_column(path)
    if video is None:
        raise DecodeError(f"{path.name} has no column of videos: one of {', '.join(VIDEO_COLUMNS)}")
    with parquet.ParquetFile(path) as file:
        others = [name for name in file.schema_arrow.names if name != video]
        number = 0
        for group in range(file.num_row_groups):
            try:
                rows = file.read_row_group(group, others).to_pylist()
            except (OSError, ValueError, LookupError) as error:
                raise DecodeError(f"row group {group} of {path.name} cannot be read ({str(error)[:80]})") from error
            for row, values in enumerate(rows):
                name = f"{place}/{number:06d}"
                yield _recording(name, ParquetCell(str(path), group, row, video), values, split)
                number += 1


def _recording(name: str, cell: ParquetCell, values: Mapping[str, Any], split: str | None) -> Recording:
    column = pick(values, CAPTION_COLUMNS)
    return Recording(
        name=name,
        group=name,
        footage=cell,
        caption=None if column is None else values[column],
        split=split,
        fields={
            key: value
            for key, value in values.items()
            if key != column and isinstance(value, str | int | float) and len(str(value)) <= 200
        },
    )


def licence_of(folder: Path) -> str:
    """The licence that a data set's README.md states in its front matter; empty if it does not."""
    try:
        text = read_text(folder / "README.md", 2**20)
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (DecodeError, yaml.YAMLError, IndexError, RecursionError):
        return ""
    licence = front.get("license") if isinstance(front, dict) else None
    return licence[:200] if isinstance(licence, str) else ""
