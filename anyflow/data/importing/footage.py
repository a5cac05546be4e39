"""A recording's pictures at a steady rate: any container, a raw stream, a span of a tar, a table's cell, or images."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np

from anyflow.data.decode import DecodeError, films, frame_starts, open_stream, timed_frames
from anyflow.data.frame_times import HEAD, ODDITIES, PAUSE, Clock, Shown, Stamp, decide, follow, resampled
from anyflow.data.importing.cells import picture_cells, picture_times, read_cell
from anyflow.data.importing.recording import Footage, ImageFiles, ParquetCell, ParquetImages, Recording, VideoFile
from anyflow.data.picture import MIN_SIDE, FrameFitter, Note, progressive, require_footage, shown_size
from anyflow.errors import first_line

T = TypeVar("T")

PROGRESSIVE = (0, 1)
"""Orders of fields, in FFmpeg's numbers: unknown, and none."""
KEPT_GOP = 30
"""The longest distance between key frames with which a file is kept as it is: a clip is cut out of it at random."""
PIXEL_BUDGET = 10**13
"""Pixels of one recording: a hundred hours of 832x480 at 60 frames a second, or a bomb."""
MICROSECOND = Fraction(1, 1_000_000)
RATE_APART = 0.01
"""A video's rate may differ by this share from the one that its description states (29.97 for 30)."""
PLAYLISTS = ("concat", "hls", "dash", "imf", "sdp")
"""What FFmpeg reads other files for, whatever its name ends in."""


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


class Moment(NamedTuple):
    """A picture, uint8 [H, W, 3], the seconds after the recording's start at which it is on show, and whether what
    came before is apart from it: a pause, or a clock that was set back.
    """

    picture: np.ndarray
    time: float
    apart: bool


def probe(recording: Recording) -> Facts:
    """Read the header of a recording's footage, and its first pictures' times.

    Raises:
        DecodeError: it cannot be read, or shows nothing.
    """
    try:
        return _probed(recording)
    except (av.FFmpegError, ValueError, IndexError, OverflowError, ZeroDivisionError, OSError) as error:
        raise DecodeError(f"the video cannot be decoded ({first_line(error)})") from error


def starts_of(video: VideoFile) -> tuple[float, np.ndarray]:
    """(frames a second, the second at which each picture of a video begins); nothing is decoded.

    Raises:
        DecodeError: it cannot be read.
    """
    try:
        with _opened(_source(video), None) as (container, stream):
            clock, starts = frame_starts(container, stream)
            return float(clock.rate), np.array(starts)
    except (av.FFmpegError, ValueError, IndexError, OverflowError, ZeroDivisionError, OSError) as error:
        raise DecodeError(f"the video cannot be read ({first_line(error)})") from error


def _probed(recording: Recording) -> Facts:
    if isinstance(recording.footage, ImageFiles | ParquetImages):
        return _probed_pictures(recording, recording.footage)
    with _opened(_source(recording.footage), recording.fps) as (container, stream):
        seconds = _seconds(stream)
        if seconds is None and container.duration:
            seconds = container.duration / av.time_base
        if recording.end is not None:
            seconds = recording.end
        left = max(0.0, seconds - recording.start) if seconds is not None and not recording.fps else None
        clock, shown = timed_frames(container, stream, declared=recording.fps)
        first = next(shown, None)
        if first is None:
            raise DecodeError("it holds no pictures")
        height, width = shown_size(stream, first.item)
        if min(height, width) < MIN_SIDE:
            raise DecodeError(f"its pictures are shown as {width}x{height}")
        require_footage(first.item)
        return Facts(float(clock.rate), height, width, left)


def _probed_pictures(recording: Recording, images: ImageFiles | ParquetImages) -> Facts:
    times, sources = _pictures_of(images)
    if len(times) < 2 or max(times) <= times[0]:
        raise DecodeError("it has fewer than two pictures")
    height, width = _size(sources)
    end = max(times) if recording.end is None else recording.end
    clock = _picture_clock(_microseconds(times))
    return Facts(float(clock.rate), height, width, end - max(times[0], recording.start))


def _size(sources: Iterable[str | bytes | DecodeError]) -> tuple[int, int]:
    """(height, width) of the first picture that can be read, of the first ones.

    Raises:
        DecodeError: none of them can.
    """
    broken: Exception = DecodeError("it has no pictures")
    for number, source in enumerate(islice(sources, HEAD)):
        try:
            with _opened_picture(source, number) as (picture, stream):
                require_footage(picture)
                return shown_size(stream, picture)
        except DamagedPictureError as error:
            broken = broken if isinstance(broken, DamagedPictureError) else error
    raise broken


def frames_at(
    recording: Recording, fps: float, height: int, width: int, note: Note = lambda text: None
) -> Iterator[Moment]:
    """The pictures on show every 1 / fps seconds, from the recording's first frame on, and anew after every pause.

    Args:
        recording: its footage.
        fps: pictures a second. height, width: theirs: scaled and cropped, never stretched; a new array each.
        note: is told what had to be guessed or converted.

    Raises:
        DecodeError: while iterating, where the footage cannot be read any further.
    """
    try:
        if isinstance(recording.footage, ImageFiles | ParquetImages):
            shown = _shown_images(recording, recording.footage, note)
            yield from _pictures(shown, fps, FrameFitter(height, width, 1.0, note))
            return
        with _opened(_source(recording.footage), recording.fps) as (container, stream):
            fitter = FrameFitter(height, width, float(stream.sample_aspect_ratio or 1), note)
            yield from _pictures(progressive(_shown(recording, container, stream, note), note), fps, fitter)
    except (av.FFmpegError, ValueError, IndexError, OverflowError, ZeroDivisionError, OSError) as error:
        raise DecodeError(f"the video cannot be decoded ({first_line(error)})") from error


def _pictures(shown: Iterator[Shown[av.VideoFrame]], fps: float, fitter: FrameFitter) -> Iterator[Moment]:
    """Each frame, scaled, as often as it is on show at the instants of the rate."""
    pixels = 0
    for frame, count, time, apart in resampled(shown, fps):
        pixels += frame.width * frame.height
        if pixels > PIXEL_BUDGET:
            raise DecodeError("it decodes to more pixels than any recording has")
        picture = np.empty((fitter.height, fitter.width, 3), dtype=np.uint8)
        fitter.write(frame, picture)
        for number in range(count):
            yield Moment(picture, time + number / fps, apart and number == 0)
    if not pixels:
        raise DecodeError("it holds no pictures")


def _shown(recording: Recording, container: Any, stream: Any, note: Note) -> Iterator[Shown[av.VideoFrame]]:
    """A video's frames with their times after the recording's start.

    Raises:
        DecodeError: its description counts at another rate.
    """
    start = Fraction(recording.start).limit_denominator(1_000_000)
    clock, frames = timed_frames(container, stream, start, recording.fps)
    _compare_rates(clock, recording.stated_fps)
    for text in clock.notes:
        note(text)
    if len(films(container)) > 1:
        note("further video streams in the file: the first one was taken")
    wanted = None if recording.end is None else recording.end - recording.start
    interval = float(1 / clock.rate)
    reached = 0.0
    for shown in _until(wanted, frames, interval):
        if shown.why:
            note(ODDITIES[shown.why])
        lasts = float(shown.item.duration * clock.tick) if shown.item.duration else 0.0
        reached = max(shown.until, shown.start + lasts)
        yield shown
    whole = _seconds(stream) if wanted is None else wanted
    if whole is not None and clock.how != "counted" and reached + PAUSE * interval < whole:
        note("footage that ends before its header says, as if truncated: what there is was taken")


def _compare_rates(clock: Clock, stated: float | None) -> None:
    if stated and abs(float(clock.rate) / stated - 1) > RATE_APART:
        raise DecodeError(
            f"its description states {stated:g} frames a second, its video has {float(clock.rate):.5g}: "
            "times and pictures would be apart"
        )


def _seconds(stream: Any) -> float | None:
    """How long a stream is, as its header says; Matroska has the time of its end, as a text."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    try:
        hours, minutes, seconds = map(float, stream.metadata["DURATION"].split(":"))
    except (KeyError, ValueError):
        return None
    begin = float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0
    return max(0.0, 3600 * hours + 60 * minutes + seconds - begin)


def _shown_images(
    recording: Recording, images: ImageFiles | ParquetImages, note: Note
) -> Iterator[Shown[av.VideoFrame]]:
    """Each picture with the time at which the next takes its place; the last one stays as long as most do."""
    times, sources = _pictures_of(images)
    stamps = _microseconds(times)
    clock = _picture_clock(stamps)
    wanted = None if recording.end is None else recording.end - recording.start
    numbered = zip(enumerate(sources), stamps, strict=True)
    shown = follow(numbered, clock, round(recording.start / MICROSECOND))
    first_damage: Exception | None = None
    is_after = any_shown = False
    for (number, source), start, until, why in _until(wanted, shown, float(1 / clock.rate)):
        if until <= 0:
            continue
        try:
            with _opened_picture(source, number) as (picture, _):
                pass
        except DamagedPictureError as error:
            if first_damage is None:
                note(f"{ODDITIES['damaged']}; the first: {error}")
            first_damage, is_after = first_damage or error, True
            continue
        if why:
            note(ODDITIES[why])
        yield Shown(picture, start, until, "damaged" if is_after else why)
        any_shown, is_after = True, False
    if first_damage is not None and not any_shown:
        raise first_damage


def _until(end: float | None, shown: Iterator[Shown[T]], interval: float) -> Iterator[Shown[T]]:
    """The frames up to a recording's end, which may lie in the middle of its footage: the last one ends with it."""
    for frame in shown:
        if end is None:
            yield frame
        elif frame.start > end - interval / 2:
            return
        else:
            yield frame._replace(until=min(frame.until, end))


def _picture_clock(stamps: Sequence[int]) -> Clock:
    return decide([Stamp(stamp, stamp) for stamp in stamps], MICROSECOND, None, reorders=False)


def _microseconds(times: Sequence[float]) -> list[int]:
    return [round(time / MICROSECOND) for time in times]


def _pictures_of(images: ImageFiles | ParquetImages) -> tuple[Sequence[float], Iterable[str | bytes | DecodeError]]:
    """(their seconds, the file of each or its bytes, or why it has none)."""
    if isinstance(images, ImageFiles):
        return images.times, images.paths
    return picture_times(images), picture_cells(images)


class DamagedPictureError(DecodeError):
    """One of a recording's pictures cannot be read."""


@contextmanager
def _opened_picture(source: str | bytes | DecodeError, number: int) -> Iterator[tuple[av.VideoFrame, Any]]:
    """(the picture of an image file, the stream that it is of), for the recording's picture of that number.

    Raises:
        DamagedPictureError: it cannot be read.
    """
    where = f"{Path(source).name}" if isinstance(source, str) else f"row {number}"
    with ExitStack() as stack:
        try:
            if isinstance(source, DecodeError):
                raise source
            container, stream = stack.enter_context(_opened(source, None))
            picture: av.VideoFrame | None = next(iter(container.decode(stream)), None)
        except (DecodeError, av.FFmpegError, ValueError, OSError) as error:
            why = first_line(error).replace(" '<none>'", "").removesuffix(":")
            raise DamagedPictureError(f"{where} holds no picture ({why})") from error
        if picture is None:
            raise DamagedPictureError(f"{where} holds no picture")
        yield picture, stream


def _source(footage: Footage) -> str | bytes:
    """What is opened: a file's path, or the bytes of one that lies in another file."""
    return footage.path if isinstance(footage, VideoFile) and footage.size is None else read_bytes(footage)


@contextmanager
def _opened(source: str | bytes, fps: float | None) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a path or a file's bytes, one thread, errors not painted over."""
    # A picture's name is its name, not a pattern of many ("%d").
    options = {"pattern_type": "none", **({"framerate": f"{fps:g}"} if fps else {})}
    if isinstance(source, str) and not Path(source).is_file():
        raise DecodeError(f"there is no {Path(source).name}")
    if not (Path(source).stat().st_size if isinstance(source, str) else source):
        raise DecodeError("the file is empty")
    try:
        # A path with a colon would be taken for a protocol.
        file = f"file:{source}" if isinstance(source, str) else io.BytesIO(source)
        container = av.open(file, "r", options=options)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise DecodeError(f"the video cannot be opened ({first_line(error)})") from error
    with container:
        if container.format.name in PLAYLISTS:
            raise DecodeError("it is a list of other files, not a video")
        yield container, open_stream(container)


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
            and context.field_order in PROGRESSIVE
            and (stream.height, stream.width) == (height, width)
            and (stream.sample_aspect_ratio or 1) == 1
            and stream.frames == frames
            and abs(float(stream.average_rate or 0) - fps) < 1e-3
            and _is_steady(container, stream, fps)
        )
    return read_bytes(footage) if ready else None


def _is_steady(container: Any, stream: Any, fps: float) -> bool:
    """Whether key frames are close enough, and frames as far apart as the rate says: whoever reads it counts them."""
    longest, since = 0, 0
    stamps = []
    for packet in container.demux(stream):
        if packet.size:
            since = 1 if packet.is_keyframe else since + 1
            longest = max(longest, since)
            stamps.append(packet.pts)
    if longest > KEPT_GOP or None in stamps or not stream.time_base:
        return False
    times = np.sort(np.array(stamps, dtype=np.float64)) * float(stream.time_base) * fps
    return bool(np.abs(times - times[:1] - np.arange(len(times))).max(initial=0.0) < 0.5)
