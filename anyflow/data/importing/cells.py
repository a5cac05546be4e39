"""Files that lie in the cells of a parquet table: a video in one cell, or a recording's pictures in a row each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.decode import DecodeError
from anyflow.data.importing.recording import ParquetCell, ParquetImages
from anyflow.data.safety import inside
from anyflow.errors import first_line

BATCH = 32
"""Pictures that are in memory at once."""


def read_cell(cell: ParquetCell) -> bytes:
    """A file's bytes.

    Raises:
        DecodeError: they cannot be read.
    """
    try:
        value = _column(cell.path, cell.row_group, cell.column)[cell.row].as_py()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DecodeError(f"the table cannot be read ({first_line(error)})") from error
    return _bytes_of(value, Path(cell.path).parent)


def picture_times(images: ParquetImages) -> list[float]:
    """The seconds of a recording's pictures.

    Raises:
        DecodeError: the table cannot be read, or a time is missing.
    """
    times = _clock(images)[1]
    if not np.isfinite(times).all():
        raise DecodeError(f"the column {images.clock} has times that are missing")
    return [float(time) for time in times]


def picture_cells(images: ParquetImages) -> Iterator[bytes | DecodeError]:
    """A recording's pictures, each an image file's bytes or why it has none, in the order of :func:`picture_times`.

    Raises:
        DecodeError: while iterating, where the table cannot be read.
    """
    import pyarrow.parquet as parquet

    rows, _ = _clock(images)
    first = 0
    try:
        with parquet.ParquetFile(images.path) as file:
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                if ((rows >= first) & (rows < last)).any():
                    for batch in file.iter_batches(BATCH, [group], [images.column]):
                        wanted = rows[(rows >= first) & (rows < first + len(batch))] - first
                        for value in batch.column(0).take(wanted).to_pylist():
                            yield _bytes_or_why(value, Path(images.root))
                        first += len(batch)
                first = last
    except (OSError, ValueError, LookupError) as error:
        raise DecodeError(f"the table cannot be read ({first_line(error)})") from error


def _clock(images: ParquetImages) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the recording's rows, their seconds)."""
    import pyarrow.parquet as parquet

    name, value = images.where
    try:
        with parquet.ParquetFile(images.path) as file:
            table = file.read([name, images.clock])
            rows = np.flatnonzero(table.column(name).to_numpy() == value)
            return rows, table.column(images.clock).to_numpy()[rows].astype(np.float64)
    except (OSError, ValueError, LookupError) as error:
        raise DecodeError(f"the table cannot be read ({first_line(error)})") from error


@lru_cache(maxsize=1)
def _column(path: str, row_group: int, column: str) -> Any:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(row_group, [column]).column(column)


def _bytes_or_why(value: Any, home: Path) -> bytes | DecodeError:
    try:
        return _bytes_of(value, home)
    except DecodeError as error:
        return error


def _bytes_of(value: Any, home: Path) -> bytes:
    """The bytes of a cell: itself, its ``bytes``, or those of the file that its ``path`` names, seen from ``home``."""
    cell = value if isinstance(value, dict) else {"path": value} if isinstance(value, str) else {"bytes": value}
    data = cell.get("bytes")
    if data is None and isinstance(cell.get("path"), str):
        path = inside(home, cell["path"])
        try:
            return path.read_bytes()
        except OSError as error:
            raise DecodeError(f"{path.name} cannot be read ({error.strerror})") from error
    if not isinstance(data, bytes):
        raise DecodeError("the table's cell holds no bytes")
    return data
