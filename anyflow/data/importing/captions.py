"""Captions for recordings: a file's, a template's, the source's own, or the data set's default, in this order."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from anyflow.data.decode import DecodeError
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import Found, Recording, Unusable
from anyflow.data.safety import clean_caption, read_rows
from anyflow.errors import UserError

FILE_COLUMNS = ("file_name", "file", "filename", "video", "video_path", "path", "name", "key")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description")

DEFAULTS = {
    "driving": "Footage of a drive, from a camera on the car.",
    "robotics": "A robot arm at work.",
    "games": "Footage of a video game.",
}
"""What ``--default-caption domain`` stands for."""


@dataclass(frozen=True)
class Captions:
    """Where captions come from.

    Attributes:
        template: a text with fields in braces, such as "{weather} day, {camera} camera"; None takes the source's.
        named: recording's name (or its file's stem) -> caption; wins over all else.
        default: stands in for a missing one; None refuses recordings without.
    """

    template: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)
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
        """Give each recording its caption; one that has none and no default, or a bad one, becomes unusable."""
        names = self.template_fields
        for recording in found:
            if isinstance(recording, Unusable):
                yield recording
                continue
            try:
                caption = clean_caption(self._caption(recording, names))
            except DecodeError as error:
                yield Unusable(recording.name, str(error))
                continue
            if not caption and self.default is None:
                yield Unusable(recording.name, "no caption")
            else:
                yield replace(recording, caption=caption)

    def _caption(self, recording: Recording, names: list[str]) -> object:
        for name in (recording.name, Path(recording.name).name):
            if name in self.named:
                return self.named[name]
        if self.template is None:
            return recording.caption
        values = {"camera": recording.camera, "caption": recording.caption, **recording.fields}
        for name in names:
            if values.get(name) in (None, ""):
                if self.default is not None:
                    return None
                known = ", ".join(sorted(key for key, value in values.items() if value not in (None, "")))
                raise DecodeError(f"no field {name!r} for its caption (it has {known or 'none'})")
        return string.Formatter().vformat(self.template, (), values)


def captions_of(options: ImportOptions) -> Captions:
    """Where an import's captions come from.

    Raises:
        UserError: the file cannot be read, or the template is malformed.
    """
    named = read_captions(options.captions) if options.captions is not None else {}
    captions = Captions(options.caption, named, options.default_caption)
    captions.template_fields  # noqa: B018  # a malformed template is refused before anything is read
    return captions


def read_captions(path: Path) -> dict[str, str]:
    """A captions file (.csv, .jsonl or .json, with a column for the recording and one for the caption).

    Returns:
        {recording's name, without a video's suffix: caption}.

    Raises:
        UserError: it cannot be read, or names nothing.
    """
    named: dict[str, str] = {}
    try:
        for number, row in read_rows(path):
            if isinstance(row, DecodeError):
                raise row
            name = next((row[column] for column in FILE_COLUMNS if column in row), None)
            caption = next((row[column] for column in CAPTION_COLUMNS if column in row), None)
            if not isinstance(name, str) or caption is None:
                raise DecodeError(f"{path.name}:{number} needs a {FILE_COLUMNS[0]} and a {CAPTION_COLUMNS[0]}")
            named[str(Path(name).with_suffix("")) if "." in Path(name).name else name] = caption
    except DecodeError as error:
        raise UserError(f"--captions {str(path)!r}: {error}") from error
    if not named:
        raise UserError(f"--captions {str(path)!r} names no recording: give a .csv, .jsonl or .json table")
    return named
