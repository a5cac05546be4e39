"""Killed ten times at a random batch, on one rank and on two: the whole run sees what an uninterrupted one sees."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_buckets import LONG, TALL, WIDE, parts

from anyflow.data.shards import write_samples

PROGRAM = Path(__file__).with_name("killable.py")
KILLS, STEPS = 10, 66


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two data sets of 22 clips each, in three shapes."""
    folder = tmp_path_factory.mktemp("cards")
    for name in ("a", "b"):
        shapes = [WIDE] * 10 + [TALL] * 8 + [LONG] * 4
        samples = [(f"{name}-{number}", parts(shape, number)) for number, shape in enumerate(shapes)]
        write_samples(samples, folder / name, name, per_shard=6)
    return [str(folder / "a"), str(folder / "b")]


def start(run: dict[str, Any], project: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), json.dumps(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [{}, {"weights": [1, 2], "buckets": [TALL, LONG]}],
    ids=["one shape", "three shapes, weighted cards"],
)
def test_no_clip_is_lost_or_seen_twice(plan: dict[str, Any], cards: list[str], tmp_path: Path, project: Path) -> None:
    draw = random.Random(len(plan))
    whole = {"cards": cards, "world_size": 1, "num_workers": 0, "steps": STEPS, "checkpoint": str(tmp_path / "whole")}
    process = start({**whole, **plan}, project)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    uninterrupted = json.loads((tmp_path / "whole").read_text())

    checkpoint = tmp_path / "killed"
    reached = 0
    for kill in range(KILLS + 1):
        ranks, workers = draw.choice((1, 2)), draw.choice((0, 1, 2))
        run = {**whole, **plan, "world_size": ranks, "num_workers": workers, "checkpoint": str(checkpoint)}
        process = start(run, project)
        if kill == KILLS:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            break
        target = reached + draw.randint(1, 2 * STEPS // (KILLS + 2))
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= min(target, STEPS - 1):
                break
        process.kill()
        process.communicate()
        saved = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"seen": []}
        assert saved["seen"] == uninterrupted["seen"][: len(saved["seen"])]
        reached = int(line) // 3 * 3
    killed = json.loads(checkpoint.read_text())
    assert killed["seen"] == uninterrupted["seen"]
    assert killed["state"] == uninterrupted["state"]
    if not plan:  # 44 clips make 11 batches: six whole epochs
        assert set(Counter(killed["seen"]).values()) == {6}
