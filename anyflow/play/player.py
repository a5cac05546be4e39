"""Makes the chunks of the video that is steered, as pictures for a page, and records them where that is asked for."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyflow.errors import explain, first_line
from anyflow.evaluation.report.mp4 import Mp4
from anyflow.play.hands import Hands, Wheel
from anyflow.play.starts import Start
from anyflow.system.claims import claim_numbered, give_up_claim
from anyflow.system.files import replacing

if TYPE_CHECKING:
    from anyflow.evaluation.loaded import LoadedModel
    from anyflow.play.rollout import Rollout

JPEG: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}
"""No difference that an eye sees, a third of a PNG's bytes."""


@dataclass(frozen=True)
class Task:
    """What the next chunk is made of.

    Attributes:
        hands: what is done meanwhile.
        steps: of the sampler.
        start: the number of the frame to begin anew from; None: go on.
    """

    hands: Hands
    steps: int
    start: int | None = None


@dataclass(frozen=True)
class Made:
    """A chunk.

    Attributes:
        frames: JPEG files.
        values: the controls of each frame; None where none is known.
        seconds: that it took.
        is_given: whether it is the frame that the video starts from, which costs next to nothing.
        next_frames: how many the next chunk will have.
        trouble: why the film has ended, if it had to.
    """

    frames: list[bytes]
    values: list[list[float | None]]
    seconds: float
    is_given: bool
    next_frames: int
    trouble: str = ""


class Player:
    """Plays one video at a time. One thread at a time may ask it for something.

    Args:
        starts: the frames to start from.
        wheel: moves the controls.
        fps: of the footage.
        film: path of the first recording, without ``.mp4``; further ones get a number.
        seed: of the noise.
    """

    def __init__(self, starts: Sequence[Start], wheel: Wheel, fps: float, film: Path, seed: int = 0) -> None:
        self.starts, self._wheel, self._fps, self._film, self._seed = starts, wheel, fps, film, seed
        self._model: LoadedModel | None = None
        self._rollout: Rollout | None = None
        self.is_ready = False
        """Whether chunks can be asked for: the model is loaded."""
        self._recording: Recording | None = None

    def load(self, model: LoadedModel) -> None:
        """Take the model, and make its first chunks, which are slow, before anyone waits for them."""
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # the browser needs one as well
        self._model = model
        self.make(Task(Hands(), 1, 0))
        self.make(Task(Hands(), 1))
        self._rollout = None
        self.is_ready = True

    def make(self, task: Task) -> Made:
        """The next chunk; before :meth:`load` there is none."""
        import torch

        from anyflow.play.rollout import Rollout

        assert self._model is not None
        began = time.perf_counter()
        is_new = task.start is not None or self._rollout is None
        if is_new:
            start = self.starts[task.start or 0]
            pixels = None if start.pixels is None else torch.from_numpy(start.pixels)
            self._rollout = Rollout(self._model, start.caption, pixels, self._seed)
            self._wheel.begin(start.domain)
        assert self._rollout is not None
        controls = self._wheel.move(task.hands, self._rollout.next_frames)
        frames = self._rollout.chunk(torch.from_numpy(controls), task.steps).numpy()
        trouble = self._film_of(frames)
        pictures = [jpeg(frame) for frame in frames]
        values = [[None if np.isnan(value) else float(value) for value in row] for row in controls]
        seconds = time.perf_counter() - began
        is_given = is_new and self.starts[task.start or 0].pixels is not None
        return Made(pictures, values, seconds, is_given, self._rollout.next_frames, trouble)

    def _film_of(self, frames: NDArray[np.uint8]) -> str:
        """Add frames to the film, if there is one; why it had to end, if it had to: the play goes on."""
        if self._recording is not None:
            try:
                self._recording.add(frames)
            except OSError as error:
                recording, self._recording = self._recording, None
                recording.abandon()
                return f"the film is lost: {explain(error) or first_line(error)}"
        return ""

    @property
    def is_recording(self) -> bool:
        """Whether what is made is written to a film as well."""
        return self._recording is not None

    def record(self, wanted: bool) -> str:
        """Begin or end a recording; what to say of it, a failure of the disk too."""
        try:
            if wanted and self._recording is None:
                self._recording = Recording(self._film, self._fps)
                return f"recording to {self._recording.path}"
            if not wanted and self._recording is not None:
                recording, self._recording = self._recording, None
                return recording.close()
        except OSError as error:
            return explain(error) or first_line(error)
        return ""


class Recording:
    """A film that is a file when it is closed: whole, or not there."""

    def __init__(self, first: Path, fps: float) -> None:
        self._claimed = claim_numbered(first, lambda path: _film(path).exists())
        self.path = _film(self._claimed).absolute()
        self._stack = ExitStack()
        self._mp4 = self._stack.enter_context(Mp4(self._stack.enter_context(replacing(self.path)), fps))
        self._frames = 0

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Write frames ``[n, H, W, 3]``."""
        for frame in frames:
            self._mp4.add(frame)
        self._frames += len(frames)

    def close(self) -> str:
        """Finish the file; what to say of it."""
        if self._frames == 0:
            self.abandon()
            return "nothing was recorded"
        try:
            self._stack.close()
        finally:
            give_up_claim(self._claimed)
        return f"recorded {self._frames} frames: {self.path}"

    def abandon(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):
            self._stack.__exit__(ValueError, ValueError("no film"), None)
        give_up_claim(self._claimed)


def _film(claimed: Path) -> Path:
    return claimed.with_name(f"{claimed.name}.mp4")


def jpeg(frame: NDArray[np.uint8]) -> bytes:
    """A frame ``[H, W, 3]`` as a file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, **JPEG)
    return file.getvalue()
