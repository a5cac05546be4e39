"""The frames that a video can start from: a picture of the user's, or the first frames of held-out clips."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow.data.card import load_card
from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.reader import ShardReader, find_split
from anyflow.errors import UserError
from anyflow.evaluation.models import recipe_of

MOST = 12
"""Held-out clips that are offered."""


@dataclass(frozen=True)
class Start:
    """Where a video starts.

    Attributes:
        label: said of it.
        caption: the prompt that goes with it.
        pixels: uint8 ``[1, 1, H, W, 3]``; None: the first frame is sampled too.
        domain: of the clip, as its card says.
    """

    label: str
    caption: str
    pixels: NDArray[np.uint8] | None = None
    domain: str = ""


def starts_of(
    model: str, shape: ClipShape, image: Path | None, data: str | None, prompt: str | None
) -> tuple[list[Start], str]:
    """The starts of a model's videos, and what is to be said of them.

    They are the user's picture, or held-out clips of the card that is named; else of the cards that the model was
    trained on, as far as they are here. If there is none, the first frame is sampled too.

    Args:
        model: folder or hub id.
        shape: of the model's clips.
        image: a picture's file.
        data: a card; beside a picture it gives prompt and domain alone.
        prompt: the caption; else each clip's own.

    Raises:
        UserError: the picture or the card cannot be read.
    """
    cards = [data] if data is not None else cards_of(model)
    if image is not None:
        try:
            pixels = decode_clip(image.read_bytes(), _one_frame(shape))[None]
        except (OSError, DecodeError) as error:
            raise UserError(f"--image {image} cannot be read ({error}): give a picture, such as a png") from error
        caption, domain = _facts(cards, is_asked=data is not None)
        return [Start(image.name, caption if prompt is None else prompt, pixels, domain)], ""
    found: list[Start] = []
    for number, card in enumerate(cards):
        try:
            found += islice(_held_out(card, shape, prompt), (MOST - len(found)) // (len(cards) - number))
        except UserError:
            if data is not None:
                raise
    if data is not None and not found:
        raise UserError(f"--data {data} has no held-out clip that can be read: name another card")
    if found:
        return found, ""
    note = "no first frame is known: it is sampled too (--image or --data gives one)"
    return [Start("from noise", prompt or "")], note


def cards_of(model: str) -> Sequence[str]:
    """The cards that a model was trained on: as its run's recipe says, or the README of an export."""
    for folder in (Path(model), Path(model).parent):
        if (folder / "recipe.yaml").is_file():
            recipe = recipe_of(model)
            return recipe.data.card if recipe is not None else ()
    readme = Path(model) / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    section = re.search(r"^## Data\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^- \*\*(.+?)\*\*", section[1], re.MULTILINE) if section else ()


def _facts(cards: Sequence[str], is_asked: bool) -> tuple[str, str]:
    """Caption and domain of the first card that is here: the caption that stands for all of its clips, if one does."""
    for card in cards:
        try:
            found = load_card(card)
        except UserError:
            if is_asked:
                raise
            continue
        return found.caption or "", found.domain
    return "", ""


def _held_out(card: str, shape: ClipShape, prompt: str | None) -> Iterator[Start]:
    """The first frames of a card's held-out clips that can be read."""
    found = find_split(card, "heldout")
    reader = ShardReader([found.folder], [found.caption])
    for number, (_, shard) in enumerate(reader.shards):
        for sample in shard.samples:
            try:
                pixels = decode_clip(reader.video(number, sample), _one_frame(shape))[None]
                facts = reader.describe(number, sample)
            except DecodeError:
                continue
            caption = facts["caption"] if prompt is None else prompt
            yield Start(sample.key, caption, pixels, str(facts.get("domain") or ""))


def _one_frame(shape: ClipShape) -> ClipShape:
    return ClipShape(1, shape.height, shape.width)
