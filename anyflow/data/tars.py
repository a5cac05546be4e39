"""Tars of somebody else's, as a user names them: a path, a pattern, a list, a folder; here, on a server, in a bucket.

A set of them is stood for by a folder in the cache with a ``tars.json``, as a folder elsewhere is: cards and readers
deal with folders alone. :mod:`anyflow.data.tar_index` puts an index there that reads as one of our own shards'.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from anyflow.data import remote
from anyflow.data.find import BETWEEN, SUFFIXES
from anyflow.data.members import Members, parse_members
from anyflow.data.places import list_folder, stamp_of
from anyflow.errors import UserError, first_line
from anyflow.system.files import write_atomically
from anyflow.system.locks import locked

LOCK = ".lock"
MOST = 10**6
"""Tars of a set: a pattern that gives more is a slip of the hand."""
HELD_OUT = ("test", "val", "valid", "validation", "eval", "heldout")
"""A folder, or the first word of a file's name, that tells held-out tars."""
USUAL = Members()
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
LOOKED_FOR = 100
"""Tars at a set's end of which the last that is there is held out."""
LAST_CLIPS = 16
"""Clips of a single tar that are held out, at most; and at most a fifth of them."""


@dataclass(frozen=True)
class TarSet:
    """Tars that are read as one data set.

    Attributes:
        name: for people.
        tars: absolute paths and addresses, in order.
        members: what their members hold.
        part: of a single tar's clips, "train" are all but the last few and "heldout" these; empty: all of them.
    """

    name: str
    tars: tuple[str, ...]
    members: Members = USUAL
    part: str = ""

    def names(self) -> tuple[str, ...]:
        """Each tar's own name: its address without what all have in common, so that data may move elsewhere."""
        paths = [tuple(re.split(r"/+", address.partition("://")[2] or address)) for address in self.tars]
        shared = 0
        while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
            shared += 1
        return tuple("/".join(path[shared:]) for path in paths)


def expand(card: str | Sequence[str], home: str | Path = "") -> list[str]:
    """The tars that a text or a list names, as absolute paths and addresses; ``home`` is what they are relative to.

    Raises:
        UserError: a pattern is malformed, an address is refused, a folder holds no tar, or a tar is named twice.
    """
    from braceexpand import braceexpand

    texts = card.split(BETWEEN) if isinstance(card, str) else list(card)
    found: list[str] = []
    for text in texts:
        too_many = f"{text!r} names more than {MOST} tars: correct the numbers in its braces"
        if any(abs(int(last) - int(first)) >= MOST for first, last in _RANGE.findall(text)):  # else it takes minutes
            raise UserError(too_many)
        try:
            places = list(islice(braceexpand(text), MOST + 1))
        except ValueError as error:
            raise UserError(f"{text!r} is no pattern of tars: write for example set/{{000000..000099}}.tar") from error
        if len(places) > MOST:
            raise UserError(too_many)
        for place in places:
            found += _expand_place(place, home)
    twice = next((name for name, times in Counter(found).items() if times > 1), None)
    if twice is not None:
        raise UserError(f"the tar {twice!r} is named twice: name each once")
    return found


def _expand_place(place: str, home: str | Path) -> list[str]:
    if remote.is_url(place):
        remote.check_address(place)
    elif remote.is_url(home):
        place = remote.join(str(home), place)
    else:
        place = str((Path(home) / Path(place).expanduser()).absolute())
    parent, _, name = place.rpartition("/")
    if "*" in name:
        return _listed(parent, [name], place)
    if place.endswith(SUFFIXES) and not Path(place).is_dir():
        return [place]
    below = [] if remote.is_url(place) else sorted(str(path) for path in Path(place).glob("*/") if path.is_dir())
    return _listed(place, [f"*{suffix}" for suffix in SUFFIXES], place, below)


def _listed(folder: str, patterns: list[str], asked: str, below: Sequence[str] = ()) -> list[str]:
    """The tars of a folder, and of those below it."""
    try:
        found = [name for pattern in patterns for name in list_folder(folder, pattern)]
        found += [name for one in below for pattern in patterns for name in list_folder(one, pattern)]
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"the tars of {asked!r} cannot be listed ({first_line(error)}): correct the folder, or name them by a "
            "pattern such as set/{000000..000099}.tar"
        ) from error
    if not found:
        raise UserError(f"{asked!r} holds no tar: correct the folder, or name the tars")
    return found


def divide(name: str, tars: Sequence[str], members: Members = USUAL) -> dict[str, TarSet]:
    """Training and held-out tars of a set that comes without a card.

    Folders and names tell (``val/...``, ``test-000.tar``); else the last tar that is there is held out, or the last
    clips of a single one.

    Raises:
        UserError: a server does not answer.
    """
    whole = TarSet(name, tuple(tars), members)
    told = {tar: _tells_held_out(own) for tar, own in zip(whole.tars, whole.names(), strict=True)}
    heldout = tuple(tar for tar in tars if told[tar])
    if heldout and len(heldout) < len(tars):
        return {
            "train": replace(whole, tars=tuple(t for t in tars if not told[t])),
            "heldout": replace(whole, tars=heldout),
        }
    if len(tars) > 1:
        last = next(filter(_is_there, whole.tars[: -LOOKED_FOR - 1 : -1]), whole.tars[-1])
        rest = tuple(tar for tar in whole.tars if tar != last)
        return {"train": replace(whole, tars=rest), "heldout": replace(whole, tars=(last,))}
    return {part: replace(whole, part=part) for part in ("train", "heldout")}


@lru_cache(maxsize=1024)
def _is_there(tar: str) -> bool:
    try:
        stamp_of(tar)
    except OSError:
        return False
    return True


def _tells_held_out(name: str) -> bool:
    *folders, file = name.lower().split("/")
    first = re.match(r"[a-z]*", file)
    return any(folder in HELD_OUT for folder in folders) or (first is not None and first[0] in HELD_OUT)


def told_division(splits: Mapping[str, TarSet]) -> str:
    """How a set without a card was divided, in a sentence."""
    train, heldout = splits["train"], splits["heldout"]
    if heldout.part:
        return f"held out of {train.name}: its last clips, {LAST_CLIPS} or a fifth; a card with splits says otherwise"
    names = ", ".join(tar.rpartition("/")[2] for tar in heldout.tars[:3]) + (", ..." if len(heldout.tars) > 3 else "")
    return (
        f"held out of {train.name}: {len(heldout.tars)} of {len(train.tars) + len(heldout.tars)} tars ({names}); "
        "a card with splits says otherwise"
    )


def short_name(card: str) -> str:
    """A name for tars that come without a card."""
    for part in reversed(card.split(BETWEEN)[0].split("/")):
        name = re.sub(r"\{.*?\}|\*|\.(tar|tgz|gz)\b", "", part)
        if name := re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).strip("-_."):
            return name
    return "tars"


def stand_in(tarset: TarSet) -> Path:
    """The folder in the cache that stands for a set; made, but no tar is opened yet."""
    document = {"name": tarset.name, "tars": tarset.tars, "members": tarset.members.to_dict(), "part": tarset.part}
    text = json.dumps(document)
    folder = (
        remote.cache_root() / f"tars-{tarset.name[:60]}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    )
    if not (folder / remote.TARS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK):
            write_atomically(folder / remote.TARS, text)
    return folder


def load_set(folder: Path) -> TarSet | None:
    """The set that a folder of the cache stands for; None for any other folder."""
    return _read_set(folder) if remote.stands_for_tars(folder) else None


@lru_cache(maxsize=64)
def _read_set(folder: Path) -> TarSet | None:
    try:
        document = json.loads((folder / remote.TARS).read_text())
        members = parse_members(document["members"], str(folder))
        return TarSet(str(document["name"]), tuple(map(str, document["tars"])), members, str(document["part"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
