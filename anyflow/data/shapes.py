"""The shape of a clip: what a shard's index notes of each sample, and which of a run's shapes it is brought to.

A run may take clips of several shapes (``data.buckets``). A clip goes to the one that crops least of its picture; among
equals to one that it need not be enlarged for; among these to the one with the most tokens that it has enough frames
for. It is scaled and cropped to it, never stretched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import av

from anyflow.data.decode import ClipShape, DecodeError, open_stream
from anyflow.data.picture import shown_size

Noted = tuple[float, ...]
"""Of footage (frames, height, width, frames a second), as shown; of latents their (F, C, H, W); empty if unknown."""

SAME_CROP = 0.05
"""Two shapes that keep the same share of a picture up to this are equals: 480p and 720p differ by 0.03."""


def note_shape(parts: Mapping[str, bytes]) -> Noted:
    """The shape of a sample, given by its members; empty if they cannot be read."""
    if "mp4" in parts:
        return note_file(io.BytesIO(parts["mp4"]))
    if "safetensors" in parts:
        return _of_latents(parts["safetensors"])
    return ()


def note_file(file: Any) -> Noted:
    """The shape of a video, given by its file; empty if it cannot be read."""
    try:
        with av.open(file, "r") as container:
            stream = open_stream(container)
            first = next(iter(container.decode(stream)), None)
            if first is None or not stream.average_rate:
                return ()
            # A Matroska file counts no frames.
            frames = stream.frames or int((container.duration or 0) / 1e6 * stream.average_rate + 0.01)
            if frames < 1:
                return ()
            return frames, *shown_size(stream, first), round(float(stream.average_rate), 3)
    except (av.FFmpegError, DecodeError, ValueError, IndexError, OverflowError):
        return ()


def _of_latents(data: bytes) -> Noted:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(data)["latents"].shape
    except (SafetensorError, KeyError, ValueError, TypeError):
        return ()


def tokens(shape: ClipShape, side: int = 16) -> int:
    """Tokens of a clip in the network: one for 4 frames (the first alone) x ``side`` x ``side`` pixels.

    Which of two shapes has more of them, and by how much, is the same for every ``side`` that fits both.
    """
    return ((shape.frames - 1) // 4 + 1) * (shape.height // side) * (shape.width // side)


def frames_needed(shape: ClipShape, fps: float) -> int:
    """Frames that a clip of ``fps`` must have to fill a shape."""
    stride = fps / shape.fps if shape.fps else 1.0
    return math.floor((shape.frames - 1) * stride + 1e-6) + 1


def choose_shape(clip: Noted, shapes: Sequence[ClipShape]) -> int | None:
    """The number of the shape that a clip of footage is brought to; None if it has too few frames for all of them."""
    frames, height, width, fps = clip
    fitting = [number for number, shape in enumerate(shapes) if frames_needed(shape, fps) <= frames]
    if not fitting:
        return None
    least = min(_cropped(height, width, shapes[number]) for number in fitting)
    equals = [number for number in fitting if _cropped(height, width, shapes[number]) <= least + SAME_CROP]

    def preference(number: int) -> tuple[float, int]:
        shape = shapes[number]
        enlarged = max(shape.height / height, shape.width / width, 1.0)
        return enlarged, -tokens(shape)

    return min(equals, key=preference)


def _cropped(height: float, width: float, shape: ClipShape) -> float:
    """The share of a picture that is cut off when it covers a shape."""
    ours, theirs = shape.width / shape.height, width / height
    return 1 - min(ours, theirs) / max(ours, theirs)
