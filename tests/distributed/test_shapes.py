"""Two ranks train on clips of two shapes, killed in the middle and gone on with one: every step is of one shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_ranks import STEPS, after_first_checkpoint, finish, start, training, weights

from anyflow.data.card import DatasetCard, write_card
from anyflow.data.clip import encode_mp4
from anyflow.data.shards import write_samples


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 square clips and 8 wide ones."""
    folder = tmp_path_factory.mktemp("shapes")
    samples = []
    for number in range(16):
        frames = np.full((5, 32, 32 if number % 2 else 64, 3), 10 * number, dtype=np.uint8)
        facts = {"caption": "a grey picture", "fps": 8, "domain": "driving", "attributes": {}}
        samples.append((f"clip-{number}", {"mp4": encode_mp4(frames, 8), "json": json.dumps(facts).encode()}))
    write_samples(samples, folder / "train", "shapes")
    write_samples(samples[:1], folder / "heldout", "shapes")
    splits = {"train": folder / "train", "heldout": folder / "heldout"}
    write_card(DatasetCard("shapes", "driving", "Grey.", splits, 5, 32, 64, 8.0, "MIT"), folder / "card.yaml")
    return folder / "card.yaml"


@pytest.mark.slow
def test_ranks_train_on_several_shapes_and_go_on(small_model: Path, card: Path, tmp_path: Path) -> None:
    more = (f"data.card={card}", "data.width=64", "data.buckets=[5x32x32]", "data.global_batch=4")
    out = tmp_path / "run"
    process = start(training(small_model, out, *more))
    after_first_checkpoint(process, out)
    process.terminate()
    errors = process.communicate(timeout=120)[1].decode()
    assert "bucket 5x32x64" in errors and "bucket 5x32x32" in errors and " 50.0%" in errors
    finish(training(small_model, out, *more, "--resume", str(out), ranks=1))
    assert weights(out) and STEPS == 8
