"""A recording's pictures at a steady rate: any container, a raw stream, a span of a tar, a table's cell, or images."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import av
import numpy as np

from anyflow.data.clip import MAX_GOP
from anyflow.data.decode import DecodeError, FrameFitter, frames_from, open_stream, resampled, shown_size, with_ends
from anyflow.data.importing.recording import Footage, ImageFiles, ParquetCell, Recording, VideoFile
from anyflow.data.safety import inside
from anyflow.errors import first_line

KEPT_GOP = 30
"""The longest distance between key frames with which a file is kept as it is: a clip is cut out of it at random."""

MAX_GAP = 10
"""Seconds that one picture may stay: two frames that are a year apart would be filled up with still ones."""
PIXEL_BUDGET = 10**13
"""Pixels of one recording: a hundred hours of 832x480 at 60 frames a second, or a bomb."""

PLAYLISTS = ("concat", "hls", "dash", "imf", "sdp")
"""What FFmpeg reads other files for, whatever its name ends in."""

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
    if isinstance(recording.footage, ImageFiles):
        times = recording.footage.times
        if len(times) < 2 or times[-1] <= times[0]:
            raise DecodeError("it has fewer than two pictures")
        with _opened(VideoFile(recording.footage.paths[0]), None) as (_, stream):
            height, width = stream.height, stream.width
        return Facts((len(times) - 1) / (times[-1] - times[0]), height, width, times[-1] - times[0])
    with _opened(recording.footage, recording.fps) as (container, stream):
        rate = _rate(stream, recording.fps)
        seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
        if seconds is None and container.duration:
            seconds = container.duration / av.time_base
        if recording.end is not None:
            seconds = recording.end
        left = max(0.0, seconds - recording.start) if seconds is not None and not recording.fps else None
        height, width = shown_size(stream, next(iter(container.decode(stream)), None))
        return Facts(float(rate), height, width, left)


def frames_at(recording: Recording, fps: float, height: int, width: int) -> Iterator[np.ndarray]:
    """The frames on show at 0, 1 / fps, 2 / fps, ... seconds after the recording's start, until it ends.

    Yields:
        uint8 [H, W, 3], RGB, scaled and cropped to the size, never stretched; a new array each.

    Raises:
        DecodeError: while iterating, where the footage cannot be read any further.
    """
    try:
        if isinstance(recording.footage, ImageFiles):
            shown = _shown_images(recording.footage)
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
    assert not isinstance(recording.footage, ImageFiles)
    with _opened(recording.footage, recording.fps) as (container, stream):
        rate = _rate(stream, recording.fps)
        aspect = float(stream.sample_aspect_ratio or 1)
        frames = frames_from(container, stream, rate, start) if start else container.decode(stream)
        for frame, until in with_ends(frames, stream, rate, start, stamped=recording.fps is None):
            # The last frame of a recording that ends in the middle of a file is the one that ends with it.
            if length is not None and until > length + 1 / (4 * rate):
                return
            yield (frame, aspect), until


def _shown_images(images: ImageFiles) -> Iterator[Shown]:
    """Each picture with the time at which the next takes its place; the last one stays as long as most do."""
    usual = float(np.median(np.diff(images.times))) if len(images.times) > 1 else 0.1
    ends = [*images.times[1:], images.times[-1] + usual]
    for path, until in zip(images.paths, ends, strict=True):
        with _opened(VideoFile(path), None) as (container, stream):
            picture = next(iter(container.decode(stream)), None)
        if picture is None:
            raise DecodeError(f"{Path(path).name} holds no picture")
        # A little less, as for a video's frames: a time that falls on the border belongs to the next picture.
        yield (picture, 1.0), Fraction(until - usual / 4).limit_denominator(1_000_000)


@contextmanager
def _opened(footage: VideoFile | ParquetCell, fps: float | None) -> Iterator[tuple[Any, Any]]:
    """(container, video stream), one thread, errors not painted over."""
    # A picture's name is its name, not a pattern of many ("%d").
    options = {"pattern_type": "none", **({"framerate": f"{fps:g}"} if fps else {})}
    source: str | IO[bytes] | io.BytesIO
    try:
        if isinstance(footage, VideoFile) and footage.size is None:
            source = footage.path
        else:
            source = io.BytesIO(read_bytes(footage))
        if isinstance(source, str) and not Path(source).is_file():
            raise DecodeError("there is no such file")
        if not (Path(source).stat().st_size if isinstance(source, str) else len(source.getvalue())):
            raise DecodeError("the file is empty")
        # A path with a colon would be taken for a protocol.
        with av.open(f"file:{source}" if isinstance(source, str) else source, "r", options=options) as container:
            if container.format.name in PLAYLISTS:
                raise DecodeError("it is a list of other files, not a video")
            yield container, open_stream(container)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise DecodeError(f"the video cannot be opened ({first_line(error)})") from error


def read_bytes(footage: Footage) -> bytes:
    """A video file's bytes, wherever they lie.

    Raises:
        DecodeError: they cannot be read.
    """
    if isinstance(footage, ParquetCell):
        return _read_cell(footage)
    if isinstance(footage, ImageFiles):
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


@lru_cache(maxsize=1)
def _column(path: str, row_group: int, column: str) -> Any:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(row_group, [column]).column(column)


def _read_cell(cell: ParquetCell) -> bytes:
    try:
        value = _column(cell.path, cell.row_group, cell.column)[cell.row].as_py()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DecodeError(f"the table cannot be read ({first_line(error)})") from error
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and isinstance(value.get("path"), str):
        return read_bytes(VideoFile(str(inside(Path(cell.path).parent, value["path"]))))
    if not isinstance(data, bytes):
        raise DecodeError("the table's cell holds no bytes")
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
    with _opened(footage, None) as (container, stream):
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
