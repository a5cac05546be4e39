"""Bytes to frames: PyAV decoding, choice of the clip, frame rate, and a resize-and-crop that never stretches."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

AV_TIME_BASE = 1_000_000


class DecodeError(Exception):
    """A clip that cannot be used; the message is the reason, in words."""


@dataclass(frozen=True)
class ClipShape:
    """What a decoded clip must look like.

    Args:
        frames: number of frames.
        height, width: pixels.
        fps: frames a second after resampling in time; None takes the source's frames one by one.
    """

    frames: int
    height: int
    width: int
    fps: float | None = None


def decode_clip(data: bytes, shape: ClipShape, seed: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
    """Decode one clip of ``shape`` from the bytes of a video file.

    Args:
        data: the file (mp4 or whatever FFmpeg knows).
        shape: frames, size and frame rate of the result.
        seed: where the clip starts in a longer video: uniformly drawn from this seed; None starts at the beginning.
        out: uint8 [F, H, W, 3] to write into; a new array by default.

    Returns:
        uint8 [F, H, W, 3], RGB. The frame at time k / fps is the one on show at that time. The picture covers the asked
        size and is cropped at its centre: its aspect is never changed.

    Raises:
        DecodeError: the bytes are corrupt, hold no video, or too few frames.
    """
    if out is None:
        out = np.empty((shape.frames, shape.height, shape.width, 3), dtype=np.uint8)
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                raise DecodeError("the file holds no video")
            stream = container.streams.video[0]
            stream.thread_count = 1
            stream.codec_context.thread_type = "NONE"
            written = _fill(container, stream, shape, seed, out)
    except (av.FFmpegError, ValueError, IndexError, OverflowError) as error:
        raise DecodeError(f"the video cannot be decoded ({_first_line(error)})") from error
    if written < shape.frames:
        raise DecodeError(f"too few frames: {written} where {shape.frames} are needed")
    return out


def _fill(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    shape: ClipShape,
    seed: int | None,
    out: np.ndarray,
) -> int:
    """Decode into ``out``; return the number of frames written."""
    rate = stream.average_rate or stream.guessed_rate
    spacing = 1 / Fraction(shape.fps).limit_denominator(100_000) if shape.fps else None
    if spacing is not None and rate and spacing == 1 / Fraction(rate):
        spacing = None
    first = _first_frame(stream, rate, spacing, shape.frames, seed)
    fitter = _Fitter(shape.height, shape.width)
    written = 0
    for index, frame in _frames_from(container, stream, rate, first):
        if spacing is None:
            wanted = written + 1
        else:
            # Frame `index` is on show for [index, index + 1) / rate: it serves every asked time within.
            assert rate is not None
            elapsed = Fraction(index - first + 1) / Fraction(rate)
            wanted = min(math.ceil(elapsed / spacing), shape.frames)
        if wanted > written:
            fitter.write(frame, out[written])
            out[written + 1 : wanted] = out[written]
            written = wanted
        if written >= shape.frames:
            break
    return written


def _first_frame(
    stream: av.VideoStream, rate: Fraction | None, spacing: Fraction | None, frames: int, seed: int | None
) -> int:
    """Index of the source frame at which the clip starts."""
    available = _frame_count(stream, rate)
    if seed is None or not rate or not available:
        return 0
    needed = frames if spacing is None else math.floor((frames - 1) * spacing * rate) + 1
    room = available - needed
    if room <= 0:
        return 0
    raw = int(np.random.PCG64(np.random.SeedSequence(seed)).random_raw())
    return raw % (room + 1)


def _frame_count(stream: av.VideoStream, rate: Fraction | None) -> int:
    """Frames in the stream as its header says, else by its duration; 0 if unknown."""
    if stream.frames:
        return int(stream.frames)
    if stream.duration and stream.time_base and rate:
        return int(stream.duration * stream.time_base * rate)
    return 0


def _frames_from(
    container: av.container.InputContainer, stream: av.VideoStream, rate: Fraction | None, first: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (index, frame) from frame ``first`` on, seeking to the group of pictures that holds it."""
    if first == 0 or not rate or not stream.time_base:
        for index, frame in enumerate(container.decode(stream)):
            if index >= first:
                yield index, frame
        return
    start = stream.start_time or 0
    target = start + round(Fraction(first) / rate / stream.time_base)
    container.seek(target, stream=stream, backward=True)
    half = 1 / (2 * rate * stream.time_base)
    index = first
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts < target - half:
            continue
        yield index, frame
        index += 1


class _Fitter:
    """Scales a frame so that it covers the size asked for, then cuts its centre out."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def write(self, frame: av.VideoFrame, out: np.ndarray) -> None:
        """Write ``frame`` into ``out``, uint8 [H, W, 3]."""
        height, width = self.height, self.width
        if (frame.height, frame.width) == (height, width):
            out[:] = frame.to_ndarray(format="rgb24")
            return
        scale = max(height / frame.height, width / frame.width)
        tall, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
        # AREA averages on the way down (no aliasing); BICUBIC is smooth on the way up.
        scaled = frame.reformat(wide, tall, "rgb24", interpolation="AREA" if scale < 1 else "BICUBIC")
        top, left = (tall - height) // 2, (wide - width) // 2
        out[:] = scaled.to_ndarray()[top : top + height, left : left + width]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
