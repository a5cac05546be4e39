"""Tars that lie where they are, and SIGKILL: while they are indexed and while they are streamed, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tar_files import sample, write_set, write_tar
from test_kills import start
from tiny_shards import FRAMES, HEIGHT, WIDTH

from anyflow.data import remote
from anyflow.data.lanes import LaneState
from anyflow.data.reader import find_split
from anyflow.data.shards import load_index

INDEX = "import sys; from anyflow.data.reader import find_split; find_split(sys.argv[1], 'train')"
TARS = 150
STEPS = 40
TEN = pytest.mark.slow


def card_of(folder: Path, tars: str) -> str:
    facts = {"name": "mine", "domain": "video", "description": "Mine.", "licence": "MIT", "splits": {"train": tars}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(facts))
    return str(folder / "mine.yaml")


def headers(cache: Path) -> dict[Path, int]:
    """What is kept of each tar, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in cache.glob("tar-headers/*/*.json")}


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=TEN)])
def test_killed_while_indexing(kills: int, tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed again and again: what was read is not read again, and the index is that of one go."""
    for number in range(TARS):
        write_tar(tmp_path / f"set/{number:03d}.tar", [m for clip in range(20) for m in sample(f"{clip}")])
    card = card_of(tmp_path, f"set/{{000..{TARS - 1:03d}}}.tar")
    cache = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(project), remote.CACHE_VARIABLE: str(cache)}
    draw, killed_times = random.Random(kills), 0
    for kill in range(kills + 1):
        before = headers(cache)
        process = subprocess.Popen([sys.executable, "-c", INDEX, card], env=environment, stderr=subprocess.DEVNULL)
        if kill == kills:
            assert process.wait(timeout=120) == 0
            break
        target = len(before) + draw.randint(1, TARS // (kills + 2))
        while len(headers(cache)) < target and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break  # the machine was too busy to see it at work
        killed_times += 1
        assert not list(cache.glob("tars-*/index.json"))
        assert all(headers(cache)[path] == when for path, when in before.items())
    assert killed_times and len(headers(cache)) == TARS
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(cache))
    killed = load_index(find_split(card, "train").folder)
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "whole"))
    assert killed == load_index(find_split(card, "train").folder)
    assert killed.count == 20 * TARS


@pytest.mark.parametrize(
    ("kills", "ranks", "workers"),
    [pytest.param(2, 1, 1, marks=TEN), pytest.param(10, 1, 2, marks=TEN), pytest.param(10, 2, 2, marks=TEN)],
)
def test_killed_while_streaming(kills: int, ranks: int, workers: int, tmp_path: Path, project: Path) -> None:
    """Killed at random batches: the run sees what an uninterrupted one sees, each clip once an epoch."""
    sizes = [3, 1, 4, 1, 5, 2, 6, 2]
    keys = write_set(tmp_path / "set", sizes)
    card = card_of(tmp_path, "set/{000..007}.tar")
    run: dict[str, Any] = {
        "cards": [card],
        "world_size": ranks,
        "num_workers": workers,
        "steps": STEPS,
        "streaming": True,
    }
    uninterrupted = finish({**run, "checkpoint": str(tmp_path / "whole")}, project)
    draw, reached = random.Random(kills), 0
    killed = {**run, "checkpoint": str(tmp_path / "killed")}
    for _ in range(kills):
        process = start(killed, project)
        target = min(reached + draw.randint(1, 2 * STEPS // (kills + 2)), STEPS - 1)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= target:
                break
        process.kill()
        process.communicate()
        reached = int(line) // 3 * 3
        if (tmp_path / "killed").exists():
            saved = json.loads((tmp_path / "killed").read_text())
            assert saved["seen"] == uninterrupted["seen"][: len(saved["seen"])]
    assert finish(killed, project) == uninterrupted
    epochs = min(LaneState.parse(text).epoch for text in uninterrupted["state"]["lanes"].values())
    seen = Counter(uninterrupted["seen"])
    assert epochs >= 3 and set(seen) == set(keys) and min(seen.values()) >= epochs
    assert max(seen.values()) <= max(LaneState.parse(t).epoch for t in uninterrupted["state"]["lanes"].values()) + 1


def finish(run: dict[str, Any], project: Path) -> dict[str, Any]:
    process = start(run, project)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(Path(run["checkpoint"]).read_text())


assert (FRAMES, HEIGHT, WIDTH) == (5, 32, 48)  # the shape that the program asks for
