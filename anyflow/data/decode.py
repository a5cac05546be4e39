"""Bytes to frames: PyAV decoding, and the choice of a clip; ``frame_times`` says when a frame is, ``picture`` what."""

from __future__ import annotations

import heapq
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, count, islice
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from anyflow.data.faults import DecodeError as DecodeError
from anyflow.data.frame_times import HEAD, SLACK, Clock, Shown, Stamp, decide, follow, resampled
from anyflow.data.picture import MAX_PIXELS, FrameFitter, progressive
from anyflow.errors import first_line

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


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


@dataclass
class Choice:
    """Which frames of a video a clip took: what :func:`decode_clip` tells.

    Attributes:
        numbers: of the frames, ascending; one that stands at several instants is there as often. Exact from a video's
            beginning on; at a later start the first one is where its time says, at the average rate.
        frames: how many the video has; 0 if it does not say.
    """

    numbers: list[int] = field(default_factory=list)
    frames: int = 0


def usual_choice(fps: Any, shape: ClipShape) -> list[int]:
    """The frames that a clip of a steady rate takes from its beginning on; without a resampling any clip does.

    Raises:
        DecodeError: the clip is resampled, and its rate is not known.
    """
    spacing = _spacing(shape, None)
    if spacing is None:
        return list(range(shape.frames))
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise DecodeError("it does not tell its frame rate, so that its controls cannot be brought to another one")
    rate = float(fps)
    shown = (Shown(number, number / rate, (number + 1 - SLACK) / rate) for number in count())
    instants = (s.item for s in resampled(shown, float(1 / spacing)) for _ in range(s.instants))
    return list(islice(instants, shape.frames))


def decode_clip(
    data: bytes,
    shape: ClipShape,
    seed: int | None = None,
    out: np.ndarray | None = None,
    choice: Choice | None = None,
) -> np.ndarray:
    """Decode one clip of ``shape`` from the bytes of a video file.

    Args:
        data: the file (mp4 or whatever FFmpeg knows).
        shape: frames, size and frame rate of the result.
        seed: where the clip starts in a longer video: uniformly drawn from this seed; None starts at the beginning.
        out: uint8 [F, H, W, 3] to write into; a new array by default.
        choice: is told which frames were taken.

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
            written = _fill(container, open_stream(container), shape, seed, out, choice or Choice())
    except (av.FFmpegError, ValueError, IndexError, OverflowError) as error:
        raise DecodeError(f"the video cannot be decoded ({first_line(error)})") from error
    if written < shape.frames:
        raise DecodeError(f"too few frames: {written} where {shape.frames} are needed")
    return out


def open_stream(container: av.container.InputContainer) -> av.VideoStream:
    """A container's video, to be decoded by one thread, with damage and bombs refused.

    Raises:
        DecodeError: there is none.
    """
    streams = films(container) or list(container.streams.video)
    if not streams:
        raise DecodeError("the file holds no video")
    stream = streams[0]
    if stream.codec_context is None:
        raise DecodeError("its codec is unknown")
    _restrict(stream.codec_context)
    return stream


def films(container: av.container.InputContainer) -> list[av.VideoStream]:
    """A container's videos, without the cover pictures that are attached to it."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def _restrict(context: av.VideoCodecContext) -> None:
    context.thread_count = 1
    context.thread_type = "NONE"
    # Without "explode", damage is painted over in silence.
    context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}


def _fill(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    shape: ClipShape,
    seed: int | None,
    out: np.ndarray,
    choice: Choice,
) -> int:
    """Decode into ``out``; return the number of frames written."""
    rate = stream.average_rate or stream.guessed_rate
    spacing = _spacing(shape, rate) if rate else None
    first = _first_frame(stream, rate, spacing, shape.frames, seed)
    start = Fraction(first) / rate if rate else Fraction(0)
    fitter = FrameFitter(shape.height, shape.width, float(stream.sample_aspect_ratio or 1))
    if spacing is None and not first:  # the quick way, which most clips go: times do not matter
        decoder = _decoder(stream)
        shown: Iterator[Shown[av.VideoFrame]] = (
            Shown(frame, 0.0, 0.0) for packet in container.demux(stream) for frame in decoder.decode(packet)
        )
    else:
        _, shown = timed_frames(container, stream, start)
    numbered = _numbered(progressive(shown), first, rate)
    choice.numbers, choice.frames, written = [], int(stream.frames), 0
    if spacing is None:
        for row, frame in zip(out, numbered, strict=False):
            fitter.write(frame.item[1], row)
            choice.numbers.append(frame.item[0])
            written += 1
        return written
    for sample in resampled(numbered, float(1 / spacing), bridge=True):
        end = min(written + sample.instants, shape.frames)
        fitter.write(sample.item[1], out[written])
        out[written + 1 : end] = out[written]
        choice.numbers += [sample.item[0]] * (end - written)
        written = end
        if written == shape.frames:
            break
    return written


def _spacing(shape: ClipShape, rate: Fraction | None) -> Fraction | None:
    """Seconds from frame to frame of what is asked for; None where a video's own frames are taken, of that rate."""
    spacing = 1 / Fraction(shape.fps).limit_denominator(100_000) if shape.fps else None
    return None if spacing is not None and rate and spacing * rate == 1 else spacing


def _numbered(
    shown: Iterable[Shown[av.VideoFrame]], first: int, rate: Fraction | None
) -> Iterator[Shown[tuple[int, av.VideoFrame]]]:
    """The frames of a part that begins at the frame ``first``, with their numbers."""
    begin = first
    for place, one in enumerate(shown):
        if first and not place:
            begin += round(one.start * float(rate or 0))
        yield Shown((begin + place, one.item), one.start, one.until, one.why)


def timed_frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    start: Fraction = Fraction(0),
    declared: float | None = None,
) -> tuple[Clock, Iterator[Shown[av.VideoFrame]]]:
    """What a video's times are taken from, and its frames from ``start`` on, with their times after it.

    Args:
        container, stream: just opened.
        start: seconds; found by a seek to the key frame before it where frames carry their times.
        declared: frames a second of a stream without time stamps.

    Raises:
        DecodeError: nothing tells the rate. The frames raise what FFmpeg raises.
    """
    stamp_of = _stamps_of(container)
    packets = container.demux(stream)
    head = list(islice(packets, HEAD))
    stamps = [stamp_of(packet) for packet in head if packet.size]
    clock = _clock(stream, stamps, declared)
    packets = chain(head, packets)
    zero = None
    if start and clock.how == "stamped":
        first = min((stamp.pts for stamp in stamps if stamp.pts is not None), default=0)
        zero = first if stream.start_time is None else stream.start_time
        container.seek(math.floor(zero + start / clock.tick), stream=stream, backward=True)
        packets = container.demux(stream)
    shown = follow(_stamped(_decoder(stream), packets, clock, stamp_of), clock, zero)
    return clock, _moved(shown, float(start), float(1 / clock.rate) / 2) if start else shown


def frame_starts(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[Clock, list[float]]:
    """What a video's times are taken from, and the second at which each of its frames begins; none is decoded.

    Args:
        container, stream: just opened.

    Raises:
        DecodeError: nothing tells the rate.
    """
    stamp_of = _stamps_of(container)
    stamps = [stamp_of(packet) for packet in container.demux(stream) if packet.size and not packet.is_discard]
    clock = _clock(stream, stamps[:HEAD], None)
    if clock.how == "counted":
        return clock, [frame.start for frame in follow([(None, None)] * len(stamps), clock)]
    known = sorted(stamp for pts, dts in stamps if (stamp := dts if pts is None else pts) is not None)
    if stamps[0].pts is None:  # as in _stamped
        late = min(stream.codec_context.reorder_depth, len(known) - 1)
        known = known[late:] + [known[-1] + number * _ticks(clock) for number in range(1, late + 1)]
    return clock, [frame.start for frame in follow(((None, stamp) for stamp in known), clock)]


def _ticks(clock: Clock) -> int:
    """Ticks from a frame to the next, usually."""
    return max(1, round(1 / (clock.rate * clock.tick)))


def _stamps_of(container: av.container.InputContainer) -> Callable[[av.Packet], Stamp]:
    """What gives the stamps of a container's packets.

    AVI stamps packets when they are decoded; FFmpeg makes up when they are shown, wrongly where frames are missing.
    """
    is_avi = container.format.name == "avi"
    return lambda packet: Stamp(None if is_avi else packet.pts, packet.dts)


def _clock(stream: av.VideoStream, stamps: Sequence[Stamp], declared: float | None) -> Clock:
    if not stamps:
        raise DecodeError("it holds no pictures")
    rate = stream.average_rate or stream.guessed_rate
    return decide(stamps, stream.time_base, rate, stream.codec_context.reorder_depth > 0, declared)


def _moved(shown: Iterable[Shown[av.VideoFrame]], start: float, tolerance: float) -> Iterator[Shown[av.VideoFrame]]:
    """The frames from ``start`` on, with times after it."""
    for frame, begin, until, why in shown:
        if begin >= start - tolerance:
            yield Shown(frame, begin - start, until - start, why)


def _stamped(
    decoder: av.VideoCodecContext, packets: Iterable[av.Packet], clock: Clock, of: Callable[[av.Packet], Stamp]
) -> Iterator[tuple[av.VideoFrame, int | None]]:
    """Frames with the stamps that their clock believes, of those that packets have."""
    if clock.how != "ordered":
        yield from ((frame, frame.pts) for packet in packets for frame in decoder.decode(packet))
        return
    waiting: list[int] = []
    newest: int | None = None
    is_first = True
    for packet in packets:
        pts, dts = of(packet)
        if packet.size and (stamp := dts if pts is None else pts) is not None:
            heapq.heappush(waiting, stamp)
        for frame in decoder.decode(packet):
            if is_first and pts is None:
                # A packet is stamped by when it is decoded: as much before its own time as there are packets that the
                # decoder needs before it shows the first frame.
                waiting = waiting[-1:]
            is_first = False
            if waiting:
                newest = heapq.heappop(waiting)
            elif newest is not None:  # shown after all packets
                newest += _ticks(clock)
            yield frame, newest


def _decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """What decodes a stream: its own context; but FFmpeg's own decoders of VP8 and VP9 pass over transparency."""
    context = stream.codec_context
    transparent = stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1"
    if not transparent or context.name not in ALPHA_DECODERS:
        return context
    own = av.CodecContext.create(ALPHA_DECODERS[context.name], "r")
    assert isinstance(own, av.VideoCodecContext)
    _restrict(own)
    return own


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
