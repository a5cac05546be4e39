"""A recording's pictures at a steady rate: any container, a raw stream, a span of a tar, a table's cell, or images."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from typing import Any

import av
import numpy as np

from anyflow.data.clip import MAX_GOP
from anyflow.data.decode import DecodeError, FrameFitter, frames_from, open_stream, resampled, shown_size, with_ends
from anyflow.data.importing.recording import Footage, ImageFiles, ParquetCell, ParquetImages, Recording, VideoFile
from anyflow.data.importing.tables import picture_cells, picture_times, read_cell
from anyflow.errors import first_line

KEPT_GOP = 30
"""The longest distance between key frames with which a file is kept as it is: a clip is cut out of it at random."""

MAX_GAP = 10
"""Seconds that one picture may stay: two frames that are a year apart would be filled up with still ones."""
RATE_APART = 0.01
"""A video's rate may differ by this share from the one that its description states (29.97 for 30)."""
PIXEL_BUDGET = 10**13
"""Pixels of one recording: a hundred hours of 832x480 at 60 frames a second, or a bomb."""

Shown = tuple[tuple[av.VideoFrame, float], Fraction]
"""(frame, width of its pixels over their height), and the time at which the next one takes its place."""


@dataclass(frozen=True)
class Facts:
    """What a recording's pictures are.

    Attributes:
        fps: frames a second. height, width: pixels, as shown. seconds: None if the header does not say.
    """

    fps: float
    height: int
    width: int
    seconds: float | None


def probe(recording: Recording) -> Facts:
    """Read the header of a recording's footage.

    Raises:
        DecodeError: it cannot be read.
    """
    if isinstance(recording.footage, ImageFiles | ParquetImages):
        return _probe_pictures(recording, recording.footage)
    with _opened(_source(recording.footage), recording.fps) as (container, stream):
        rate = _rate(stream, recording.fps)
        seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
        if seconds is None and container.duration:
            seconds = container.duration / av.time_base
        if recording.end is not None:
            seconds = recording.end
        left = max(0.0, seconds - recording.start) if seconds is not None and not recording.fps else None
        height, width = shown_size(stream, next(iter(container.decode(stream)), None))
        return Facts(float(rate), height, width, left)


def _probe_pictures(recording: Recording, images: ImageFiles | ParquetImages) -> Facts:
    times, sources = _pictures_of(images)
    if len(times) < 2 or times[-1] <= times[0]:
        raise DecodeError("it has fewer than two pictures")
    with _opened(next(iter(sources)), None) as (_, stream):
        height, width = stream.height, stream.width
    end = times[-1] if recording.end is None else recording.end
    return Facts((len(times) - 1) / (times[-1] - times[0]), height, width, end - max(times[0], recording.start))


def frames_at(recording: Recording, fps: float, height: int, width: int) -> Iterator[np.ndarray]:
    """The frames on show at 0, 1 / fps, 2 / fps, ... seconds after the recording's start, until it ends.

    Yields:
        uint8 [H, W, 3], RGB, scaled and cropped to the size, never stretched; a new array each.

    Raises:
        DecodeError: while iterating, where the footage cannot be read any further.
    """
    try:
        if isinstance(recording.footage, ImageFiles | ParquetImages):
            shown = _shown_images(recording, recording.footage)
        else:
            shown = _shown_frames(recording)
        yield from _pictures(shown, Fraction(fps).limit_denominator(100_000), height, width)
    except (av.FFmpegError, ValueError, IndexError, OverflowError, ZeroDivisionError, OSError) as error:
        raise DecodeError(f"the video cannot be decoded ({first_line(error)})") from error


def _pictures(shown: Iterator[Shown], fps: Fraction, height: int, width: int) -> Iterator[np.ndarray]:
    """Each frame, scaled, as often as the times k / fps fall on it."""
    fitter: FrameFitter | None = None
    pixels = 0
    for (frame, aspect), count in resampled(shown, fps):
        if count > MAX_GAP * fps + 1:
            raise DecodeError(f"a picture stands still for {float(count / fps):.0f} s: time stamps are off")
        pixels += frame.width * frame.height
        if pixels > PIXEL_BUDGET:
            raise DecodeError("it decodes to more pixels than any recording has")
        fitter = fitter or FrameFitter(height, width, aspect)
        picture = np.empty((height, width, 3), dtype=np.uint8)
        fitter.write(frame, picture)
        yield from repeat(picture, count)


def _shown_frames(recording: Recording) -> Iterator[Shown]:
    start = Fraction(recording.start).limit_denominator(1_000_000)
    length = None if recording.end is None else Fraction(recording.end).limit_denominator(1_000_000) - start
    with _opened(_source(recording.footage), recording.fps) as (container, stream):
        rate = _rate(stream, recording.fps)
        if recording.stated_fps and abs(rate / Fraction(recording.stated_fps) - 1) > RATE_APART:
            stated = f"its description states {recording.stated_fps:g} frames a second"
            raise DecodeError(f"{stated}, its video has {float(rate):g}: times and pictures would be apart")
        aspect = float(stream.sample_aspect_ratio or 1)
        frames = frames_from(container, stream, rate, start) if start else container.decode(stream)
        for frame, until in with_ends(frames, stream, rate, start, stamped=recording.fps is None):
            # The last frame of a recording that ends in the middle of a file is the one that ends with it.
            if length is not None and until > length + 1 / (4 * rate):
                return
            yield (frame, aspect), until


def _shown_images(recording: Recording, images: ImageFiles | ParquetImages) -> Iterator[Shown]:
    """Each picture with the time at which the next takes its place; the last one stays as long as most do."""
    times, sources = _pictures_of(images)
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.1
    # A little less, as for a video's frames: a time that falls on the border belongs to the next picture.
    ends = [until - usual / 4 - recording.start for until in (*times[1:], times[-1] + usual)]
    last = np.inf if recording.end is None else recording.end - recording.start
    for number, (source, until) in enumerate(zip(sources, ends, strict=True)):
        if until <= 0:
            continue
        with _opened(source, None) as (container, stream):
            picture = next(iter(container.decode(stream)), None)
        if picture is None:
            raise DecodeError(f"{Path(source).name if isinstance(source, str) else number} holds no picture")
        yield (picture, 1.0), Fraction(min(until, last)).limit_denominator(1_000_000)
        if until >= last:
            return


def _pictures_of(images: ImageFiles | ParquetImages) -> tuple[Sequence[float], Iterable[str | bytes]]:
    """(their seconds, the file of each or its bytes)."""
    if isinstance(images, ImageFiles):
        return images.times, images.paths
    return picture_times(images), picture_cells(images)


def _source(footage: Footage) -> str | bytes:
    """What is opened: a file's path, or the bytes of one that lies in another file."""
    return footage.path if isinstance(footage, VideoFile) and footage.size is None else read_bytes(footage)


@contextmanager
def _opened(source: str | bytes, fps: float | None) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a path or a file's bytes, one thread, errors not painted over."""
    options = {"framerate": f"{fps:g}"} if fps else {}
    try:
        if isinstance(source, str) and not Path(source).is_file():
            raise DecodeError("there is no such file")
        # A path with a colon would be taken for a protocol.
        with av.open(
            f"file:{source}" if isinstance(source, str) else io.BytesIO(source), "r", options=options
        ) as container:
            yield container, open_stream(container)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise DecodeError(f"the video cannot be opened ({first_line(error)})") from error


def read_bytes(footage: Footage) -> bytes:
    """A video file's bytes, wherever they lie.

    Raises:
        DecodeError: they cannot be read.
    """
    if isinstance(footage, ParquetCell):
        return read_cell(footage)
    if not isinstance(footage, VideoFile):
        raise DecodeError("pictures are no video file")
    try:
        with open(footage.path, "rb") as file:
            file.seek(footage.offset)
            data = file.read(-1 if footage.size is None else footage.size)
    except OSError as error:
        raise DecodeError(f"it cannot be read ({error.strerror})") from error
    if footage.size is not None and len(data) != footage.size:
        raise DecodeError("the file that holds it is truncated")
    return data


def _rate(stream: av.VideoStream, assumed: float | None) -> Fraction:
    rate = Fraction(assumed).limit_denominator(100_000) if assumed else stream.average_rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise DecodeError("the video does not tell its frame rate")
    return rate


def shard_ready_bytes(recording: Recording, frames: int, fps: float, height: int, width: int) -> bytes | None:
    """A recording's file, if it can be stored as it is: all of it, H.264 in mp4 of just this shape, key frames close
    enough, no sound. None if it must be encoded anew.
    """
    footage = recording.footage
    if not isinstance(footage, VideoFile) or recording.start or recording.end is not None or recording.fps:
        return None
    with _opened(_source(footage), None) as (container, stream):
        context = stream.codec_context
        ready = (
            "mp4" in container.format.name
            and container.metadata.get("major_brand", "").strip() != "qt"
            and len(container.streams) == 1
            and context.name == "h264"
            and context.pix_fmt == "yuv420p"
            and (stream.height, stream.width) == (height, width)
            and (stream.sample_aspect_ratio or 1) == 1
            and stream.frames == frames
            and abs(float(stream.average_rate or 0) - fps) < 1e-3
            and _longest_gop(container, stream) <= max(KEPT_GOP, MAX_GOP)
        )
    return read_bytes(footage) if ready else None


def _longest_gop(container: Any, stream: Any) -> int:
    longest, since = 0, 0
    for packet in container.demux(stream):
        if packet.size:
            since = 1 if packet.is_keyframe else since + 1
            longest = max(longest, since)
    return longest
