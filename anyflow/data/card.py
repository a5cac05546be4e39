"""A dataset card: a short YAML that says what a data set is, where its shards lie and where it comes from."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyflow.data import remote
from anyflow.data.controls import Control
from anyflow.data.find import find_card, is_tars, names_tars
from anyflow.data.members import Members, parse_members
from anyflow.data.shards import INDEX_NAME, Sample, Shard, check_folder, load_index
from anyflow.data.tar_index import check_tars, ready
from anyflow.data.tars import TarSet, divide, expand, short_name, stand_in, told_division
from anyflow.errors import UserError
from anyflow.system.files import write_atomically
from anyflow.system.typed import build, fit, read_yaml, to_yaml

CARD_NAME = "card.yaml"
"""The card's name inside a rendered or imported data set's own folder."""

DEFAULT_NEGATIVE_PROMPT = "blurry, distorted, flickering, low quality, static noise"


class CaptionOverride(str):
    """A caption that replaces every clip's own."""


def caption_identity(caption: str | None) -> str | None:
    """A default caption as a digest sees it: an override with the same words makes other data."""
    return f"all: {caption}" if isinstance(caption, CaptionOverride) else caption


@dataclass(frozen=True)
class DatasetCard:
    """A card, checked.

    Attributes:
        name: as given on the command line.
        domain: "driving", "robotics", "games", ...
        description: one or two sentences for people and model cards.
        splits: each split's folder of shards; in the YAML relative to the card's own folder, or an address. A folder
            elsewhere (s3://..., https://...) is stood for by one in the cache; see :mod:`anyflow.data.remote`. So are
            somebody else's tars, which the YAML names by a pattern or a list; see :mod:`anyflow.data.tars`.
        frames, height, width, fps: what every clip has; None where tars have clips of any kind.
        caption: stands in for a clip's missing caption; None means that such a clip is refused.
        replace_captions: it stands in for every clip's own caption too.
        negative_prompt: what guidance steers away from.
        controls: control -> what it holds; in words alone it is for people, and cannot be a condition.
        attributes: label -> its values, or what it holds.
        licence: of the footage.
        provenance: how the footage came to be: versions, seed, command.
        members: of somebody else's tars, what their members hold (:class:`anyflow.data.members.Members`).
        path: the card's file.
    """

    name: str
    domain: str
    description: str
    splits: Mapping[str, Path]
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    licence: str = ""
    caption: str | None = None
    replace_captions: bool = False
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    controls: Mapping[str, Control | str] = field(default_factory=dict)
    attributes: Mapping[str, str | list[str]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    members: Mapping[str, Any] = field(default_factory=dict)
    path: Path = field(default=Path(), compare=False)

    @property
    def stand_in(self) -> str | None:
        """What stands in for captions, as :func:`anyflow.data.reader.parse_metadata` takes it."""
        return CaptionOverride(self.caption) if self.replace_captions and self.caption is not None else self.caption


def load_card(card: str | Path, require_shards: bool = True) -> DatasetCard:
    """Read and check a card, given by name (in ``data/``), by file, or by a folder that holds ``card.yaml``.

    Raises:
        UserError: no such card; a key that is misspelt, missing or of the wrong type; a split without shards.
    """
    if is_tars(card):
        return card_of_tars(str(card))
    if isinstance(card, str) and remote.is_url(card):
        try:
            path = fetch_card(card)
        except NoCard as error:
            return _card_of_folder(card, error)
    else:
        path = find_card(str(card), "data set ")
    loaded = _read(path)
    if require_shards:
        for split, folder in loaded.splits.items():
            if not (remote.url_of(folder) or remote.stands_for_tars(folder) or (folder / INDEX_NAME).is_file()):
                command = loaded.provenance.get("command", "correct the path")
                raise UserError(
                    f"card {str(path)!r}: splits.{split} names {str(folder)!r}, which holds no shards "
                    f"(no {INDEX_NAME}); make them: {command}"
                )
    return loaded


def common_rate(cards: Iterable[str]) -> float | None:
    """The frames a second of all these cards' clips; None where they differ, or a card is not here."""
    try:
        rates = {load_card(card, require_shards=False).fps for card in cards}
    except UserError:
        return None
    return rates.pop() if len(rates) == 1 else None


def card_of_tars(place: str) -> DatasetCard:
    """A card for tars that come without one: a path, a pattern, several with ``::`` between, or a folder.

    Raises:
        UserError: they cannot be found.
    """
    name = short_name(place)
    sets = divide(name, expand(place))
    description = f"WebDataset tars, read where they lie: {place}. {told_division(sets)}."
    splits = {split: stand_in(tars) for split, tars in sets.items()}
    return DatasetCard(name, "video", description, splits, licence="not stated")


def _card_of_folder(url: str, no_card: UserError) -> DatasetCard:
    """A card for the tars of a folder elsewhere that has no card; the first error if it has no tars either."""
    if url.endswith((".yaml", ".yml")):
        raise no_card
    try:
        return card_of_tars(url)
    except UserError as error:
        raise UserError(f"{no_card}; nor are there tars ({error})") from error


class NoCard(UserError):
    """There is no card at an address."""


def fetch_card(url: str) -> Path:
    """The copy of a card that lies elsewhere, given by its own address or by that of its folder.

    Raises:
        NoCard: there is none. UserError: it cannot be fetched.
    """
    base, _, name = url.rpartition("/") if url.endswith((".yaml", ".yml")) else (url, "", CARD_NAME)
    try:
        return remote.fetch_small(remote.mirror(base), name)
    except FileNotFoundError as error:
        raise NoCard(f"there is no {remote.join(base, name)}: check the address of the card") from error


def _place(home: Path, folder: str | list[str], name: str, members: Members) -> Path:
    """A split's folder: an address of its own, beside the card elsewhere, or beside the card here; or its tars'."""
    base = remote.url_of(home)
    if isinstance(folder, list) or names_tars(folder) or (base is None and is_tars(home / folder)):
        return stand_in(TarSet(name, tuple(expand(folder, base or home)), members))
    if remote.is_url(folder):
        return remote.mirror(folder)
    return home / Path(folder).expanduser() if base is None else remote.mirror(remote.join(base, folder))


def write_card(card: DatasetCard, path: Path) -> None:
    """Write a card as YAML, its splits relative to its folder."""
    document = {f.name: getattr(card, f.name) for f in dataclasses.fields(card) if f.name != "path"}
    document = {name: dict(value) if isinstance(value, Mapping) else value for name, value in document.items()}
    document["splits"] = {split: _relative(folder, path.parent) for split, folder in card.splits.items()}
    document["controls"] = plain_controls(card.controls)
    if not card.members:
        del document["members"]
    write_atomically(path, to_yaml(document))


def plain_controls(controls: Mapping[str, Control | str]) -> dict[str, Any]:
    """A card's controls as its YAML has them."""
    return {name: told if isinstance(told, str) else told.to_dict() for name, told in controls.items()}


def check_shards(card: DatasetCard | str | Path) -> list[str]:
    """Verify every split against its index: presence, size, hash, members, and that no clip is in two splits.

    Returns:
        One sentence a problem; an empty list if all is well.
    """
    loaded = card if isinstance(card, DatasetCard) else load_card(card, require_shards=False)
    problems: list[str] = []
    home: dict[str, str] = {}
    for split, folder in loaded.splits.items():
        ready(folder)
        found = check_tars(folder) if remote.stands_for_tars(folder) else check_folder(folder)
        problems += [f"{split}: {problem}" for problem in found]
        if not remote.fetch_small(folder, INDEX_NAME).is_file() or any(
            "not a shard index" in problem for problem in found
        ):
            continue
        for shard, sample in load_index(folder):
            other = home.setdefault(f"{shard.place}:{sample.key}", split)
            if other != split:
                problems.append(f"{split}: clip {sample.key!r} is in {other} as well")
    return problems


def iterate(card: DatasetCard, split: str) -> Iterator[tuple[Path, Shard, Sample]]:
    """The samples of a split: (folder, shard, sample).

    Raises:
        UserError: the card has no such split.
    """
    if split not in card.splits:
        raise UserError(f"card {card.name!r} has no split {split!r}: choose one of {', '.join(card.splits)}")
    folder = card.splits[split]
    ready(folder)
    for shard, sample in load_index(folder):
        yield folder, shard, sample


OF_CLIPS = ("frames", "height", "width", "fps")
"""What a card says of every clip, unless it is of somebody else's tars."""


def _read(path: Path) -> DatasetCard:
    """A card as its file has it with its splits in their places, unless something in it contradicts itself."""
    where, tree = f"card {str(path)!r}: ", read_yaml(path, "card")
    given = tree.pop("splits", None)
    if given is None:
        raise UserError(f"{where}missing key 'splits': name at least one, such as `train: shards/train`")
    try:
        places = fit(given, dict[str, str | list[str]])
    except TypeError:
        words = "keys, each with a folder's path, or a list of tars"
        raise UserError(f"{where}splits={given!r} is not of the right type: give {words}") from None
    if not places or not all(places.values()):
        raise UserError(f"{where}splits is empty; name at least one, such as `train: shards/train`")
    card = build(DatasetCard, tree, where, path=path, splits={})
    for key in () if "members" in tree or _names_tars(places, path.parent) else OF_CLIPS:
        if key not in tree:
            raise UserError(f"{where}missing key {key!r}: {', '.join(OF_CLIPS)} are needed")
    for key in OF_CLIPS:
        if not 0 < (getattr(card, key) or 1) < math.inf or getattr(card, key) == 0:
            raise UserError(f"{where}{key}={getattr(card, key):g} must be more than 0")
    if card.replace_captions and not card.caption:
        raise UserError(f"{where}replace_captions is true, but there is no caption to put in their place")
    members = parse_members(card.members, where.removesuffix(": "))
    splits = {split: _place(path.parent, place, f"{card.name}-{split}", members) for split, place in places.items()}
    return dataclasses.replace(card, splits=splits)


def _names_tars(places: Mapping[str, str | list[str]], home: Path) -> bool:
    """Whether a card's splits are somebody else's tars."""
    return any(isinstance(place, list) or names_tars(place) or is_tars(home / place) for place in places.values())


def _relative(folder: Path, base: Path) -> str:
    """``folder`` as seen from ``base``."""
    url = remote.url_of(folder)
    if url is not None:
        return url
    return Path(os.path.relpath(folder.resolve(), base.resolve())).as_posix()
