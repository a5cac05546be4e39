"""What a chunk of a streamed video costs while the video grows, with a window that moves and with one that only grows.

``moving window``: what sampling does; a chunk looks back at no more frames than a training clip has.
``whole past``: a chunk looks back at every frame before it, the old ones compressed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from anyflow.errors import UserError
from experiments.bench.compare import held_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from anyflow.backbone.codec import Codec
    from anyflow.backbone.protocol import FlowMapBackbone

PROMPT = "A green car drives fast and keeps the middle lane. A blue car is behind in the left lane."


def stream_benchmark(
    codec: Codec,
    backbone: FlowMapBackbone,
    shift: float,
    *,
    height: int,
    width: int,
    chunks: int = 24,
    num_steps: int = 4,
    repeats: int = 3,
) -> dict[str, Any]:
    """Sample one video chunk by chunk, decoding included, both ways.

    Args:
        codec: of the network.
        backbone: a causal network.
        shift: of its schedule.
        height: pixel rows.
        width: pixel columns.
        chunks: of the video.
        num_steps: of the sampler, for every chunk.
        repeats: videos that are timed each way, taken in turn so that a slow spell of the machine hits both.

    Returns:
        Per way, a value a chunk: ``frames``, ``seconds`` (the fastest) and ``bytes`` (tensors held at most while it is
        made, those of earlier chunks included, weights not); ``growth`` of both: the last quarter of the chunks (their
        median) beside the quarter before the middle. ``full`` is the first chunk with a full window, from 1.

    Raises:
        UserError: the network makes all frames at once.
    """
    if not backbone.is_causal:
        raise UserError("--model names a bidirectional network, which makes all frames at once: give a causal one")
    pattern = backbone.transformer.config.chunk_partition
    frames = sum(pattern) + (chunks - len(pattern)) * max(pattern)
    whole = copy.deepcopy(backbone)
    whole.fit_clip(frames)
    device = str(backbone.device.type)
    networks = {"moving window": backbone, "whole past": whole}

    def stream(network: FlowMapBackbone, frames: int = frames) -> Iterator[Tensor]:
        return _stream(codec, network, (frames, height, width), num_steps, shift)

    ways: dict[str, dict[str, list[float]]] = {}
    for name, network in networks.items():
        list(stream(network, sum(pattern)))  # warm up
        ways[name] = {"bytes": _held(stream(network), chunks, device)}
    runs = [{name: list(_timed(stream(network))) for name, network in networks.items()} for _ in range(repeats)]
    for name, way in ways.items():
        way["frames"] = [frames for frames, _ in runs[0][name]]
        way["seconds"] = [
            min(seconds for _, seconds in same) for same in zip(*(run[name] for run in runs), strict=True)
        ]
    growth = {name: {key: _growth(way[key]) for key in ("seconds", "bytes")} for name, way in ways.items()}
    return {
        "ways": ways,
        "growth": growth,
        "full": len(pattern),
        "chunks": chunks,
        "num_steps": num_steps,
        "device": device,
    }


def plot_stream(result: dict[str, Any], path: Path) -> None:
    """Seconds and memory of each chunk, both ways."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    try:
        for axis, key, unit, title in zip(
            axes, ("seconds", "bytes"), (1.0, 1e6), ("seconds a chunk", "MB held while a chunk is made"), strict=True
        ):
            for (name, way), colour, marker in zip(
                result["ways"].items(), ("#185abe", "#b07010"), ("o", "s"), strict=True
            ):
                values = [value / unit for value in way[key]]
                axis.plot(range(1, len(values) + 1), values, marker=marker, markersize=4, color=colour, label=name)
            axis.axvline(result["full"], color="#4a4f57", linestyle=":", linewidth=1, label="window full")
            axis.set_xlabel("chunk")
            axis.set_title(title, fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
        axes[0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def _stream(
    codec: Codec, network: FlowMapBackbone, size: tuple[int, int, int], num_steps: int, shift: float
) -> Iterator[Tensor]:
    """The frames of one prompt; ``size`` is latent frames, pixel rows and columns."""
    import torch

    from anyflow.backbone.stream import stream_video

    _, *latent = codec.latent_shape(1, *size[1:])
    noise = torch.randn(1, size[0], *latent, generator=torch.Generator().manual_seed(0)).to(codec.device)
    return stream_video(network, codec, [PROMPT], noise, num_steps, shift)


def _held(parts: Iterator[Tensor], chunks: int, device: str) -> list[float]:
    """Bytes held at most while each chunk is made, what earlier ones left behind included."""
    kept, held = 0, []
    for _ in range(chunks):
        peak, left = held_bytes(lambda: next(parts), device)
        held.append(float(kept + peak))
        kept += left
    return held


def _timed(parts: Iterator[Tensor]) -> Iterator[tuple[int, float]]:
    """Frames and seconds of each part."""
    started = time.perf_counter()
    for part in parts:
        frames = part.cpu().shape[1]
        yield frames, time.perf_counter() - started
        started = time.perf_counter()


def _growth(values: list[float]) -> float:
    """The last quarter beside the one before the middle."""
    quarter = max(1, len(values) // 4)
    return median(values[-quarter:]) / median(values[quarter : 2 * quarter])
