"""The loader's speed against the decoder's own, on the same bytes."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from anyflow.data.decode import ClipShape
from anyflow.data.order import Order
from anyflow.data.reader import ShardReader, split_folders
from anyflow.data.batches import ClipDataset
from anyflow.data.stream import ClipStream

WARM_UP = 3


def loader_benchmark(
    card: str | Path,
    *,
    split: str = "train",
    batch_size: int = 8,
    frames: int = 17,
    height: int = 64,
    width: int = 96,
    clips: int = 256,
) -> dict[str, Any]:
    """Time the stream and bare PyAV in turn, on the same clips, in this process.

    Bare PyAV decodes on one thread and makes one RGB array a frame, in two ways: with one scaler for a whole clip,
    which is the best that it can do and what the ratios are against, and with ``frame.to_ndarray(format="rgb24")``,
    the usual way, which sets a scaler up for every frame. The three take turns batch by batch, so that a slow spell of
    the machine hits all; each is judged by its median batch.

    Args:
        card, split: the data.
        batch_size, frames, height, width: the batches that the stream makes.
        clips: clips that each decodes, in whole batches.

    Returns:
        {"loader_clips_per_second", "pyav_clips_per_second", "pyav_usual_clips_per_second", "ratio", "cpu_ratio",
        "clips"}; the second ratio is of CPU seconds, which say the same on a busy machine.

    Raises:
        UserError: the data are missing or fewer than a batch.
    """
    reader = ShardReader(split_folders(card, split))
    plan = Order(reader.identities(), seed=0, global_batch=batch_size)
    steps = WARM_UP + max(1, clips // batch_size)
    stream = ClipStream(ClipDataset(reader, plan, ClipShape(frames, height, width)), steps)
    batches = iter(stream.loader())
    wall: dict[str, list[float]] = {"loader": [], "pyav": [], "pyav_usual": []}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    for step in range(steps):
        epoch, positions = plan.batch_positions(step)
        places = [plan.sample_at(epoch, position) for position in positions]
        files = [reader.read(shard, reader.sample(shard, number), "mp4") for shard, number in places]
        jobs: dict[str, Callable[[], Any]] = {
            "loader": partial(next, batches),
            "pyav": partial(_decode_all, files, usual=False),
            "pyav_usual": partial(_decode_all, files, usual=True),
        }
        for name in random.Random(step).sample(sorted(jobs), len(jobs)):
            started, started_cpu = time.perf_counter(), time.thread_time()
            jobs[name]()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.thread_time() - started_cpu)
    seconds, cpu_seconds = (
        {name: float(np.median(values[WARM_UP:])) for name, values in timed.items()} for timed in (wall, cpu)
    )
    return {
        **{f"{name}_clips_per_second": batch_size / value for name, value in seconds.items()},
        "ratio": seconds["pyav"] / seconds["loader"],
        "cpu_ratio": cpu_seconds["pyav"] / cpu_seconds["loader"],
        "clips": (steps - WARM_UP) * batch_size,
    }


def _decode_all(files: list[bytes], usual: bool) -> list[list[np.ndarray]]:
    return [decode_bare(file, usual) for file in files]


def decode_bare(data: bytes, usual: bool = False) -> list[np.ndarray]:
    """All frames of a video file as RGB arrays, by PyAV alone on one thread.

    Args:
        data: the file.
        usual: convert each frame by itself.
    """
    reformat = VideoReformatter().reformat
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = container.decode(video=0)
        if usual:
            return [frame.to_ndarray(format="rgb24") for frame in frames]
        return [reformat(frame, format="rgb24", threads=1).to_ndarray() for frame in frames]
