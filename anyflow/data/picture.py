"""What a picture is: upright, of square pixels, progressive, opaque, in a plain screen's colours (BT.709, 8 bits).

Whatever a frame is instead is turned into that, and told: deinterlaced, tone-mapped, laid on a ground. A depth map is
no picture in colour, and is refused by name.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from anyflow.data.faults import DecodeError, NotColourError
from anyflow.data.frame_times import Shown

MAX_PIXELS = 2**26
"""Of a frame (8192 x 8192): a small file that claims more is a bomb, not footage."""

MIN_SIDE = 8
"""Of a frame: less is a test pattern, a tracking pixel or damage."""

ENLARGED = 1.05
"""From here on it is told that pictures are made larger: less is the rounding of a size."""

Note = Callable[[str], None]

HD_SIDES = (720, 1280)
"""Shorter and longer side: from either on, colours without a tag are BT.709's, as players have it; below, BT.601's."""
BT709, UNTAGGED, BT601 = 1, 2, 5
"""Of matrices, in FFmpeg's numbers, which are ITU-T H.273's."""
NO_MATRICES = {8: "YCgCo", 11: "YDzDx", 14: "ICtCp", 15: "IPT", 16: "YCgCo-R", 17: "YCgCo-R"}
"""libswscale takes them for BT.601 in silence."""
HDR_CURVES = {16: ("smpte2084", "HDR (PQ)"), 18: ("arib-std-b67", "HDR (HLG)")}
WIDE = {9: ("bt2020", "BT.2020"), 11: ("smpte431", "DCI-P3"), 12: ("smpte432", "Display P3")}
MAPPED_MATRICES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020nc", 10: "bt2020nc"}


def untagged_matrix(height: int, width: int) -> int:
    """The matrix of colours that carry no tag."""
    return BT709 if min(height, width) >= HD_SIDES[0] or max(height, width) >= HD_SIDES[1] else BT601


_threads = threading.local()


def reformatter() -> VideoReformatter:
    """This thread's scaler, kept from frame to frame and clip to clip.

    A frame's own one would be set up anew for every frame, which takes longer than decoding a small frame.
    """
    if not hasattr(_threads, "reformatter"):
        _threads.reformatter = VideoReformatter()
    return _threads.reformatter


@dataclass(frozen=True)
class Stance:
    """How a frame lies: first transposed, then its columns and rows reversed."""

    transposed: bool = False
    columns: bool = False
    rows: bool = False

    def upright(self, image: np.ndarray) -> np.ndarray:
        """A view of [H, W, 3] as it is meant to be seen."""
        image = image.swapaxes(0, 1) if self.transposed else image
        return image[:: -1 if self.rows else 1, :: -1 if self.columns else 1]


def stance(frame: av.VideoFrame) -> Stance:
    """How the camera was held, as its display matrix says, to the nearest quarter turn; mirrored ones too."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Stance()
    matrix = np.frombuffer(bytes(data), dtype=np.int32)  # type: ignore[call-overload]
    a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))  # x' = a x + c y, y' = b x + d y
    if abs(b) > abs(a):
        return Stance(True, c < 0, b < 0)
    return Stance(False, a < 0, d < 0)


def shown_size(stream: av.VideoStream, frame: av.VideoFrame | None) -> tuple[int, int]:
    """(height, width) as shown: in square pixels, and upright where the first frame says that the camera was turned."""
    height, width = stream.height, round(stream.width * float(stream.sample_aspect_ratio or 1))
    return (width, height) if frame is not None and stance(frame).transposed else (height, width)


def require_footage(frame: av.VideoFrame) -> None:
    """Refuse what no camera films: a few pixels, or one channel with more levels than a screen's, which are a measure.

    Raises:
        DecodeError: it is too small. NotColourError: it has no colours.
    """
    if min(frame.height, frame.width) < MIN_SIDE:
        raise DecodeError(f"pictures of {frame.width}x{frame.height} pixels are too small to be footage")
    channels = [component for component in frame.format.components if not component.is_alpha]
    if len(channels) == 1 and channels[0].bits > 8:
        raise NotColourError(f"{channels[0].bits}-bit gray: a depth map or the like, no colour")


class FrameFitter:
    """Scales a frame so that it covers the size asked for, then cuts its centre out.

    Args:
        height, width: pixels of the result, which are square.
        aspect: width of a source pixel over its height.
        note: is told what had to be converted or guessed.
    """

    def __init__(self, height: int, width: int, aspect: float, note: Note = lambda text: None) -> None:
        self.height, self.width, self.aspect, self.note = height, width, aspect, note
        self._kind: tuple[object, ...] = ()
        self._stance = Stance()
        self._render: Callable[[av.VideoFrame, int, int, str], av.VideoFrame] = _plain(None)

    def write(self, frame: av.VideoFrame, out: np.ndarray) -> None:
        """Write ``frame`` into ``out``, uint8 [H, W, 3], contiguous.

        Raises:
            DecodeError: it cannot be shown; ``NotColourError``: it shows no colours.
        """
        kind = (frame.format.name, frame.width, frame.height)
        if kind != self._kind:  # a video's frames are mostly all alike
            self._kind, self._stance, self._render = kind, stance(frame), self._renderer(frame)
        if self._stance == Stance():
            self._write(frame, out, self.height, self.width)
            return
        turned = self._stance.transposed
        height, width = (self.width, self.height) if turned else (self.height, self.width)
        lying = np.empty((height, width, 3), dtype=np.uint8)
        self._write(frame, lying, height, width)
        out[:] = self._stance.upright(lying)

    def _write(self, frame: av.VideoFrame, out: np.ndarray, height: int, width: int) -> None:
        if (frame.height, frame.width) == (height, width) and self.aspect == 1:
            tall, wide, way = height, width, "BILINEAR"
        else:
            shown = frame.width * self.aspect
            scale = max(height / frame.height, width / shown)
            tall, wide = max(height, round(frame.height * scale)), max(width, round(shown * scale))
            if scale > ENLARGED:
                self.note("pictures lower or narrower than the clips: enlarged")
            if tall * wide > MAX_PIXELS:
                raise DecodeError(f"pictures of {frame.width}x{frame.height} cannot cover {width}x{height}")
            # AREA averages on the way down (no aliasing); BICUBIC is smooth on the way up.
            way = "AREA" if scale < 1 else "BICUBIC"
        top, left = (tall - height) // 2, (wide - width) // 2
        scaled = self._render(frame, wide, tall, way)
        depth = len(scaled.format.components)
        plane = scaled.planes[0]
        lines = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
        cut = lines[top : top + height, depth * left : depth * (left + width)]
        if depth == 3:
            out.reshape(height, 3 * width)[:] = cut
        else:
            self._lay(cut.reshape(height, width, 4), out)

    def _lay(self, image: np.ndarray, out: np.ndarray) -> None:
        """Lay RGBA [H, W, 4] on black."""
        alpha = image[..., 3:].astype(np.uint16)
        if (alpha < 255).any():
            self.note("transparent pictures: laid on black")
        out[:] = (image[..., :3] * alpha + 127) // 255

    def _renderer(self, frame: av.VideoFrame) -> Callable[[av.VideoFrame, int, int, str], av.VideoFrame]:
        """What brings such frames to RGB, or to RGBA if they are not opaque."""
        require_footage(frame)
        if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
            return _plain(None if frame.format.has_palette else self._matrix(frame), "rgba")
        curve, primaries = HDR_CURVES.get(int(frame.color_trc)), WIDE.get(int(frame.color_primaries))
        if (curve or primaries) and not frame.format.is_rgb:
            self.note(f"{curve[1] if curve else primaries[1]}: mapped to BT.709")  # type: ignore[index]
            return functools.partial(_mapped, *_mapping(frame))
        return _plain(self._matrix(frame))

    def _matrix(self, frame: av.VideoFrame) -> int | None:
        """The matrix to read a frame by, where it is not the tagged one."""
        tagged = int(frame.colorspace)
        if frame.format.is_rgb or len(frame.format.components) < 3:
            return None
        if tagged in NO_MATRICES:
            raise DecodeError(f"its colours are {NO_MATRICES[tagged]}, which is not read: convert it to BT.709")
        if tagged != UNTAGGED:
            return None
        matrix = untagged_matrix(frame.height, frame.width)
        self.note(f"colours without a tag: taken as {'BT.709' if matrix == BT709 else 'BT.601'}")
        return matrix


def _plain(matrix: int | None, format: str = "rgb24") -> Callable[[av.VideoFrame, int, int, str], av.VideoFrame]:
    scale = functools.partial(reformatter().reformat, format=format, threads=1, src_colorspace=matrix)
    return lambda frame, width, height, way: scale(frame, width, height, interpolation=way)


def _mapping(frame: av.VideoFrame) -> tuple[str, dict[tuple[int, int], Any]]:
    """(the arguments of FFmpeg's filter ``scale`` that map a frame's colours to BT.709, a place for its graphs)."""
    curve = HDR_CURVES.get(int(frame.color_trc), ("bt709", ""))[0]
    primaries = WIDE.get(int(frame.color_primaries), ("bt2020", ""))[0]
    matrix = MAPPED_MATRICES.get(int(frame.colorspace), "bt2020nc")
    span = "full" if int(frame.color_range) == 2 else "limited"
    source = f"in_transfer={curve}:in_primaries={primaries}:in_color_matrix={matrix}:in_range={span}"
    return f"{source}:out_transfer=bt709:out_primaries=bt709:intent=perceptual", {}


def _mapped(
    arguments: str, graphs: dict[tuple[int, int], Any], frame: av.VideoFrame, width: int, height: int, way: str
) -> av.VideoFrame:
    """A frame scaled and tone-mapped, RGB. It is scaled first: mapping is the dearer of the two."""
    scaled = reformatter().reformat(frame, width, height, format="yuv444p10le", interpolation=way, threads=1)
    if (width, height) not in graphs:
        graphs[width, height] = _graph(scaled, ("scale", arguments), ("format", "rgb24"))
    return _through(graphs[width, height], scaled)[0]


def _graph(frame: av.VideoFrame, *filters: tuple[str, str]) -> Any:
    """FFmpeg's filters one after the other, for frames like this one."""
    graph = av.filter.Graph()
    graph.threads = 1
    buffer = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    graph.link_nodes(buffer, *(graph.add(*part) for part in filters), graph.add("buffersink")).configure()
    return graph


def _through(graph: Any, frame: av.VideoFrame | None) -> list[av.VideoFrame]:
    """What comes out of a graph when a frame goes in; None tells it that there are no more."""
    graph.push(frame)
    frames = []
    try:
        while True:
            frames.append(graph.pull())
    except (av.BlockingIOError, av.EOFError):
        return frames


def progressive(
    shown: Iterable[Shown[av.VideoFrame]], note: Note = lambda text: None
) -> Iterator[Shown[av.VideoFrame]]:
    """Frames whose rows are all of one moment: from the first interlaced one on, all go through ``bwdif``."""
    graph: Any = None
    waiting: deque[Shown[av.VideoFrame]] = deque()  # the filter looks one frame ahead
    for item in shown:
        if graph is None:
            if not item.item.interlaced_frame:
                yield item
                continue
            note("interlaced: deinterlaced by bwdif")
            graph = _graph(item.item, ("bwdif", "mode=send_frame:deint=interlaced"))
        waiting.append(item)
        yield from (waiting.popleft()._replace(item=frame) for frame in _through(graph, item.item))
    if graph is not None:
        yield from (waiting.popleft()._replace(item=frame) for frame in _through(graph, None))
