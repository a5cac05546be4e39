"""When the next chunk is begun: as late as it can be, so that it knows the newest keys, and never ahead of the page."""

from __future__ import annotations

from collections import deque

SLACK = 1.2
"""How much longer than the slowest of the last ones a chunk may take before the page has to wait for it."""
REMEMBERED = 6
"""Chunks that the speed is judged by."""


class Pace:
    """Keeps a video at its own rate where the model is fast enough, and in step with the keys where it is not.

    One chunk is made while the one before it is on show. A fast model waits until there is just time enough left; a
    slow one begins at once, and chunks are shown for as long as the next one takes: slower, and not in jerks.

    Args:
        fps: frames a second of the footage.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self._taken: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def forget(self) -> None:
        """Judge the speed anew: the chunks to come are made in another way."""
        self._taken.clear()

    def note(self, frames: int, seconds: float) -> None:
        """A chunk of so many frames took so long."""
        self._taken.append((frames, seconds))

    def expected(self, frames: int) -> float:
        """Seconds that a chunk of so many frames takes: as the slowest of the last ones did, a frame."""
        return frames * max((seconds / count for count, seconds in self._taken), default=0.0)

    def on_show(self, frames: int) -> float:
        """Seconds for which a chunk of so many frames is to be shown."""
        return frames / min(self.fps, self.rate or self.fps)

    def wait(self, shown: float, on_show: float, now: float, frames: int) -> float:
        """Seconds from ``now`` until the next chunk, of ``frames``, has to be begun.

        Args:
            shown: when the page began to show the chunk before it.
            on_show: for how long it shows that.
            now: by the same clock.
            frames: of the next chunk.
        """
        if not self._taken:
            return 0.0  # how long it takes is found out by making one
        return max(0.0, shown + on_show - SLACK * self.expected(frames) - now)

    @property
    def rate(self) -> float:
        """Frames a second that the model makes; 0: none were made yet."""
        frames, seconds = (sum(column) for column in zip(*self._taken, strict=True)) if self._taken else (0, 0.0)
        return frames / seconds if seconds > 0 else 0.0

    @property
    def is_behind(self) -> bool:
        """Whether the model is slower than the footage."""
        return 0 < self.rate < self.fps
