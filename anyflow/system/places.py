"""Where a path leads: home folders that no shell has expanded, and the files that ship with the project."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

_SOURCES = Path(__file__).resolve().parents[2]
PROJECT = _SOURCES if (_SOURCES / "recipes").is_dir() else Path(sys.prefix) / "share" / "anyflow"
"""Where recipes, cards, starter clips, embedded models and experiments lie: the project's folder, or an install's."""

_AT_HOME = re.compile(r"(sqlite:///|file://)?(~[^/]*(?:/.*)?)", re.DOTALL)


def expand_home(place: str) -> str:
    """A path, or a database's address, with ``~`` and ``~name`` at its beginning as the home folder that they mean."""
    found = _AT_HOME.fullmatch(place)
    return place if found is None else (found[1] or "") + os.path.expanduser(found[2])


def find_shipped(place: str) -> str:
    """A path with its home folder; one that begins with ``data/`` and is not here is that of the project."""
    place = expand_home(place)
    relative = Path(place)
    is_shipped = relative.parts[:1] == ("data",) and not relative.exists() and (PROJECT / relative).exists()
    return str(PROJECT / relative) if is_shipped else place


def folders_of(name: str) -> list[Path]:
    """The folders of a name (``recipes``) to look in, one after the other: the working folder's and the project's."""
    here, shipped = Path(name), PROJECT / name
    places = [here] if here.is_dir() else []
    if shipped.is_dir() and not (places and here.samefile(shipped)):
        places.append(shipped)
    return places


def expand_word(word: str) -> str:
    """A word of the command line, expanded where a path may begin: at its beginning and behind the ``=`` of an option.

    The shell does it for a bare word alone, not in ``--out=~/x`` and ``run.out=~/x``.
    """
    option, equals, value = word.partition("=")
    if equals and re.fullmatch(r"--?[\w-]+|[\w.]+", option):
        return f"{option}={expand_home(value)}"
    return expand_home(word)
