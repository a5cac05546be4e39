"""Where a dataset card lies: a path, or a name in ``data/``; and what names tars instead. Imports nothing heavy."""

from __future__ import annotations

import difflib
from pathlib import Path

from anyflow.data import remote
from anyflow.errors import UserError
from anyflow.system.places import find_shipped, folders_of

SUFFIXES = (".tar", ".tar.gz", ".tgz")
BETWEEN = "::"
"""Stands between the tars of a list, as in WebDataset's own addresses."""


def find_card(name: str, where: str = "data.card=") -> Path:
    """The file of a dataset card: a file, its folder, or a name in ``data/``; else a UserError that tells ``where``.

    Tars that come without a card stand for themselves.
    """
    given = Path(find_shipped(name))
    if is_tars(given):
        return given
    roots = folders_of("data")
    for path in (given, given / "card.yaml", *(root / f"{name}.yaml" for root in roots)):
        if path.is_file():
            return path
    known = sorted({path.stem for root in roots for path in root.glob("*.yaml")})
    close = difflib.get_close_matches(given.stem, known, n=1, cutoff=0.5)
    hint = (
        f"did you mean {close[0]}?"
        if close
        else f"known are {', '.join(known)}"
        if known
        else "give the path of a card"
    )
    raise UserError(f"{where}{name!r} is neither a file nor a card in data/: {hint}")


def is_tars(card: str | Path) -> bool:
    """Whether ``data.card=`` names tars and not a card: by its ending, or as a folder here that holds some."""
    text, folder = str(card), Path(card)
    if names_tars(text):
        return True
    if remote.is_url(text) or not folder.is_dir() or (folder / "card.yaml").is_file():
        return False
    if "/" not in text and any((root / f"{text}.yaml").is_file() for root in folders_of("data")):
        return False  # a card's name
    if any(_is_our_index(path) for pattern in ("index.json", "*/index.json") for path in folder.glob(pattern)):
        return False
    patterns = [f"{where}*{suffix}" for suffix in SUFFIXES for where in ("", "*/")]
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def names_tars(text: str) -> bool:
    """Whether a path, a pattern or an address is one of tars by its ending."""
    return any(part.rstrip("/}").endswith(SUFFIXES) for part in text.split(BETWEEN))


def _is_our_index(path: Path) -> bool:
    """Whether an index is of shards of our own; WebDataset has one of the same name."""
    with path.open("rb") as file:
        return b'"shards"' in file.read(200)
