"""Tiny clips of 5 frames, 48x32, whose brightness tells which clip and which frame they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.card import DatasetCard, write_card
from anyflow.data.clip import encode_mp4

CLIPS, FRAMES, HEIGHT, WIDTH = 23, 5, 32, 48

Parts = Mapping[str, bytes]
MakeShards = Callable[..., Path]


def clip_parts(number: int, **changes: object) -> dict[str, bytes]:
    """A sample's members; frame ``t`` of clip ``n`` is uniformly ``10 n + t`` bright."""
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    frames[:] = (10 * number + np.arange(FRAMES))[:, None, None, None]
    metadata = {"caption": f"clip {number}", "fps": 8, "domain": "driving", "attributes": {"number": number}, **changes}
    return {"mp4": encode_mp4(frames, 8), "json": json.dumps(metadata).encode()}


def card_of(folder: Path, **changes: Any) -> Path:
    """Write a card beside a folder of these clips."""
    facts = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 8.0, "licence": "MIT"}
    card = DatasetCard("tiny", "driving", "Tiny.", {"train": folder}, **{**facts, **changes})
    write_card(card, folder.parent / "card.yaml")
    return folder.parent / "card.yaml"
