"""Cached latents: the stream's speed on one core beside that of reading the same bytes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LATENTS = (5, 16, 8, 12)
"""Of the embedded model: 17 frames of 96 x 64."""


def latents_benchmark(clips: int = 2048, batch_size: int = 16, rounds: int = 5) -> dict[str, Any]:
    """Time the stream over shards of latents, and bare reads of the same members in the same order, in turn.

    Args:
        clips: of random latents, in a temporary folder (the files are in the system's cache: memory, not the disk, is
            measured). batch_size: of the stream. rounds: over all clips; the median counts.

    Returns:
        {"clips_per_second", "reading_clips_per_second", "ratio", "bytes_per_clip", "clips"}: clips by seconds of CPU,
        which say the same on a busy machine.
    """
    with tempfile.TemporaryDirectory(prefix="anyflow-bench-") as place:
        folder = Path(place) / "latents"
        size = _write(folder, clips)
        ways = _ways(folder, clips, batch_size)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):  # the first warms up
            for name, way in ways.items():
                started = time.thread_time()
                way()
                seconds[name].append(time.thread_time() - started)
        best = {name: sorted(values[1:])[rounds // 2] for name, values in seconds.items()}
    return {
        "clips_per_second": clips / best["stream"],
        "reading_clips_per_second": clips / best["reading"],
        "ratio": best["reading"] / best["stream"],
        "bytes_per_clip": size,
        "clips": clips,
    }


def _write(folder: Path, clips: int) -> int:
    """Shards of latents; returns the bytes of a clip."""
    import numpy as np
    from safetensors.numpy import save

    from anyflow.data.shards import write_samples

    draw = np.random.default_rng(0)
    text = {"caption": "A green car keeps its lane.", "fps": 8.0, "attributes": {"speed": "slow"}, "controls": {}}
    description = json.dumps(text).encode()
    samples = (
        (
            f"clip-{n:06d}",
            {"safetensors": save({"latents": draw.standard_normal(LATENTS).astype("f2")}), "json": description},
        )
        for n in range(clips)
    )
    return write_samples(samples, folder, "latents", per_shard=256).bytes // clips


def _ways(folder: Path, clips: int, batch_size: int) -> dict[str, Callable[[], None]]:
    from anyflow.data.decode import ClipShape
    from anyflow.data.order import Order
    from anyflow.data.reader import ShardReader
    from anyflow.data.batches import ClipDataset
    from anyflow.data.stream import ClipStream

    reader = ShardReader([folder])
    plan = Order(reader.identities(), seed=0, global_batch=batch_size)
    dataset = ClipDataset(reader, plan, ClipShape(17, 64, 96), latent_shape=LATENTS)
    steps = clips // batch_size
    places = [plan.sample_at(0, position) for position in range(steps * batch_size)]
    files = {number: os.open(path, os.O_RDONLY) for number, (path, _) in enumerate(reader.shards)}

    def stream() -> None:
        for batch in ClipStream(dataset, steps).loader():
            assert len(batch["key"]) == batch_size

    def reading() -> None:
        for shard, number in places:
            for offset, size in reader.sample(shard, number).parts.values():
                os.pread(files[shard], size, offset)

    return {"stream": stream, "reading": reading}
