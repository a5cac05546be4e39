"""The loader's speed against the decoder's own, on the same bytes."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from anyflow.data.decode import ClipShape
from anyflow.data.plan import Plan
from anyflow.data.reader import ShardReader, split_folders
from anyflow.data.stream import ClipDataset, ClipStream

WARM_UP = 3


def loader_benchmark(
    card: str | Path,
    *,
    split: str = "train",
    batch_size: int = 8,
    frames: int = 17,
    height: int = 64,
    width: int = 96,
    clips: int = 512,
) -> dict[str, Any]:
    """Time the stream and bare PyAV in turn, on the same clips, in this process.

    Bare PyAV is ``av.open``, one decoding thread, and one RGB array a frame: what nobody can do without. The two take
    turns batch by batch, so that a slow spell of the machine hits both; each is judged by its median batch.

    Args:
        card, split: the data.
        batch_size, frames, height, width: the batches that the stream makes.
        clips: clips that each decodes, in whole batches.

    Returns:
        {"loader_clips_per_second", "pyav_clips_per_second", "ratio", "clips"}.

    Raises:
        UserError: the data are missing or fewer than a batch.
    """
    reader = ShardReader(split_folders(card, split))
    plan = Plan(reader.planned(), seed=0, global_batch=batch_size)
    steps = WARM_UP + max(1, clips // batch_size)
    stream = ClipStream(ClipDataset(reader, plan, ClipShape(frames, height, width)), steps)
    batches = iter(stream.loader())
    loader_seconds: list[float] = []
    pyav_seconds: list[float] = []
    for step in range(steps):
        epoch, positions = plan.batch_positions(step)
        places = [plan.sample_at(epoch, position) for position in positions]
        files = [reader.read(shard, reader.sample(shard, number), "mp4") for shard, number in places]
        for ours_now in (True, False) if step % 2 else (False, True):
            started = time.perf_counter()
            if ours_now:
                next(batches)
            else:
                decoded = [decode_bare(file) for file in files]
            (loader_seconds if ours_now else pyav_seconds).append(time.perf_counter() - started)
        del decoded
    ours, bare = (batch_size / float(np.median(seconds[WARM_UP:])) for seconds in (loader_seconds, pyav_seconds))
    return {
        "loader_clips_per_second": ours,
        "pyav_clips_per_second": bare,
        "ratio": ours / bare,
        "clips": (steps - WARM_UP) * batch_size,
    }


def decode_bare(data: bytes) -> list[np.ndarray]:
    """All frames of a video file as RGB arrays, by PyAV alone on one thread."""
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].thread_count = 1
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
