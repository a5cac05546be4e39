"""Putting controls into the file of a card that somebody wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from anyflow.data import remote
from anyflow.data.card import DatasetCard, plain_controls
from anyflow.data.controls import Control
from anyflow.data.safety import lines_of
from anyflow.errors import UserError
from anyflow.system.files import write_atomically
from anyflow.system.typed import parse_yaml, to_yaml


def write_controls(card: DatasetCard, controls: Mapping[str, Control | str]) -> None:
    """Put controls into a card's file in place of its own; all else in it stays as it is, comments too.

    Raises:
        UserError: there is no such file here, or its controls stand in it in a way that is not understood.
    """
    if card.path == Path() or remote.url_of(card.path.parent) is not None:
        raise UserError(
            f"card {card.name!r} has no file on this machine: write or copy one, with its splits' addresses"
        )
    text = card.path.read_text(encoding="utf-8")
    lines = lines_of(text)
    begin = next((place for place, line in enumerate(lines) if line.startswith("controls:")), len(lines))
    end = next((n for n in range(begin + 1, len(lines)) if lines[n] and lines[n][0] not in " \t#"), len(lines))
    while end > begin + 1 and lines[end - 1][:1] in ("", "#"):  # of what follows
        end -= 1
    block = to_yaml({"controls": plain_controls(controls)})
    written = "\n".join([*lines[:begin], block.rstrip("\n"), *lines[end:], ""])
    try:
        same = {**parse_yaml(text), "controls": None} == {**parse_yaml(written), "controls": None}
    except ValueError:
        same = False
    if not same:
        raise UserError(f"card {str(card.path)!r}: its controls cannot be told from the rest: put in by hand {block!r}")
    write_atomically(card.path, written)
