"""Bytes to frames: PyAV decoding, choice of the clip, frame rate, and a resize-and-crop that never stretches."""

from __future__ import annotations

import functools
import io
import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import TypeVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from anyflow.errors import first_line

T = TypeVar("T")

MAX_PIXELS = 2**26
"""Of a frame (8192 x 8192): a small file that claims more is a bomb, not footage."""
MAX_RATE = 1000
"""Frames a second: a file that claims more would be decoded for ever to fill a clip."""


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
        # Naming the format spares FFmpeg its guesses, a tenth of the time that a small clip takes.
        known = "mp4" if data[4:8] == b"ftyp" else None
        with av.open(io.BytesIO(data), "r", format=known) as container:
            written = _fill(container, open_stream(container), shape, seed, out)
    except (av.FFmpegError, ValueError, IndexError, OverflowError) as error:
        raise DecodeError(f"the video cannot be decoded ({first_line(error)})") from error
    if written < shape.frames:
        raise DecodeError(f"too few frames: {written} where {shape.frames} are needed")
    return out


def open_stream(container: av.container.InputContainer) -> av.VideoStream:
    """A container's video, to be decoded by one thread, with damage and bombs refused.

    Raises:
        DecodeError: there is none, or it claims a rate that no camera has.
    """
    if not container.streams.video:
        raise DecodeError("the file holds no video")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise DecodeError("its codec is unknown")
    if (stream.average_rate or 0) > MAX_RATE:
        raise DecodeError(f"the video claims {float(stream.average_rate or 0):.0f} frames a second")
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "NONE"
    # Without "explode", damage is painted over in silence.
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
    return stream


def _fill(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    shape: ClipShape,
    seed: int | None,
    out: np.ndarray,
) -> int:
    """Decode into ``out``; return the number of frames written."""
    rate = stream.average_rate or stream.guessed_rate
    spacing = 1 / Fraction(shape.fps).limit_denominator(100_000) if shape.fps and rate else None
    if spacing is not None and rate and spacing * rate == 1:
        spacing = None
    first = _first_frame(stream, rate, spacing, shape.frames, seed)
    frames = _frames_from(container, stream, rate, first)
    fitter = FrameFitter(shape.height, shape.width, float(stream.sample_aspect_ratio or 1))
    written = 0
    if spacing is None or not rate:
        for frame, row in zip(frames, out, strict=False):
            fitter.write(frame, row)
            written += 1
        return written
    for frame, count in resampled(with_ends(frames, stream, rate, Fraction(first) / rate), 1 / spacing):
        end = min(written + count, shape.frames)
        fitter.write(frame, out[written])
        out[written + 1 : end] = out[written]
        written = end
        if written == shape.frames:
            break
    return written


def resampled(shown: Iterable[tuple[T, Fraction]], fps: Fraction) -> Iterator[tuple[T, int]]:
    """Change the frame rate: which frames are on show at the times k / fps, and at how many of them each is.

    Args:
        shown: frames, each with the time in seconds at which the next one takes its place.
        fps: frames a second of the result.
    """
    written = 0
    for frame, until in shown:
        wanted = math.ceil(until * fps)
        if wanted > written:
            yield frame, wanted - written
            written = wanted


def with_ends(
    frames: Iterator[av.VideoFrame], stream: av.VideoStream, rate: Fraction, first: Fraction, stamped: bool = True
) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Pair each frame with the time, in seconds after the clip's start, at which the next one takes its place.

    Times are those of the frames, so a variable rate is followed. A quarter of a frame is taken off: containers round.

    Args:
        frames: from the clip's start on.
        stream: they come from it.
        rate: frames a second, on average.
        first: seconds from the stream's start to the clip's.
        stamped: whether the frames carry times; else they are counted.
    """
    tick = (stream.time_base or Fraction(0)) if stamped else Fraction(0)
    start = (stream.start_time or 0) * tick + first
    previous, end = None, Fraction(0)
    for number, frame in enumerate(frames):
        time = frame.pts * tick - start if frame.pts is not None and tick else Fraction(number) / rate
        if previous is not None:
            yield previous, time - 1 / (4 * rate)
        previous, end = frame, time + 3 / (4 * rate)
    if previous is not None:
        yield previous, end


def _first_frame(
    stream: av.VideoStream, rate: Fraction | None, spacing: Fraction | None, frames: int, seed: int | None
) -> int:
    """Index of the source frame at which the clip starts."""
    available = _frame_count(stream, rate)
    if seed is None or not rate or not available:
        return 0
    needed = frames if spacing is None else math.ceil((frames - 1) * spacing * rate) + 1
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
) -> Iterator[av.VideoFrame]:
    """Yield the frames from number ``first`` on, seeking to the group of pictures that holds it."""
    if first == 0 or not rate or not stream.time_base:
        yield from islice(container.decode(stream), first, None)
        return
    yield from frames_from(container, stream, rate, Fraction(first) / rate)


def frames_from(
    container: av.container.InputContainer, stream: av.VideoStream, rate: Fraction, start: Fraction
) -> Iterator[av.VideoFrame]:
    """The frames from ``start`` seconds on, by a seek to the key frame before it.

    Raises:
        DecodeError: the video carries no times.
    """
    if not stream.time_base:
        raise DecodeError("the video carries no time stamps, so a part of it cannot be found")
    begin = (stream.start_time or 0) + start / stream.time_base
    container.seek(math.floor(begin), stream=stream, backward=True)
    half = 1 / (2 * rate * stream.time_base)
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts >= begin - half:
            yield frame


def shown_size(stream: av.VideoStream, frame: av.VideoFrame | None) -> tuple[int, int]:
    """(height, width) as shown: in square pixels, and upright where the first frame says that the camera was turned."""
    height, width = stream.height, round(stream.width * float(stream.sample_aspect_ratio or 1))
    return (width, height) if frame is not None and round(frame.rotation / 90) % 2 else (height, width)


_threads = threading.local()


def reformatter() -> VideoReformatter:
    """This thread's scaler, kept from frame to frame and clip to clip.

    A frame's own one would be set up anew for every frame, which takes longer than decoding a small frame.
    """
    if not hasattr(_threads, "reformatter"):
        _threads.reformatter = VideoReformatter()
    return _threads.reformatter


class FrameFitter:
    """Scales a frame so that it covers the size asked for, then cuts its centre out.

    Args:
        height, width: pixels of the result, which are square.
        aspect: width of a source pixel over its height.
    """

    def __init__(self, height: int, width: int, aspect: float) -> None:
        self.height, self.width, self.aspect = height, width, aspect
        self._reformat = functools.partial(reformatter().reformat, format="rgb24", threads=1)
        self._turns: int | None = None

    def write(self, frame: av.VideoFrame, out: np.ndarray) -> None:
        """Write ``frame`` into ``out``, uint8 [H, W, 3], contiguous; upright, as telephones note it beside a video."""
        if self._turns is None:  # a video's frames are all turned alike
            self._turns = round(frame.rotation / 90) % 4
        if self._turns == 0:
            self._write(frame, out, self.height, self.width)
            return
        height, width = (self.width, self.height) if self._turns % 2 else (self.height, self.width)
        lying = np.empty((height, width, 3), dtype=np.uint8)
        self._write(frame, lying, height, width)
        out[:] = np.rot90(lying, self._turns)

    def _write(self, frame: av.VideoFrame, out: np.ndarray, height: int, width: int) -> None:
        if (frame.height, frame.width) == (height, width) and self.aspect == 1:
            scaled, top, left = self._reformat(frame), 0, 0
        else:
            shown = frame.width * self.aspect
            scale = max(height / frame.height, width / shown)
            tall, wide = max(height, round(frame.height * scale)), max(width, round(shown * scale))
            # AREA averages on the way down (no aliasing); BICUBIC is smooth on the way up.
            scaled = self._reformat(frame, wide, tall, interpolation="AREA" if scale < 1 else "BICUBIC")
            top, left = (tall - height) // 2, (wide - width) // 2
        plane = scaled.planes[0]
        lines = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
        out.reshape(height, 3 * width)[:] = lines[top : top + height, 3 * left : 3 * (left + width)]
