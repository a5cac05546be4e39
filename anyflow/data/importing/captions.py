"""Captions for recordings: a file's, a template's, the source's own, or the data set's default, in this order."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anyflow.data.decode import DecodeError
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import Found, LeftOut, Recording, Unread, Unusable, VideoFile
from anyflow.data.importing.walk import stem_of
from anyflow.data.safety import clean_captions, within
from anyflow.data.tables import CAPTION_COLUMNS, FILE_COLUMNS, TABLES, pick, read_rows, require_utf8
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
        paths: the rows that name a file with its folder: each is of that one alone.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Sequence[Any]],
        bare: Sequence[int] = (),
        paths: Container[str] = (),
    ) -> None:
        self.name, self.rows, self.bare, self.paths = name, rows, bare, paths

    def matched(self, found: Iterable[Found]) -> dict[str, str]:
        """Recording -> its row: one of its whole name, with a video's suffix or without; else of its last part.

        A row that is some recording's whole name stands for no other, nor does one that is a path.
        """
        names = {item.name: _called(item) for item in found if not isinstance(item, Unread)}
        whole = _Rows(self.rows)
        exact = {name: row for name, called in names.items() if (row := whole.of(called)) is not None}
        taken = set(exact.values())
        last = _Rows(row for row in self.rows if row not in taken and row not in self.paths)
        for name, called in names.items():
            row = exact.get(name) or last.of([call.rpartition("/")[2] for call in called])
            if row is not None:
                exact[name] = row
        return exact

    def notes(self, found: Iterable[Found]) -> Iterator[str]:
        """What is to be told of it: rows that name no recording, rows that name several, rows without a caption."""
        uses = Counter(self.matched(found).values())
        yield from self.idle(uses)
        yield from self._note([row for row in self.rows if uses[row] > 1], "that stand for several recordings each")
        yield from self._note([f"line {number}" for number in self.bare], "without a caption")

    def idle(self, used: Container[str]) -> Iterator[str]:
        """The rows that name no recording, in words."""
        yield from self._note([row for row in self.rows if row not in used], "that name no recording")

    def _note(self, rows: Sequence[str], what: str) -> Iterator[str]:
        if rows:
            more = ", ..." if len(rows) > NAMED else ""
            yield f"--captions {self.name}: rows {what}: {len(rows)} ({', '.join(rows[:NAMED])}{more})"


class _Rows:
    """Rows by what they call their recordings: as they stand there before any other spelling of them.

    An accent is one character or two: disks and tables differ in that.
    """

    def __init__(self, rows: Iterable[str]) -> None:
        self._rows: dict[str, str] = {}
        self._stems: dict[str, str] = {}
        listed = list(rows)
        for spelt in (str, _composed):
            for row in listed:
                self._rows.setdefault(spelt(row), row)
                self._stems.setdefault(spelt(stem_of(row)), row)

    def of(self, called: Sequence[str]) -> str | None:
        """The row of a recording, by what it may be called."""
        for rows in (self._rows, self._stems):
            for name in called:
                row = rows.get(name) or rows.get(_composed(name))
                if row is not None:
                    return row
        return None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _called(item: Recording | Unusable | LeftOut) -> list[str]:
    """What a row may call a recording: its file's name before its own, where it is one file."""
    footage = item.footage
    suffix = Path(footage.path).suffix if isinstance(footage, VideoFile) and footage.size is None else ""
    return [f"{item.name}{suffix}", item.name] if suffix and not item.name.endswith(suffix) else [item.name]


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

    def apply(self, found: Sequence[Found]) -> Iterator[Found]:
        """Give each recording its captions; one that has none and no default, or a bad one, becomes unusable."""
        names = self.template_fields
        rows = self.file.matched(found) if self.file is not None else {}
        for recording in found:
            if not isinstance(recording, Recording):
                yield recording
                continue
            try:
                captions = clean_captions(self._captions(recording, names, rows))
            except DecodeError as error:
                yield Unusable(recording.name, str(error))
                continue
            if not captions and self.default is None:
                yield Unusable(recording.name, f"no caption{self._no_row(recording, rows)}")
            else:
                yield replace(recording, caption=captions if len(captions) > 1 else "".join(captions))

    def _no_row(self, recording: Recording, rows: Mapping[str, str]) -> str:
        return f", nor a row of {self.file.name}" if self.file is not None and recording.name not in rows else ""

    def why(self, found: Sequence[Found]) -> str:
        """Rows of the file that name no recording, in words: the captions that others lack may be theirs."""
        return "".join(self.file.idle(set(self.file.matched(found).values()))) if self.file is not None else ""

    def _captions(self, recording: Recording, names: list[str], rows: Mapping[str, str]) -> Any:
        """A text, or several, not clean yet."""
        if self.file is not None and recording.name in rows:
            return self.file.rows[rows[recording.name]]
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
    paths: set[str] = set()
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
            require_utf8(given, f"{path.name}:{number}")
            name = _name_in(source, str(row[file]))
            rows.setdefault(name, []).extend(given)
            if "/" in str(row[file]):
                paths.add(name)
    except DecodeError as error:
        known = "" if path.suffix.lower() in TABLES else f"; give a table: {', '.join(TABLES)}"
        raise UserError(f"--captions {str(path)!r}: {error}{known}") from error
    if not rows:
        raise UserError(
            f"--captions {str(path)!r} has no row with a caption (its columns: {columns or 'none'}): give a .csv, "
            f".jsonl, .json or .parquet table with the columns {FILE_COLUMNS[0]} and {CAPTION_COLUMNS[0]}"
        )
    return CaptionFile(path.name, rows, bare, paths)


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
