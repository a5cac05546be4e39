"""What a data set holds, in numbers: counts, hours, bytes, captions, labels."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from anyflow.data.card import DatasetCard, iterate, load_card
from anyflow.data.shards import load_index, read_parts

TOP_WORDS = 20
MOST_VALUES = 20
"""A label with more values than this is told by their number."""


def describe_card(card: DatasetCard | str | Path) -> dict[str, Any]:
    """Counts, hours and bytes of each split; statistics of the captions; a histogram of each label. Ready for JSON.

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
        "controls": dict(loaded.controls),
        "attributes": dict(loaded.attributes),
        "provenance": dict(loaded.provenance),
        "splits": {split: _describe_split(loaded, split) for split in loaded.splits},
    }


def _describe_split(card: DatasetCard, split: str) -> dict[str, Any]:
    index = load_index(card.splits[split])
    descriptions = [
        json.loads(read_parts(folder, shard, sample, ("json",))["json"])
        for folder, shard, sample in iterate(card, split)
    ]
    return {
        "clips": index.count,
        "shards": len(index.shards),
        "bytes": index.bytes,
        "hours": round(index.count * card.frames / card.fps / 3600, 4),
        "shapes": _shapes(card, split),
        "captions": _describe_captions([_caption(card, d) for d in descriptions]),
        "attributes": _histograms([d.get("attributes") or {} for d in descriptions]),
    }


def _caption(card: DatasetCard, description: dict[str, Any]) -> str:
    """What a clip is trained with; empty if it has no caption of its own, whatever stands in for that."""
    return str((card.caption if card.replace_captions else description.get("caption")) or "")


def _shapes(card: DatasetCard, split: str) -> dict[str, float]:
    """FRAMESxHEIGHTxWIDTH -> its share of the clips, the largest first; by the index, else by the card."""
    usual = (card.frames, card.height, card.width)
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
