"""A clip survives the way to bytes and back."""

from __future__ import annotations

import numpy as np
import pytest

from anyflow.data.clip import Clip, encode_mp4
from anyflow.data.decode import ClipShape, decode_clip
from anyflow.errors import UserError


def moving_square(frames: int = 17) -> np.ndarray:
    """A red square of 16 pixels that moves 2 pixels a frame over grey; uint8 [F, 64, 96, 3]."""
    footage = np.full((frames, 64, 96, 3), 100, dtype=np.uint8)
    for i in range(frames):
        footage[i, 24:40, 8 + 2 * i : 24 + 2 * i] = (200, 40, 40)
    return footage


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean()))


def test_frames_survive_encoding() -> None:
    frames = moving_square()
    decoded = decode_clip(encode_mp4(frames, 8.0), ClipShape(17, 64, 96))
    assert psnr(decoded, frames) > 35


def test_every_frame_comes_back_at_a_fractional_rate() -> None:
    frames = moving_square(9)
    decoded = decode_clip(encode_mp4(frames, 8.75), ClipShape(9, 64, 96))
    assert [int(frame[32].argmax(axis=0)[0]) // 2 for frame in decoded] == [
        int(f[32].argmax(axis=0)[0]) // 2 for f in frames
    ]


def test_encoding_is_reproducible() -> None:
    """Also with other memory around it: x264's default settings fail this now and then."""
    generator = np.random.default_rng(0)
    frames = moving_square() + generator.integers(0, 8, (17, 64, 96, 3), dtype=np.uint8)
    files = set()
    for size in generator.integers(1, 100_000, 12):
        files.add(encode_mp4(frames, 8.0))
        np.ones(size)
    assert len(files) == 1


def test_smaller_crf_means_more_bytes_and_fewer_errors() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    fine, coarse = encode_mp4(frames, 8.0, crf=4), encode_mp4(frames, 8.0, crf=40)
    assert len(fine) > len(coarse)
    shape = ClipShape(5, 32, 32)
    assert psnr(decode_clip(fine, shape), frames) > psnr(decode_clip(coarse, shape), frames)


def test_parts_and_back() -> None:
    clip = Clip(
        key="a-0",
        caption="Ein grünes Auto fährt.",
        fps=8.0,
        domain="driving",
        frames=moving_square(5),
        controls={"actions": [1, 2], "trajectory": [[0.5, 1.0]]},
        attributes={"speed": "slow", "cars": 2},
        licence="MIT",
    )
    assert Clip.from_parts("a-0", clip.parts()) == clip.encoded()


@pytest.mark.parametrize("key", ["", "a.b", "a/b"])
def test_bad_key_is_refused(key: str) -> None:
    with pytest.raises(UserError, match="clip key"):
        Clip(key=key, caption="", fps=8.0, domain="x", mp4=b"")


def test_frames_and_bytes_exclude_each_other() -> None:
    with pytest.raises(UserError, match="either frames or mp4"):
        Clip(key="a", caption="", fps=8.0, domain="x")


def test_missing_member_is_named() -> None:
    with pytest.raises(UserError, match="no mp4 member"):
        Clip.from_parts("a", {"json": b"{}"})


def test_foreign_json_is_named() -> None:
    with pytest.raises(UserError, match=r"'a'.*does not describe a clip"):
        Clip.from_parts("a", {"mp4": b"", "json": b'{"label": 3}'})


@pytest.mark.parametrize(
    ("frames", "words"),
    [(np.zeros((2, 8, 8, 3)), "uint8"), (np.zeros((2, 9, 8, 3), np.uint8), "even")],
)
def test_frames_that_cannot_be_encoded(frames: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        encode_mp4(frames, 8.0)
