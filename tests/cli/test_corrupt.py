"""A card of which 1 % of the clips are corrupt, through the command line: the run ends and names every one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shell import run

from anyflow.data.card import DatasetCard, write_card
from anyflow.data.shards import load_index

CLIPS = 200
BAD = (17, 140)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 clips, two of them overwritten in the shards, behind the index's back."""
    import numpy as np

    from anyflow.data.clip import Clip
    from anyflow.data.shards import write_shards

    folder = tmp_path_factory.mktemp("corrupt")
    clips = [
        Clip(f"clip-{n:03d}", "a grey picture", 8.0, "driving", np.full((5, 32, 32, 3), n, dtype=np.uint8))
        for n in range(CLIPS)
    ]
    write_shards(clips, folder / "train", "t")
    write_shards([clips[0]], folder / "heldout", "h")
    for shard in load_index(folder / "train").shards:
        for sample in shard.samples:
            if int(sample.key[-3:]) in BAD:
                offset, size = sample.parts["mp4"]
                with (folder / "train" / shard.name).open("r+b") as file:
                    file.seek(offset)
                    file.write(b"\x5a" * size)
    splits = {"train": folder / "train", "heldout": folder / "heldout"}
    write_card(DatasetCard("corrupt", "driving", "Grey.", splits, 5, 32, 32, 8.0, "MIT"), folder / "card.yaml")
    return folder / "card.yaml"


def train(card: Path, model: Path, out: Path, precompute: str, budget: float) -> list[str]:
    """One epoch and a little: every clip is asked for."""
    options = {
        "data.card": card,
        "model.weights": model,
        "data.precompute": precompute,
        "data.error_budget": budget,
        **{"data.frames": 5, "data.height": 32, "data.width": 32, "data.num_workers": 1},
        **{"data.global_batch": 20, "data.batch_size": 20, "stage.steps": 11},
        **{"sampling.prompts": 0, "run.tracking_uri": ""},
    }
    return ["train", "finetune/driving", *(f"{key}={value}" for key, value in options.items()), "--out", str(out)]


def named(path: Path) -> set[str]:
    return {entry["key"] for entry in json.loads(path.read_text()) if "cannot be decoded" in entry["reason"]}


@pytest.mark.slow
@pytest.mark.parametrize("precompute", ["false", "true"])
def test_within_the_budget_the_run_ends_and_names_all(
    precompute: str, card: Path, small_model: Path, tmp_path: Path
) -> None:
    done = run(*train(card, small_model, tmp_path / "run", precompute, 0.01))
    assert done.returncode == 0, done.stderr
    assert named(tmp_path / "run/skipped.json") == {f"clip-{n:03d}" for n in BAD}
    assert "2 clips could not be used" in done.stderr and "skipped.json" in done.stdout


@pytest.mark.slow
def test_over_the_budget_the_run_stops_with_the_same_report(card: Path, small_model: Path, tmp_path: Path) -> None:
    done = run(*train(card, small_model, tmp_path / "run", "false", 0.005))
    assert done.returncode == 2
    assert "2 of 200 clips cannot be used, more than error_budget 0.005 allows: " in done.stderr
    assert all(f"clip-{n:03d} (the video cannot be decoded" in done.stderr for n in BAD)
    assert named(tmp_path / "run/skipped.json") == {f"clip-{n:03d}" for n in BAD}


@pytest.mark.slow
def test_encoding_over_the_budget_stops_with_the_same_report(card: Path, small_model: Path, tmp_path: Path) -> None:
    words = [*train(card, small_model, tmp_path / "run", "true", 0.005), "data.height=16"]  # not encoded yet
    done = run(*words)
    assert done.returncode == 2 and "more than error_budget 0.005 allows" in done.stderr
    (report,) = [path for path in (card.parent / "cache").rglob("skipped.json") if ".part" in str(path)]
    assert str(report) in done.stderr.replace("\n", "") and named(report) == {f"clip-{n:03d}" for n in BAD}
