"""Where a dataset card lies: a path, or a name in ``data/``."""

from __future__ import annotations

import difflib
from pathlib import Path

from anyflow.errors import UserError
from anyflow.system.places import find_shipped, folders_of


def find_card(name: str, where: str = "data.card=") -> Path:
    """The file of a dataset card: a file, its folder, or a name in ``data/``; else a UserError that tells ``where``."""
    given = Path(find_shipped(name))
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
