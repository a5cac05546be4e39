"""A dataset card: a short YAML that says what a data set is, where its shards lie and where it comes from."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from anyflow.data import remote
from anyflow.data.find import find_card
from anyflow.data.shards import INDEX_NAME, Sample, Shard, check_folder, load_index
from anyflow.errors import UserError, first_line
from anyflow.system.files import write_atomically

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
    try:
        document = yaml.safe_load(path.read_bytes())  # bytes: YAML tells UTF-8 from UTF-16 by itself
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"card {str(path)!r} is not YAML: {first_line(error)}") from error
    if not isinstance(document, dict):
        raise UserError(f"card {str(path)!r}: expected keys and values such as `name: driving`")
    values = _check_fields(document, path)
    values["splits"] = {split: _place(path.parent, folder) for split, folder in values["splits"].items()}
    loaded = DatasetCard(**values, path=path)
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
    write_atomically(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110))


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


def iterate(card: DatasetCard, split: str) -> typing.Iterator[tuple[Path, Shard, Sample]]:
    """The samples of a split: (folder, shard, sample).

    Raises:
        UserError: the card has no such split.
    """
    if split not in card.splits:
        raise UserError(f"card {card.name!r} has no split {split!r}: choose one of {', '.join(card.splits)}")
    folder = card.splits[split]
    for shard, sample in load_index(folder):
        yield folder, shard, sample


def _check_fields(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The YAML's values, each of its field's type."""
    fields = {f.name: f for f in dataclasses.fields(DatasetCard) if f.name != "path"}
    for key in document:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(fields)}"
            raise UserError(f"card {str(path)!r}: unknown key {key!r}; {hint}")
    required = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in document]
    if missing:
        raise UserError(f"card {str(path)!r}: missing key {missing[0]!r}; a card needs {', '.join(required)}")
    hints = typing.get_type_hints(DatasetCard)
    for key, value in document.items():
        if not _matches(value, hints[key]):
            raise UserError(f"card {str(path)!r}: {key}={value!r} has the wrong type; give {_describe(hints[key])}")
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise UserError(f"card {str(path)!r}: {key}={value!r} must be more than 0")
    if document.get("replace_captions") and not document.get("caption"):
        raise UserError(f"card {str(path)!r}: replace_captions is true, but there is no caption to put in their place")
    if not document["splits"]:
        raise UserError(f"card {str(path)!r}: splits is empty; name at least one, such as `train: shards/train`")
    return dict(document)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a YAML value fits a field's type; a path is a text, a whole number is a float as well."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is Mapping:
        _, of = typing.get_args(hint)
        return isinstance(value, dict) and all(isinstance(k, str) and _matches(v, of) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_matches(v, typing.get_args(hint)[0]) for v in value)
    if hint is Path:
        return isinstance(value, str) and bool(value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    """A type in a user's words."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if origin is Mapping:
        of = typing.get_args(hint)[1]
        return "keys with values" if of is Any else f"keys, each with {_describe(of)}"
    if origin is list:
        return f"a list, each item {_describe(typing.get_args(hint)[0])}"
    words = {str: "a text", int: "a whole number", float: "a number", Path: "a folder's path", type(None): "null"}
    return words[hint]


def _relative(folder: Path, base: Path) -> str:
    """``folder`` as seen from ``base``."""
    url = remote.url_of(folder)
    if url is not None:
        return url
    return Path(os.path.relpath(folder.resolve(), base.resolve())).as_posix()
