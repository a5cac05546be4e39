"""Tables that strangers wrote, row by row: .csv, .tsv, .jsonl, .json, .parquet. A bad row is told, the rest is read."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from anyflow.data.decode import DecodeError
from anyflow.data.safety import MAX_TABLE_BYTES, MAX_TEXT_BYTES, encoding_of, parse_json, read_json

Row = dict[str, Any] | DecodeError

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Kinds that :func:`read_rows` reads."""
FILE_COLUMNS = (
    *("file_name", "file", "filename", "video", "video_path", "path", "name", "key"),
    *(
        "file_path",
        "filepath",
        "video_name",
        "video_file",
        "video_id",
        "videoid",
        "clip",
        "clip_name",
        "clip_path",
        "id",
    ),
)
CAPTION_COLUMNS = (
    *("caption", "text", "prompt", "description"),
    *("captions", "texts", "prompts", "descriptions", "sentence", "sentences"),
)
MOST_TAKEN_BACK = 1000
"""Lines that an open quotation mark may swallow and that are read again, each as a row of its own."""


def pick(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """The first of some columns that a row has a value in, as the row spells it, in any case, with blanks or dashes."""
    spelt: dict[str, str] = {}
    for name, value in row.items():
        if value not in (None, "", []):
            spelt.setdefault("_".join(str(name).lower().replace("-", " ").split()), name)
    return next((spelt[column] for column in columns if column in spelt), None)


def require_utf8(captions: Any, place: str) -> None:
    """Refuse captions that were read from bytes of another encoding; ``place`` is their table and line.

    Raises:
        DecodeError: one is not UTF-8.
    """
    for text in captions if isinstance(captions, list | tuple) else [captions]:
        try:
            str(text).encode()
        except UnicodeEncodeError as error:
            raise DecodeError(
                f"{place} is not UTF-8 in its caption (Latin-1 or Windows-1252?): save the table as UTF-8"
            ) from error


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a table with the number of their line or row, or why a row cannot be read.

    A ``.json`` holds a list of objects, or an object of them whose names become the column ``file_name``; a text, or a
    list, in the place of an object is its caption. Any other suffix is read as JSON lines.

    Raises:
        DecodeError: the file as a whole cannot be read.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        yield from enumerate(_json_rows(read_json(path, MAX_TABLE_BYTES), path.name), start=1)
        return
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path)
            return
        is_csv = kind in (".csv", ".tsv")
        with path.open("rb") as bytes_:
            encoding = encoding_of(bytes_.read(4096), path.name)
        with path.open(encoding=encoding, errors="surrogateescape", newline="" if is_csv else "\n") as file:
            yield from _csv_rows(file, path.name) if is_csv else _line_rows(file, path.name)
    except UnicodeDecodeError as error:
        raise DecodeError(f"{path.name} is not UTF-8, and not the {encoding.upper()} that it begins as") from error
    except OSError as error:
        raise DecodeError(f"{path.name} cannot be read ({error.strerror or str(error)[:80]})") from error


def _json_rows(document: Any, name: str) -> Iterator[Row]:
    if isinstance(document, dict):
        named = {key: {"caption": value} if isinstance(value, str | list) else value for key, value in document.items()}
        document = [{"file_name": key, **value} if isinstance(value, dict) else value for key, value in named.items()]
    if not isinstance(document, list):
        raise DecodeError(f"{name} holds no list of objects")
    for number, row in enumerate(document, start=1):
        yield row if isinstance(row, dict) else DecodeError(f"{name}:{number} is no JSON object")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [field.name for field in file.schema_arrow if not arrow.types.is_binary(field.type)]
            rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (ValueError, LookupError, arrow.ArrowException) as error:
        raise DecodeError(f"{path.name} is no parquet table ({str(error)[:80]})") from error


def _line_rows(file: TextIO, name: str) -> Iterator[tuple[int, Row]]:
    """JSON lines; one that is longer than any description is passed over."""
    number = 0
    while line := file.readline(MAX_TEXT_BYTES):
        number += 1
        if len(line) == MAX_TEXT_BYTES and not line.endswith("\n"):
            while len(rest := file.readline(MAX_TEXT_BYTES)) == MAX_TEXT_BYTES and not rest.endswith("\n"):
                pass
            yield number, DecodeError(f"{name}:{number} has more than {MAX_TEXT_BYTES} characters")
        elif line.strip():
            yield number, _parsed(line, f"{name}:{number}")


def _parsed(line: str, place: str) -> Row:
    try:
        row = parse_json(line, place)
    except DecodeError as error:
        return error
    return row if isinstance(row, dict) else DecodeError(f"{place} is no JSON object")


class _Lines:
    """A file's lines for a reader that takes several for a row; those of the present row are remembered."""

    def __init__(self, file: Iterable[str]) -> None:
        self.row: list[str] = []
        self._file, self._before, self._again = iter(file), 0, list[str]()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.row.append(self._again.pop() if self._again else next(self._file))
        return self.row[-1]

    def begin(self) -> int:
        """The number of the line that a row begins at."""
        self._before += len(self.row)
        self.row = []
        return self._before + 1

    def take_back(self) -> None:
        """Let the lines after the row's first be rows of their own."""
        self._again += reversed(self.row[1:])
        del self.row[1:]


def _csv_rows(file: Iterable[str], name: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(MAX_TEXT_BYTES)  # a huge caption is refused by itself, not with the rest of its table
    lines, header, between = _Lines(file), list[str](), ","
    while True:
        number = lines.begin()
        try:
            if not header:
                line = next(lines)
                between = "," if "," in line else max(",;\t|", key=line.count)
                header = [cell.strip() for cell in next(csv.reader([line], delimiter=between), [])]
                continue
            cells = _cells(lines, between)
        except StopIteration:
            return
        except csv.Error as error:
            why = f"is malformed ({error})"
            if len(lines.row) > 1:
                why = f"opens a quotation mark that is not closed before line {number + len(lines.row)}"
                if len(lines.row) <= MOST_TAKEN_BACK:
                    lines.take_back()
            yield number, DecodeError(f"{name}:{number} {why}")
            continue
        if any(cell.strip() for cell in cells[len(header) :]):
            yield (
                number,
                DecodeError(
                    f"{name}:{number} has {len(cells)} cells under {len(header)} columns: put texts with a "
                    f"{'comma' if between == ',' else repr(between)} into quotation marks"
                ),
            )
        elif any(cell.strip() for cell in cells):
            row: dict[str, Any] = {}
            for column, cell in zip(header, cells, strict=False):
                if not row.get(column):  # of two columns of one name the first
                    row[column] = cell
            yield number, row


def _cells(lines: _Lines, between: str) -> list[str]:
    """The cells of the next row; a line that is one by itself is not read strictly.

    Raises:
        StopIteration: there is none. csv.Error: it cannot be told where the row ends.
    """
    try:
        return next(csv.reader(lines, delimiter=between, skipinitialspace=True, strict=True))
    except csv.Error:
        if len(lines.row) > 1:
            raise
        return next(csv.reader(lines.row, delimiter=between, skipinitialspace=True))
