"""What must not take longer than there are clips, or tars: a million of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anyflow.data.importing import cutting as cuts
from anyflow.data.importing.cutting import Cutting, find_duplicates
from anyflow.data.importing.heldout import settle
from anyflow.data.importing.jobs import ShardJob
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import Recording, VideoFile


class Named(str):
    """A group's name that counts how often names are compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Named.compared += 1
        return str.__eq__(self, other)


def job(split: str, names: list[str]) -> ShardJob:
    recordings = tuple(Recording(name, name, VideoFile("")) for name in names)
    return ShardJob(Path(), "folder", Path(), split, "", "", Cutting(1, 1, 2, 2, 1), recordings)


def test_holding_out_compares_no_clip_with_every_group() -> None:
    groups: list[str] = [Named(f"episode {number}") for number in range(1000)]
    jobs = [job("heldout", groups[:200]), job("train", groups[200:])]
    splits, _ = settle(jobs, {f"{group}-0000": group for group in groups}, ImportOptions(heldout=0.2))
    assert list(splits.values()).count("heldout") == 200
    assert Named.compared < 10 * len(groups)


def test_few_prints_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many have the same mean; a clip's own print is always among them."""
    compared = 0
    alike = cuts._alike

    def counted(*words: object) -> np.ndarray:
        nonlocal compared
        compared += len(found := alike(*words))  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(cuts, "_alike", counted)
    generator = np.random.default_rng(0)
    prints = generator.integers(80, 120, (2000, 768)).astype(np.uint8)
    prints[1000:] = prints[:1000]
    assert find_duplicates(prints) == [(clip + 1000, clip) for clip in range(1000)]
    assert compared < 3 * len(prints)
