"""What a picture is: colours, range, high dynamic range, transparency, fields, mirrors, and what is none."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
import pytest

from anyflow.data.clip import encode_mp4
from anyflow.data.decode import ClipShape, DecodeError, decode_clip, open_stream, timed_frames
from anyflow.data.faults import NotColourError
from anyflow.data.picture import FrameFitter, progressive

GREEN = (0, 192, 64)
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114)}


def planes(colour: Sequence[int], matrix: int, height: int, width: int, full: bool = False) -> av.VideoFrame:
    """A frame of one colour, yuv420p without tags, by the definition of the matrix (ITU-T H.273)."""
    red, green, blue = (value / 255 for value in colour)
    kr, kb = MATRICES[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))
    levels = [255 * luma if full else 16 + 219 * luma, *(128 + (255 if full else 224) * value for value in chroma)]
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane, level in zip(frame.planes, levels, strict=True):
        plane.update(np.full((plane.height, plane.line_size), round(level), dtype=np.uint8).tobytes())
    return frame


def shown(frame: av.VideoFrame, height: int = 16, width: int = 16, notes: list[str] | None = None) -> np.ndarray:
    """The frame as a picture."""
    out = np.empty((height, width, 3), dtype=np.uint8)
    FrameFitter(height, width, 1.0, (notes if notes is not None else []).append).write(frame, out)
    return out


@pytest.mark.parametrize(
    ("size", "matrix", "tag", "told"),
    [
        ((480, 640), 5, 2, "BT.601"),
        ((720, 1280), 1, 2, "BT.709"),
        ((480, 640), 1, 1, ""),
        ((720, 1280), 5, 5, ""),
        ((832, 480), 5, 2, "BT.601"),
        ((1280, 544), 1, 2, "BT.709"),
    ],
)
def test_colours_are_read_by_their_tag_and_without_one_by_their_size(
    size: tuple[int, int], matrix: int, tag: int, told: str
) -> None:
    notes: list[str] = []
    frame = planes(GREEN, matrix, *size)
    frame.colorspace = tag
    assert np.abs(shown(frame, notes=notes).astype(int) - GREEN).max() <= 2
    assert notes == ([f"colours without a tag: taken as {told}"] if told else [])


def test_full_range_is_no_limited_range() -> None:
    frame = planes(GREEN, 5, 64, 64, full=True)
    frame.color_range = 2
    assert np.abs(shown(frame).astype(int) - GREEN).max() <= 2


@pytest.mark.parametrize("size", [(480, 640), (720, 1280)])
def test_what_is_encoded_comes_back_in_its_colours(size: tuple[int, int]) -> None:
    data = encode_mp4(np.full((2, *size, 3), GREEN, dtype=np.uint8), 8, preset="ultrafast")
    assert np.abs(decode_clip(data, ClipShape(2, *size)).astype(int) - GREEN).max() <= 3
    with av.open(io.BytesIO(data)) as container:  # and elsewhere: players know HD by its tag
        assert int(container.streams.video[0].codec_context.colorspace) == (1 if size[0] >= 720 else 2)


# --- high dynamic range -----------------------------------------------------------------------------------------------


def perceptual(nits: float) -> float:
    """SMPTE ST 2084's curve: the signal of a brightness."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = (nits / 10_000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def hdr(*signals: Sequence[float], curve: int = 16) -> av.VideoFrame:
    """A frame of BT.2020 colours, 10 bits, in bands from left to right."""
    frame = av.VideoFrame(16 * len(signals), 32, "yuv420p10le")
    bands = []
    for red, green, blue in signals:
        luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
        bands.append((64 + 876 * luma, 512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746))
    for plane, levels in zip(frame.planes, zip(*bands, strict=True), strict=True):
        row = np.repeat(np.round(levels).astype(np.uint16), plane.width // len(signals))
        row = np.pad(row, (0, plane.line_size // 2 - len(row)))
        plane.update(np.tile(row, plane.height).tobytes())
    frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries = 9, 1, curve, 9
    return frame


def bands(frame: av.VideoFrame, notes: list[str] | None = None) -> np.ndarray:
    """The colour in the middle of each band, ``[bands, 3]``; one frame, for FFmpeg makes a table for each."""
    return shown(frame, frame.height, frame.width, notes)[16, 8::16].astype(int)


def test_high_dynamic_range_keeps_its_greys_and_its_highlights() -> None:
    notes: list[str] = []
    greys = bands(hdr(*([perceptual(nits)] * 3 for nits in (1, 10, 100, 203, 1000, 4000))), notes)
    assert notes[0] == "HDR (PQ): mapped to BT.709"
    assert all(np.ptp(grey) <= 1 for grey in greys)
    levels = [int(grey[0]) for grey in greys]
    assert levels == sorted(set(levels)) and levels[-1] < 255  # not even 4000 nits are clipped
    assert levels[0] < 40 and 110 < levels[2] < 200  # black stays black; a lit room is neither dusk nor white
    hlg = bands(hdr(*([signal] * 3 for signal in (0.0, 0.25, 0.5, 0.75, 1.0)), curve=18), notes)[:, 0].tolist()
    assert hlg == sorted(set(hlg)) and hlg[0] < 8 and "HDR (HLG): mapped to BT.709" in notes


def test_wide_colours_keep_their_hue() -> None:
    [red] = bands(hdr([perceptual(200), perceptual(5), perceptual(5)]))
    assert red[0] > 140 and red[0] > 2 * max(red[1], red[2])
    sdr = hdr([0.8, 0.8, 0.8], curve=14)
    assert np.abs(bands(sdr)[0] - 204).max() <= 4  # BT.2020 without HDR: the same greys


# --- transparency, depth, size ----------------------------------------------------------------------------------------


def rgba(alpha: int) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.full((32, 32, 4), (200, 100, 40, alpha), dtype=np.uint8), format="rgba")


@pytest.mark.parametrize("format", ["rgba", "yuva420p", "gbrap", "yuva444p10le"])
def test_transparent_pictures_lie_on_black(format: str) -> None:
    notes: list[str] = []
    half = shown(rgba(128).reformat(format=format), notes=notes)[8, 8].astype(int)
    assert np.abs(half - (100, 50, 20)).max() <= 4 and "transparent pictures: laid on black" in notes
    opaque: list[str] = []
    assert np.abs(shown(rgba(255).reformat(format=format), notes=opaque)[8, 8].astype(int) - (200, 100, 40)).max() <= 4
    assert "transparent pictures: laid on black" not in opaque


def test_transparent_vp9_is_decoded_with_its_transparency() -> None:
    with_alpha = half_transparent_vp9()
    assert 90 < decode_clip(with_alpha, ClipShape(4, 32, 32, 5.0))[0, 8, 8, 0] < 110
    assert decode_clip(with_alpha, ClipShape(4, 32, 32))[0, 8, 8, 0] < 110


def half_transparent_vp9() -> bytes:
    """A colour for four seconds, WebM."""
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as output:
        stream = output.add_stream("libvpx-vp9", rate=10, options={"deadline": "realtime", "cpu-used": "8"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuva420p"
        for _ in range(40):
            output.mux(stream.encode(rgba(128).reformat(format=stream.pix_fmt)))
        output.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("format", ["gray16le", "gray10le", "gray12le", "grayf32le", "ya16le"])
def test_a_depth_map_is_no_colour(format: str) -> None:
    with pytest.raises(NotColourError, match=r"\d\d-bit gray: a depth map"):
        shown(av.VideoFrame(32, 32, format))


def test_black_and_white_films_are_footage() -> None:
    frame = av.VideoFrame.from_ndarray(np.full((32, 32), 120, dtype=np.uint8), format="gray")
    assert np.abs(shown(frame).astype(int) - 120).max() <= 1


@pytest.mark.parametrize(
    ("size", "reason"), [((2, 64), "too small"), ((8, 8000), "cannot cover"), ((8000, 8), "cannot")]
)
def test_absurd_sizes_are_refused_before_they_are_scaled(size: tuple[int, int], reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        shown(av.VideoFrame(size[1], size[0], "yuv420p"), 480, 832)


def test_matrices_that_are_not_read_are_named() -> None:
    frame = av.VideoFrame(32, 32, "yuv420p10le")
    frame.colorspace = 14
    with pytest.raises(DecodeError, match="ICtCp"):
        shown(frame)


# --- fields -----------------------------------------------------------------------------------------------------------


def bar(place: int) -> np.ndarray:
    image = np.full((64, 128, 3), 40, dtype=np.uint8)
    image[:, 4 * place : 4 * place + 16] = 220
    return image


def interlaced(count: int, fields: bool = True) -> bytes:
    """A bar that moves 4 pixels a field: even rows a field before the odd ones."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        options: dict[str, Any] = (
            {"crf": "6", "flags": "+ildct+ilme", "x264-params": "tff=1"} if fields else {"crf": "6"}
        )
        stream = output.add_stream("libx264", rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv444p"  # 4:2:0 would blend the fields' colours
        for number in range(count):
            image = bar(2 * number)
            image[1::2] = bar(2 * number + 1)[1::2]
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def combs(frames: np.ndarray) -> float:
    """How much rows differ from those above and below that should look the same."""
    rows = frames.astype(float)
    return float(np.abs(rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).mean())


def test_interlaced_footage_shows_one_moment_a_frame() -> None:
    shape = ClipShape(8, 64, 128)
    assert combs(decode_clip(interlaced(8, fields=False), shape)) > 10  # what a reader sees that does not know
    assert combs(decode_clip(interlaced(8), shape)) < 2
    assert len(decode_clip(interlaced(8), ClipShape(16, 64, 128, 16.0))) == 16  # none is lost at the end


def test_deinterlacing_keeps_times_and_is_told() -> None:
    notes: list[str] = []
    with av.open(io.BytesIO(interlaced(8))) as container:
        stream = open_stream(container)
        _, frames = timed_frames(container, stream)
        out = list(progressive(frames, notes.append))
    assert [frame.start for frame in out] == pytest.approx([number / 8 for number in range(8)])
    assert notes == ["interlaced: deinterlaced by bwdif"]
    centre = [np.flatnonzero(frame.item.to_ndarray(format="rgb24")[32, :, 0] > 130).mean() for frame in out]
    assert np.allclose(np.diff(centre), 8, atol=1.5)  # each frame is that of its time
