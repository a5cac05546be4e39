"""What a data set holds, in numbers: counts, hours, bytes, captions, labels."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from anyflow.data import remote
from anyflow.data.card import DatasetCard, iterate, load_card, plain_controls
from anyflow.data.control_coverage import coverage
from anyflow.data.control_ranges import survey_controls
from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.reader import ShardReader
from anyflow.data.shards import load_index, read_parts
from anyflow.data.tar_index import left_out_of, ready, told_left_out

TOP_WORDS = 20
MOST_VALUES = 20
"""A label with more values than this is told by their number."""
MOST_READ = 2000
"""Clips of somebody else's tars whose captions and labels are read: there may be millions, each a request."""


def describe_card(card: DatasetCard | str | Path) -> dict[str, Any]:
    """Counts, hours and bytes of each split; statistics of the captions; a histogram of each label and control.

    Ready for JSON.

    Raises:
        UserError: the card or its shards cannot be read.
    """
    loaded = card if isinstance(card, DatasetCard) else load_card(card)
    return {
        "name": loaded.name,
        "domain": loaded.domain,
        "description": loaded.description,
        "clip": {"frames": loaded.frames, "height": loaded.height, "width": loaded.width, "fps": loaded.fps},
        "licence": loaded.licence,
        "caption": loaded.caption,
        "replace_captions": loaded.replace_captions,
        "negative_prompt": loaded.negative_prompt,
        "controls": plain_controls(loaded.controls),
        "attributes": dict(loaded.attributes),
        "provenance": dict(loaded.provenance),
        "splits": {split: _describe_split(loaded, split) for split in loaded.splits},
    }


def _describe_split(card: DatasetCard, split: str) -> dict[str, Any]:
    folder = card.splits[split]
    ready(folder)
    index = load_index(folder)
    is_tars = remote.stands_for_tars(folder)
    if is_tars:
        descriptions = _read_in_tars(card, folder)
    else:
        descriptions = [
            json.loads(read_parts(folder, shard, sample, ("json",))["json"])
            for folder, shard, sample in iterate(card, split)
        ]
    return {
        "clips": index.count,
        "shards": len(index.shards),
        "bytes": index.bytes,
        "hours": round(index.count * card.frames / card.fps / 3600, 4) if card.frames and card.fps else None,
        "shapes": _shapes(card, split),
        **({"read": len(descriptions), "left_out": told_left_out(left_out_of(folder))} if is_tars else {}),
        "captions": _describe_captions([_caption(card, d) for d in descriptions]),
        "attributes": _histograms([d.get("attributes") or {} for d in descriptions]),
        "controls": _coverage(card, split),
    }


def _coverage(card: DatasetCard, split: str) -> dict[str, Any]:
    """Control -> the clips that have it, those that do not fit to the card, and which values each number takes."""
    typed = {name: control for name, control in card.controls.items() if isinstance(control, Control)}
    seen, read = survey_controls(card, split, typed) if typed else ({}, 0)
    facts: dict[str, Any] = {}
    for name, control in typed.items():
        of = seen.get(name)
        counts = {"read": read, "clips": of.clips if of else 0, "misfits": of.misfits if of else 0}
        facts[name] = {**counts, "numbers": coverage(control, of)}
    return facts


def _read_in_tars(card: DatasetCard, folder: Path) -> list[dict[str, Any]]:
    """What the first clips of somebody else's tars say; nothing of those that cannot be read."""
    reader = ShardReader([folder], [card.stand_in or ""], tolerant=True)
    samples = ((number, sample) for number, (_, shard) in enumerate(reader.shards) for sample in shard.samples)
    found: list[dict[str, Any]] = []
    for number, sample in islice(samples, MOST_READ):
        try:
            found.append(reader.describe(number, sample))
        except DecodeError:
            found.append({})
    return found


def _caption(card: DatasetCard, description: dict[str, Any]) -> str:
    """What a clip is trained with; empty if it has no caption of its own, whatever stands in for that."""
    return str((card.caption if card.replace_captions else description.get("caption")) or "")


def _shapes(card: DatasetCard, split: str) -> dict[str, float]:
    """FRAMESxHEIGHTxWIDTH -> its share of the clips, the largest first; by the index, else by the card."""
    if not card.frames and not any(sample.shape for _, _, sample in iterate(card, split)):
        return {}
    usual = (card.frames or 0, card.height or 0, card.width or 0)
    counts = Counter("x".join(f"{side:g}" for side in (s.shape[:3] or usual)) for _, _, s in iterate(card, split))
    return {shape: round(count / counts.total(), 4) for shape, count in counts.most_common()}


def _describe_captions(captions: list[str]) -> dict[str, Any]:
    lists = [re.findall(r"[\w'-]+", caption.lower()) for caption in captions]
    words = Counter(word for words in lists for word in words)
    return {
        "distinct": len({caption for caption in captions if caption}),
        "missing": sum(not caption for caption in captions),
        "mean_words": round(sum(map(len, lists)) / max(len(lists), 1), 1),
        "vocabulary": len(words),
        "top_words": dict(words.most_common(TOP_WORDS)),
    }


def _histograms(labels: list[dict[str, Any]]) -> dict[str, Any]:
    """Label -> {value: clips}, or the number of distinct values where there are too many to list."""
    counts: dict[str, Counter[str]] = {}
    for clip in labels:
        for label, value in clip.items():
            counts.setdefault(label, Counter())[str(value)] += 1
    return {
        label: dict(sorted(values.items())) if len(values) <= MOST_VALUES else f"{len(values)} distinct values"
        for label, values in sorted(counts.items())
    }
