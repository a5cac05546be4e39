"""Shards of tiny clips."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import hypothesis
import pytest
from tiny_shards import CLIPS, MakeShards, Parts, clip_parts

from anyflow.data.shards import write_samples

# A busy machine is no failure.
hypothesis.settings.register_profile("calm", deadline=None, max_examples=25)
hypothesis.settings.load_profile("calm")


@pytest.fixture(scope="session")
def good_parts() -> list[tuple[str, Parts]]:
    """(key, members) of all clips."""
    return [(f"clip-{number:03d}", clip_parts(number)) for number in range(CLIPS)]


@pytest.fixture
def make_shards(tmp_path: Path, good_parts: list[tuple[str, Parts]]) -> MakeShards:
    """Write shards of 7 clips, some of them replaced: ``make_shards({3: {"mp4": b"..."}})``."""

    def make(replaced: Mapping[int, Parts] | None = None, name: str = "train") -> Path:
        samples = [(key, (replaced or {}).get(number, parts)) for number, (key, parts) in enumerate(good_parts)]
        write_samples(samples, tmp_path / name, "tiny", per_shard=7)
        return tmp_path / name

    return make


@pytest.fixture
def shards(make_shards: MakeShards) -> Path:
    """A folder of good shards."""
    return make_shards()
