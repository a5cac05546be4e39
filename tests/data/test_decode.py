"""Decoding: choice of frames, frame rate, aspect, windows, and every way a file can be bad."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.data.clip import encode_mp4
from anyflow.data.decode import ClipShape, DecodeError, decode_clip


def levels(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames whose brightness is 4 times their number."""
    frames = np.empty((count, height, width, 3), dtype=np.uint8)
    frames[:] = (4 * np.arange(count))[:, None, None, None]
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of :func:`levels` these are."""
    return [round(float(frame.mean()) / 4) for frame in frames]


@pytest.fixture(scope="module")
def long_video() -> bytes:
    """40 frames at 8 frames/s, a key frame every 17."""
    return encode_mp4(levels(40), 8)


def irregular_video(times: list[int], container: str = "matroska") -> bytes:
    """Frames on show from the given milliseconds on."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(levels(len(times)), times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def turned(video: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 with another display matrix (a, b, c, d of a rotation) in its track's header."""
    place = video.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    return video[:place] + struct.pack(">iiiiiiiii", a, b, 0, c, d, 0, 0, 0, 1 << 30) + video[place + 36 :]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    ("matrix", "turns"), [((1, 0, 0, 1), 0), ((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
)
def test_telephones_videos_stand_upright(matrix: tuple[int, int, int, int], turns: int, mirrored: bool) -> None:
    """(0, 1, -1, 0) is what a telephone writes that was held upright: a quarter clockwise, so three against it.

    A front camera's picture may be mirrored as well: then x counts from the other side before it is turned.
    """
    lying = np.zeros((4, 32, 48, 3), dtype=np.uint8)
    lying[:, :16, :24] = 200  # one corner is bright
    upright = np.rot90(lying[:, :, ::-1] if mirrored else lying, turns, axes=(1, 2))
    a, b, c, d = matrix
    video = turned(encode_mp4(lying, 8), (-a, -b, c, d) if mirrored else matrix)
    frames = decode_clip(video, ClipShape(4, *upright.shape[1:3]))
    assert np.abs(frames.astype(int) - upright).mean() < 3


def test_the_first_frames_as_they_are(long_video: bytes) -> None:
    frames = decode_clip(long_video, ClipShape(5, 32, 48))
    assert frames.dtype == np.uint8 and frames.shape == (5, 32, 48, 3)
    assert numbers(frames) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (8.0, [0, 1, 2, 3, 4, 5]),
        (4.0, [0, 2, 4, 6, 8, 10]),
        (2.0, [0, 4, 8, 12, 16, 20]),
        (16.0, [0, 0, 1, 1, 2, 2]),
        (3.0, [0, 2, 5, 8, 10, 13]),  # k / 3 seconds are 8 k / 3 frames, rounded down unless a frame is about to come
    ],
)
def test_frame_rate(long_video: bytes, fps: float, expected: list[int]) -> None:
    assert numbers(decode_clip(long_video, ClipShape(6, 32, 48, fps))) == expected


def test_rounded_and_variable_times_are_followed() -> None:
    ntsc = irregular_video([round(1000 * number / 30) for number in range(30)])
    assert numbers(decode_clip(ntsc, ClipShape(15, 32, 48, fps=15))) == list(range(0, 30, 2))
    variable = irregular_video([0, 100, 200, 600, 1000, 1100])
    assert numbers(decode_clip(variable, ClipShape(6, 32, 48, fps=5))) == [0, 2, 2, 3, 3, 4]


@settings(max_examples=20)
@given(st.integers(0, 2**63 - 1))
def test_windows_are_runs_of_frames(seed: int) -> None:
    video = LONG
    shown = numbers(decode_clip(video, ClipShape(5, 32, 48), seed))
    assert shown == list(range(shown[0], shown[0] + 5)) and 0 <= shown[0] <= 35
    assert shown == numbers(decode_clip(video, ClipShape(5, 32, 48), seed))


@settings(max_examples=20)
@given(st.integers(0, 2**63 - 1))
def test_windows_at_another_rate(seed: int) -> None:
    shown = numbers(decode_clip(LONG, ClipShape(5, 32, 48, fps=2.0), seed))
    assert shown == list(range(shown[0], shown[0] + 20, 4)) and 0 <= shown[0] <= 23


LONG = encode_mp4(levels(40), 8)


def test_windows_reach_both_ends(long_video: bytes) -> None:
    starts = {numbers(decode_clip(long_video, ClipShape(39, 32, 48), seed))[0] for seed in range(12)}
    assert starts == {0, 1}


@pytest.mark.parametrize("size", [(32, 48), (24, 96), (64, 32), (96, 144), (48, 48)])
def test_a_circle_stays_round(size: tuple[int, int]) -> None:
    """The disc's extent is the same across and down, whatever the target's aspect: nothing is stretched."""
    y, x = np.mgrid[:64, :96]
    disc = np.where((y - 31.5) ** 2 + (x - 47.5) ** 2 < 10**2, 235, 16).astype(np.uint8)
    frame = decode_clip(encode_mp4(np.repeat(disc[None, :, :, None], 3, axis=3), 8), ClipShape(1, *size))[0]
    weight = np.clip((frame.mean(-1) - 16) / 219, 0, 1)
    rows, columns = np.mgrid[: size[0], : size[1]]
    centre = [np.average(axis, weights=weight) for axis in (rows, columns)]
    spread = [
        np.average((axis - mid) ** 2, weights=weight) ** 0.5 for axis, mid in zip((rows, columns), centre, strict=True)
    ]
    scale = max(size[0] / 64, size[1] / 96)
    assert np.allclose(spread, 5 * scale, rtol=0.04), "a disc of radius r spreads by r / 2 along each axis"
    assert np.allclose(centre, [(size[0] - 1) / 2, (size[1] - 1) / 2], atol=0.7), "the centre is kept"


def test_pixels_that_are_not_square_are_shown_as_meant() -> None:
    y, x = np.mgrid[:64, :96]
    disc = np.where((y - 31.5) ** 2 + (x - 47.5) ** 2 < 10**2, 235, 16).astype(np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        frame = av.VideoFrame.from_ndarray(np.repeat(disc[:, :, None], 3, axis=2), format="rgb24")
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    bright = decode_clip(file.getvalue(), ClipShape(1, 64, 96))[0].mean(-1) > 125
    assert abs(bright.any(0).sum() - 2 * bright.any(1).sum()) <= 3


def test_writing_into_a_given_array(long_video: bytes) -> None:
    batch = np.zeros((2, 3, 32, 48, 3), dtype=np.uint8)
    assert decode_clip(long_video, ClipShape(3, 32, 48), out=batch[1]) is not None
    assert batch[1].any() and not batch[0].any()


def test_too_few_frames(long_video: bytes) -> None:
    with pytest.raises(DecodeError, match="too few frames: 40 where 41 are needed"):
        decode_clip(long_video, ClipShape(41, 32, 48))
    with pytest.raises(DecodeError, match="too few frames: 10 where 11 are needed"):
        decode_clip(long_video, ClipShape(11, 32, 48, fps=2.0), seed=1)


@pytest.mark.parametrize("data", [b"", b"not a video", b"\0" * 5000])
def test_no_video(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_clip(data, ClipShape(5, 32, 48))


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (17, 32, 48, 3), dtype=np.uint8)


NOISE = encode_mp4(noise(), 8)


def test_damage_within_the_picture_is_not_painted_over() -> None:
    damaged = bytearray(NOISE)
    begin = NOISE.index(b"mdat") + 2000
    damaged[begin : begin + 400] = bytes(400)
    with pytest.raises(DecodeError, match="cannot be decoded"):
        decode_clip(bytes(damaged), ClipShape(17, 32, 48))


@given(st.data())
def test_any_damage_gives_frames_or_a_reason(data: st.DataObject) -> None:
    """Cut anywhere, or with bytes changed: never another exception, never a crash."""
    video = bytearray(NOISE[: data.draw(st.integers(0, len(NOISE)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if video:
            video[data.draw(st.integers(0, len(video) - 1))] = data.draw(st.integers(0, 255))
    try:
        frames = decode_clip(bytes(video), ClipShape(17, 32, 48), seed=data.draw(st.sampled_from([None, 1])))
    except DecodeError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert frames.shape == (17, 32, 48, 3)
