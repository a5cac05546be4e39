"""The same import and the same encoding by this process, its pool, and Ray workers: wall seconds, side by side."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from anyflow.system.engines import Engine

WORKERS = (1, 2)
COPIES = 2
"""Files that each clip is imported from: the more, the less the start counts."""
CLIPS_PER_PART = 30
"""Of an encoding here: the usual 256 would make two parts of the shipped clips, too few to share."""


def engines_benchmark(card: str, model: str = "data/models/tiny") -> dict[str, Any]:
    """Import a card's clips as files, and encode them, by each engine.

    Every time includes the start of the workers and what they load. All make the same bytes.

    Args:
        card: whose training clips are taken.
        model: whose codec encodes.

    Returns:
        {"cores", "import", "encode"}: of each, {engine: {"seconds", "clips_per_second"}}.
    """
    result: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "import": {}, "encode": {}}
    with tempfile.TemporaryDirectory(prefix="anyflow-bench-") as place:
        footage = Path(place) / "footage"
        clips = _write_files(card, footage)
        for number, (name, engine) in enumerate(_engines()):
            out = Path(place) / str(number)
            result["import"][name] = _timed(lambda: _import(footage, out / "set", engine), clips)  # noqa: B023
            result["encode"][name] = _timed(lambda: _encode(card, model, out, engine), clips // COPIES)  # noqa: B023
            print(f"{name}: {result['import'][name]}, {result['encode'][name]}", file=sys.stderr, flush=True)
    return result


def told(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    lines = [f"engines, on {result['cores']} cores, start included:"]
    for what in ("import", "encode"):
        for name, facts in result[what].items():
            lines.append(f"  {what:<7} {name:<16} {facts['seconds']:7.1f} s {facts['clips_per_second']:7.1f} clips/s")
    return lines


def _engines() -> Iterator[tuple[str, Engine]]:
    from anyflow.system.pool import LocalEngine
    from anyflow.system.ray_engine import RayEngine

    yield "this process", LocalEngine(0)
    for workers in WORKERS:
        yield f"pool of {workers}", LocalEngine(workers)
    for workers in WORKERS:
        with _cluster(workers):
            yield f"{workers} Ray worker{'s' * (workers > 1)}", RayEngine("auto")


@contextmanager
def _cluster(workers: int) -> Iterator[None]:
    """A Ray cluster in this machine alone, with a token of its own, while the block lasts."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # a process reads it once
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's usual 15 would lose to whatever else runs here
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    try:
        yield
    finally:
        ray.shutdown()


def _write_files(card: str, folder: Path) -> int:
    from anyflow.data.reader import find_split
    from anyflow.data.shards import load_index, read_clip

    split = find_split(card, "train")
    folder.mkdir()
    count = 0
    for shard, sample in load_index(split.folder):
        for _ in range(COPIES):
            (folder / f"{count:06d}.mp4").write_bytes(read_clip(split.folder, shard, sample).mp4 or b"")
            count += 1
    return count


def _import(footage: Path, out: Path, engine: Engine) -> None:
    from anyflow.data.importing.run import import_dataset
    from experiments.bench.footage import usual_options

    import_dataset(footage, out, usual_options(), engine=engine)


def _encode(card: str, model: str, out: Path, engine: Engine) -> None:
    import torch

    from anyflow.data import encode
    from anyflow.data.decode import ClipShape
    from anyflow.training.encoding import EncodingJob
    from anyflow.training.encoding import encode as encode_by

    shapes = (ClipShape(17, 64, 96),)
    with mock.patch.object(encode, "CLIPS_PER_SHARD", CLIPS_PER_PART):
        encode_by(EncodingJob(card, "train", model, torch.float32, torch.float32, shapes, out), engine)


def _timed(work: Callable[[], None], clips: int) -> dict[str, float]:
    started = time.monotonic()
    work()
    seconds = time.monotonic() - started
    return {"seconds": seconds, "clips_per_second": clips / seconds}
