"""A film written frame by frame."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import av


class Mp4:
    """An mp4 of h264 in yuv420p, playable in every browser while it loads; it is a file when the block ends.

    The same frames make the same bytes on one machine.

    Args:
        path: of the file.
        fps: frames a second.
        quality: h264's constant rate factor: 18 looks like the original, each 6 more halve the bytes.
    """

    def __init__(self, path: Path, fps: float, quality: int = 18) -> None:
        self._path, self._fps, self._quality = path, fps, quality
        self._stream: av.VideoStream | None = None

    def __enter__(self) -> Mp4:
        import av

        self._container = av.open(str(self._path), "w", format="mp4", options={"movflags": "faststart"})
        return self

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Encode the next frame, uint8 RGB ``[H, W, 3]`` of even sizes, those of the first."""
        import av

        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=Fraction(self._fps).limit_denominator(1001))
            self._stream.height, self._stream.width = frame.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            # x264's "mbtree" makes files of the same small frames differ from run to run
            self._stream.options = {"crf": str(self._quality), "preset": "medium", "x264-params": "mbtree=0"}
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        self._container.mux(self._stream.encode(picture))

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()
