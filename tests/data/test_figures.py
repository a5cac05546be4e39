"""The figures of the data engine: that they are what they say; the large ones print theirs (``pytest -s -m slow``)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from drive_files import comma2k19, vpt
from footage_files import lerobot_v3
from tiny_shards import card_of

from experiments.bench import tars
from experiments.bench.footage import import_benchmark, usual_options
from experiments.bench.latents import latents_benchmark
from experiments.bench.worker_memory import memory_benchmark

SETS: dict[str, Callable[..., Path]] = {
    "lerobot": lambda folder, clips, frames: lerobot_v3(folder, episodes=clips // 20, frames=frames),
    "comma2k19": lambda folder, clips, frames: comma2k19(folder, routes=clips // 100, segments=10, frames=frames),
    "vpt": lambda folder, clips, frames: vpt(folder, videos=clips // 10, frames=frames),
}
"""A thousand clips of 17 frames: recordings of 170 (LeRobot's have two cameras)."""


def test_latents_are_read_and_counted() -> None:
    figures = latents_benchmark(clips=64, batch_size=8, rounds=1)
    assert figures["clips"] == 64 and figures["clips_per_second"] > 0
    assert figures["bytes_per_clip"] > 2 * 5 * 16 * 8 * 12


def test_tars_are_read_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_from_server", lambda folder, clips, rounds: {})  # seconds until it listens
    figures = tars.tars_benchmark(clips=32, rounds=1)
    assert set(figures["disk"]) == {"indexed", "streamed", "webdataset", "decoding"}
    assert all(rates["cpu_clips_per_second"] > 0 for rates in figures["disk"].values())


def test_a_workers_memory_is_followed_and_drawn(shards: Path, tmp_path: Path) -> None:
    figures = memory_benchmark(str(card_of(shards)), tmp_path, epochs=3, batch_size=4)
    assert figures["plot"].stat().st_size > 0 and len(figures["mib"]) == 3
    assert min(figures["mib"]) > 10


def test_an_import_is_timed_beside_its_limits(tmp_path: Path) -> None:
    figures = import_benchmark(vpt(tmp_path / "vpt", videos=2, frames=34), usual_options())
    assert figures["clips"] == 4
    assert figures["decoding_clips_per_second"] > figures["coding_clips_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_thousand_clips_are_imported(name: str, tmp_path: Path) -> None:
    figures = import_benchmark(SETS[name](tmp_path / name, 1000, 170), usual_options())
    assert figures["clips"] == 1000
    print(f"\n{name}: {json.dumps(figures)}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_killed_import_of_a_thousand_clips_goes_on(name: str, tmp_path: Path, project: Path) -> None:
    """SIGKILL once the first shards are whole; the second start makes the same bytes as one that was never stopped."""
    source = SETS[name](tmp_path / "source", 1000, 170)
    out = tmp_path / "set"
    options = ["--frames", "17", "--size", "96x64", "--default-caption", "Footage.", "--keep-duplicates"]
    words = [sys.executable, "-m", "anyflow", "data", "import", str(source), "--to", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(project)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(words, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    process = start()
    work = out.with_name(f".{out.name}.import")
    deadline = time.monotonic() + 500
    while len(done := list(work.glob("*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in done}
    process = start()
    while process.poll() is None and work.exists():
        touched = [path for path, written in kept.items() if path.exists() and path.stat().st_mtime_ns != written]
        assert not touched, "what was done is not done again"
        time.sleep(0.05)
    assert process.wait() == 0, process.communicate()
    broken = contents(out)
    shutil.rmtree(out)
    process = start()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert contents(out) == broken
