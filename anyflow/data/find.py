"""Where a dataset card lies: a path, or a name in ``data/``; and what names tars instead. Imports nothing heavy."""

from __future__ import annotations

import difflib
from pathlib import Path

from anyflow.data import remote
from anyflow.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
BETWEEN = "::"
"""Stands between the tars of a list, as in WebDataset's own addresses."""


def find_card(name: str, where: str = "data.card=") -> Path:
    """The file of a dataset card: a file, its folder, or a name in ``data/``; else a UserError that tells ``where``.

    Tars that come without a card stand for themselves.
    """
    given = Path(name)
    if is_tars(name):
        return given
    roots = (Path("data"), Path(__file__).resolve().parents[2] / "data")
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
    text = str(card)
    if any(part.rstrip("/}").endswith(SUFFIXES) for part in text.split(BETWEEN)):
        return True
    folder = Path(text)
    if remote.is_url(text) or not folder.is_dir() or _holds_ours(folder):
        return False
    return any(True for pattern in ("*.tar", "*/*.tar") for _ in folder.glob(pattern))


def _holds_ours(folder: Path) -> bool:
    """Whether a folder is a data set of our own: a card, or shards with their index."""
    return (folder / "card.yaml").is_file() or any(
        True for pattern in ("", "*/") for _ in folder.glob(f"{pattern}index.json")
    )
