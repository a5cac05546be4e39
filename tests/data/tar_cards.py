"""What the tests of somebody else's tars share: cards of them, and what is read by these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tiny_shards import FRAMES, HEIGHT, WIDTH

from anyflow.data.module import VideoDataModule
from anyflow.data.reader import ShardReader, find_split


def reader_of(card: str, split: str = "train") -> ShardReader:
    found = find_split(card, split)
    return ShardReader([found.folder], [found.caption])


def captions(reader: ShardReader) -> dict[str, str]:
    """Key -> caption of every clip; its video is read as well."""
    found = {}
    for number, (_, shard) in enumerate(reader.shards):
        for one in shard.samples:
            assert reader.video(number, one)[4:8] == b"ftyp"
            found[one.key] = reader.describe(number, one)["caption"]
    return found


def card_of(folder: Path, tars: Any, **changes: Any) -> str:
    """A card beside a folder, whose training split is these tars."""
    facts = {"name": "mine", "domain": "video", "description": "Mine.", "licence": "MIT", "splits": {"train": tars}}
    path = folder / "card.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**facts, **changes}))
    return str(path)


def module_of(card: str, **options: Any) -> VideoDataModule:
    shape: dict[str, Any] = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "batch_size": 2, "steps": 10}
    data = VideoDataModule(card, **{**shape, **options})
    data.setup()
    return data
