"""A dataset card: a short YAML that says what a data set is, where its shards lie and where it comes from."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyflow.data import remote
from anyflow.data.find import find_card
from anyflow.data.shards import INDEX_NAME, Sample, Shard, check_folder, load_index
from anyflow.errors import UserError
from anyflow.system.files import write_atomically
from anyflow.system.typed import build, read_yaml, to_yaml

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
            elsewhere (s3://..., https://...) is stood for by one in the cache; see :mod:`anyflow.data.remote`.
        frames, height, width, fps: what every clip has.
        caption: stands in for a clip's missing caption; None means that such a clip is refused.
        replace_captions: it stands in for every clip's own caption too.
        negative_prompt: what guidance steers away from.
        controls: control -> what it holds, in words. attributes: label -> its values, or what it holds.
        licence: of the footage.
        provenance: how the footage came to be: versions, seed, command.
        path: the card's file.
    """

    name: str
    domain: str
    description: str
    splits: Mapping[str, Path]
    frames: int
    height: int
    width: int
    fps: float
    licence: str
    caption: str | None = None
    replace_captions: bool = False
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    controls: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str | list[str]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
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
    path = fetch_card(card) if isinstance(card, str) and remote.is_url(card) else find_card(str(card), "data set ")
    loaded = _checked(build(DatasetCard, read_yaml(path, "card"), f"card {str(path)!r}: ", path=path))
    if require_shards:
        for split, folder in loaded.splits.items():
            if remote.url_of(folder) is None and not (folder / INDEX_NAME).is_file():
                command = loaded.provenance.get("command", "correct the path")
                raise UserError(
                    f"card {str(path)!r}: splits.{split} names {str(folder)!r}, which holds no shards "
                    f"(no {INDEX_NAME}); make them: {command}"
                )
    return loaded


def fetch_card(url: str) -> Path:
    """The copy of a card that lies elsewhere, given by its own address or by that of its folder.

    Raises:
        UserError: there is none, or it cannot be fetched.
    """
    base, _, name = url.rpartition("/") if url.endswith((".yaml", ".yml")) else (url, "", CARD_NAME)
    try:
        return remote.fetch_small(remote.mirror(base), name)
    except FileNotFoundError as error:
        raise UserError(f"there is no {remote.join(base, name)}: check the address of the card") from error


def _place(home: Path, folder: str) -> Path:
    """A split's folder: an address of its own, beside the card elsewhere, or beside the card here."""
    if remote.is_url(folder):
        return remote.mirror(folder)
    base = remote.url_of(home)
    return home / Path(folder).expanduser() if base is None else remote.mirror(remote.join(base, folder))


def write_card(card: DatasetCard, path: Path) -> None:
    """Write a card as YAML, its splits relative to its folder."""
    document = {f.name: getattr(card, f.name) for f in dataclasses.fields(card) if f.name != "path"}
    document = {name: dict(value) if isinstance(value, Mapping) else value for name, value in document.items()}
    document["splits"] = {split: _relative(folder, path.parent) for split, folder in card.splits.items()}
    write_atomically(path, to_yaml(document))


def check_shards(card: DatasetCard | str | Path) -> list[str]:
    """Verify every split against its index: presence, size, hash, members, and that no clip is in two splits.

    Returns:
        One sentence a problem; an empty list if all is well.
    """
    loaded = card if isinstance(card, DatasetCard) else load_card(card, require_shards=False)
    problems: list[str] = []
    home: dict[str, str] = {}
    for split, folder in loaded.splits.items():
        found = check_folder(folder)
        problems += [f"{split}: {problem}" for problem in found]
        if not remote.fetch_small(folder, INDEX_NAME).is_file() or any(
            "not a shard index" in problem for problem in found
        ):
            continue
        for _, sample in load_index(folder):
            other = home.setdefault(sample.key, split)
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
    for shard, sample in load_index(folder):
        yield folder, shard, sample


def _checked(card: DatasetCard) -> DatasetCard:
    """A card as its file has it with its splits in their places, unless something in it contradicts itself."""
    where = f"card {str(card.path)!r}: "
    for key in ("frames", "height", "width", "fps"):
        if not 0 < getattr(card, key) < math.inf:
            raise UserError(f"{where}{key}={getattr(card, key):g} must be more than 0")
    if card.replace_captions and not card.caption:
        raise UserError(f"{where}replace_captions is true, but there is no caption to put in their place")
    if not card.splits:
        raise UserError(f"{where}splits is empty; name at least one, such as `train: shards/train`")
    splits = {split: _place(card.path.parent, str(folder)) for split, folder in card.splits.items()}
    return dataclasses.replace(card, splits=splits)


def _relative(folder: Path, base: Path) -> str:
    """``folder`` as seen from ``base``."""
    url = remote.url_of(folder)
    if url is not None:
        return url
    return Path(os.path.relpath(folder.resolve(), base.resolve())).as_posix()
