"""Captions for recordings: a file's, a template's, the source's own, or the data set's default, in this order."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anyflow.data.decode import DecodeError
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import Found, Recording, Unread, Unusable
from anyflow.data.importing.walk import stem_of
from anyflow.data.safety import clean_captions, within
from anyflow.data.tables import CAPTION_COLUMNS, FILE_COLUMNS, pick, read_rows
from anyflow.errors import UserError

DEFAULTS = {
    "driving": "Footage of a drive, from a camera on the car.",
    "robotics": "A robot arm at work.",
    "games": "Footage of a video game.",
}
"""What ``--default-caption domain`` stands for."""
READ_TOKENS = 512
"""What Wan's text encoder reads of a caption; a word is one token at least."""
NAMED = 5


class CaptionFile:
    """Captions by the names of recordings, as a file gives them.

    Args:
        name: of the file.
        rows: what a row calls its recording -> its captions, as they stand there.
        bare: numbers of the lines that have no caption.
    """

    def __init__(self, name: str, rows: Mapping[str, Sequence[Any]], bare: Sequence[int] = ()) -> None:
        self.name, self.rows, self.bare = name, rows, bare
        self._by_stem = {stem_of(row): row for row in reversed(list(rows))}

    def row_of(self, recording: str) -> str | None:
        """The row of a recording: by its whole name, else by its last part, with a video's suffix or without."""
        for name in (recording, Path(recording).name):
            row = name if name in self.rows else self._by_stem.get(name)
            if row is not None:
                return row
        return None

    def notes(self, found: Iterable[Found]) -> Iterator[str]:
        """What is to be told of it: rows that name no recording, rows that name several, rows without a caption."""
        uses = dict.fromkeys(self.rows, 0)
        for item in found:
            row = None if isinstance(item, Unread) else self.row_of(item.name)
            if row is not None:
                uses[row] += 1
        for rows, what in (
            ([row for row, count in uses.items() if count == 0], "that name no recording"),
            ([row for row, count in uses.items() if count > 1], "that stand for several recordings each"),
            ([f"line {number}" for number in self.bare], "without a caption"),
        ):
            if rows:
                more = ", ..." if len(rows) > NAMED else ""
                yield f"--captions {self.name}: rows {what}: {len(rows)} ({', '.join(rows[:NAMED])}{more})"


@dataclass(frozen=True)
class Captions:
    """Where captions come from.

    Attributes:
        template: a text with fields in braces, such as "{weather} day, {camera} camera"; None takes the source's.
        file: wins over all else.
        default: stands in for a missing one; None refuses recordings without.
    """

    template: str | None = None
    file: CaptionFile | None = None
    default: str | None = None

    @property
    def template_fields(self) -> list[str]:
        """The names in the template's braces.

        Raises:
            UserError: the template is malformed, or asks for more than a field's value.
        """
        try:
            parsed = list(string.Formatter().parse(self.template or ""))
        except ValueError as error:
            raise UserError(f"--caption {self.template!r}: {error}; write fields as {{task}}") from error
        names = [name for _, name, _, _ in parsed if name is not None]
        for name in names:
            if not name.replace("-", "_").isidentifier():
                raise UserError(f"--caption {self.template!r}: {{{name}}} is no field's name; write fields as {{task}}")
        return names

    def apply(self, found: Iterable[Found]) -> Iterator[Found]:
        """Give each recording its captions; one that has none and no default, or a bad one, becomes unusable."""
        names = self.template_fields
        for recording in found:
            if not isinstance(recording, Recording):
                yield recording
                continue
            try:
                captions = clean_captions(self._captions(recording, names))
            except DecodeError as error:
                yield Unusable(recording.name, str(error))
                continue
            if not captions and self.default is None:
                yield Unusable(recording.name, "no caption")
            else:
                yield replace(recording, caption=captions if len(captions) > 1 else "".join(captions))

    def _captions(self, recording: Recording, names: list[str]) -> Any:
        """A text, or several, not clean yet."""
        row = self.file.row_of(recording.name) if self.file is not None else None
        if self.file is not None and row is not None:
            return self.file.rows[row]
        own = recording.caption
        if self.template is None:
            return own
        if isinstance(own, list | tuple) and "caption" in names:
            return [self._formatted(recording, text, names) for text in own]
        return self._formatted(recording, own, names)

    def _formatted(self, recording: Recording, caption: Any, names: list[str]) -> str | None:
        """The template with a recording's fields; None where one is missing and there is a default."""
        values = {"camera": recording.camera, "caption": caption, **recording.fields}
        for name in names:
            if values.get(name) in (None, ""):
                if self.default is not None:
                    return None
                known = ", ".join(sorted(key for key, value in values.items() if value not in (None, "")))
                raise DecodeError(f"no field {name!r} for its caption (it has {known or 'none'})")
        return string.Formatter().vformat(self.template or "", (), values)


def captions_of(options: ImportOptions, source: Path) -> Captions:
    """Where an import's captions come from.

    Raises:
        UserError: the file cannot be read, or the template is malformed.
    """
    file = read_captions(options.captions, source) if options.captions is not None else None
    captions = Captions(options.caption, file, options.default_caption)
    captions.template_fields  # noqa: B018  # a malformed template is refused before anything is read
    return captions


def read_captions(path: Path, source: Path) -> CaptionFile:
    """A captions file: a table with a column for the recording and one for the caption; rows of one name are several.

    Raises:
        UserError: it cannot be read, or names nothing.
    """
    rows: dict[str, list[Any]] = {}
    bare: list[int] = []
    columns = ""
    try:
        for number, row in read_rows(path):
            if isinstance(row, DecodeError):
                raise row
            file, caption = pick(row, FILE_COLUMNS), pick(row, CAPTION_COLUMNS)
            columns = columns or ", ".join(map(str, row))[:200]
            if file is None:
                raise DecodeError(f"{path.name}:{number} has no {FILE_COLUMNS[0]} (its columns: {columns})")
            if caption is None:
                bare.append(number)
                continue
            given = row[caption] if isinstance(row[caption], list | tuple) else [row[caption]]
            rows.setdefault(_name_in(source, str(row[file])), []).extend(given)
    except DecodeError as error:
        raise UserError(f"--captions {str(path)!r}: {error}") from error
    if not rows:
        raise UserError(
            f"--captions {str(path)!r} has no row with a caption (its columns: {columns or 'none'}): give a .csv, "
            f".jsonl, .json or .parquet table with the columns {FILE_COLUMNS[0]} and {CAPTION_COLUMNS[0]}"
        )
    return CaptionFile(path.name, rows, bare)


def _name_in(source: Path, name: str) -> str:
    """What a row calls its recording, seen from the source's folder where it is a path into it."""
    try:
        return within(source, source, name).relative_to(source).as_posix()
    except DecodeError:
        return name


def notes_on(found: Iterable[Found], recordings: Iterable[Recording]) -> Iterator[str]:
    """What is to be told of captions, as they were found and as recordings have them: lines joined, one of several
    chosen, more words than are read.
    """
    own = (item.caption for item in found if isinstance(item, Recording))
    joined = sum(isinstance(caption, str) and "\n" in caption.strip() for caption in own)
    if joined:
        yield f"texts of several lines, each taken as one caption (a list in JSON is several): {joined}"
    several = long = 0
    for recording in recordings:
        texts = [recording.caption or ""] if isinstance(recording.caption, str | None) else recording.caption
        several += len(texts) > 1
        long += any(len(text.split()) >= READ_TOKENS for text in texts)
    if several:
        yield f"recordings with several captions, of which each clip takes one by --seed: {several}"
    if long:
        yield f"recordings with captions of {READ_TOKENS} words or more, of which Wan reads the beginning: {long}"
