"""A small data set for whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anyflow.data.card import DatasetCard, write_card
from anyflow.data.clip import encode_mp4
from anyflow.data.shards import write_samples

FRAMES, SIDE = 17, 32


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of 8 clips to train on and 8 held out, 17 frames of 32x32, each with a caption of its own."""
    folder = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    for split in ("train", "heldout"):
        samples = []
        for number in range(8):
            frames = generator.integers(0, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
            words = {"caption": f"{split} clip {number}", "fps": 8, "domain": "driving", "attributes": {}}
            parts = {"mp4": encode_mp4(frames, 8), "json": json.dumps(words).encode()}
            samples.append((f"{split}-{number}", parts))
        write_samples(samples, folder / split, "small", per_shard=8)
    splits = {split: folder / split for split in ("train", "heldout")}
    facts = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": 8.0, "licence": "MIT"}
    write_card(DatasetCard("small", "driving", "Noise.", splits, **facts), folder / "card.yaml")
    return folder / "card.yaml"
