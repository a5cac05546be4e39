"""Chunks: how a causal network divides a video in time, and how one pass teaches all of its chunks (sec. 5).

A chunk of latent frames is made at once, after the chunks before it, which it sees clean: the last ones at full
resolution, older ones compressed. One training pass holds three kinds of frames, in this order:

    [context: clean, compressed | noisy frames of the full-resolution chunks | clean copies of these frames]

Context and copies are given frames: t = r = 0, no loss, at rest in the finite difference. So the objective and the
seam ``u(z, t, r, rows)`` stay as they are; only the network is told which frame is what, by a :class:`ChunkLayout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """What a pass of the causal network looks at.

    Attributes:
        compressed: Frames of each chunk that is seen compressed; the oldest chunks.
        full: Frames of each chunk at full resolution, following them.
        noisy: Whether noisy frames of the full chunks are there too, before the clean ones.
    """

    compressed: tuple[int, ...]
    full: tuple[int, ...]
    noisy: bool = True

    @property
    def context_frames(self) -> int:
        """Compressed frames."""
        return sum(self.compressed)

    @property
    def full_frames(self) -> int:
        """Frames at full resolution, copies not counted."""
        return sum(self.full)

    @property
    def frames(self) -> list[int]:
        """Of which frame of the clip each frame of the sequence is, or is a copy."""
        last = self.context_frames + self.full_frames
        return [*range(last), *(range(self.context_frames, last) if self.noisy else ())]

    @property
    def num_frames(self) -> int:
        """Frames of the whole sequence that goes into the network."""
        return self.context_frames + self.full_frames * (2 if self.noisy else 1)


@dataclass(frozen=True)
class PathBatch:
    """A batch as the objective takes it: latents ``[B, F, C, H, W]``, times ``[B]`` or ``[B, F]``.

    ``loss_frames`` ``[B, F]`` bool are the frames that are trained; None: all of them.
    """

    clean: Tensor
    noise: Tensor
    timestep: Tensor
    r_timestep: Tensor
    loss_frames: Tensor | None = None


def partition_frames(num_frames: int, pattern: Sequence[int], num_given: int = 0) -> tuple[int, ...]:
    """Divide any number of latent frames into chunks.

    Args:
        num_frames: of the video.
        pattern: the partition that the network was trained with. For other lengths its first chunk is kept and the
            others have its longest one's frames, the last what is left.
        num_given: frames at the start that are given: a chunk ends with them, so that sampling starts after them.

    Returns:
        Frames of each chunk; released: ``(1, 3, 3, 3, 3, 3, 3, 2)`` for 21.

    Raises:
        ValueError: no frames, more given than there are, or a pattern with an empty chunk.
    """
    if not pattern or min(pattern) < 1:
        raise ValueError(f"chunk partition {list(pattern)} has no chunk, or an empty one")
    if not 0 <= num_given <= num_frames or num_frames < 1:
        raise ValueError(f"{num_given} given frames of {num_frames}")
    if num_frames == sum(pattern):
        ends = [0, *accumulate(pattern)]
    else:
        ends = [0, *range(min(pattern[0], num_frames), num_frames, max(pattern)), num_frames]
    return tuple(end - start for start, end in pairwise(sorted({*ends, num_given})))


def layout_of(chunks: Sequence[int], full_limit: int, *, noisy: bool = True) -> ChunkLayout:
    """The last ``full_limit`` chunks at full resolution, those before them compressed."""
    cut = max(0, len(chunks) - full_limit)
    return ChunkLayout(tuple(chunks[:cut]), tuple(chunks[cut:]), noisy)


def draw_layout(uniforms: Tensor, chunks: Sequence[int], full_limit: int, long_context: float) -> ChunkLayout:
    """Turn two uniforms ``[2]`` into the part of a clip that a step trains on.

    With probability ``long_context`` a prefix of more than ``full_limit`` chunks, each number equally likely, whose
    last ``full_limit`` chunks are trained after compressed context; else the first ``full_limit`` chunks. Every rank
    must pass the same uniforms: the length of the sequence depends on them.
    """
    choice, length = uniforms.double().tolist()
    longer = len(chunks) - full_limit
    if longer <= 0 or choice >= long_context:
        return layout_of(chunks[:full_limit], full_limit)
    return layout_of(chunks[: full_limit + 1 + int(length * longer)], full_limit)


def in_chunks(layout: ChunkLayout, on_path: PathBatch) -> PathBatch:
    """Lay a batch of whole clips out for a teacher-forced pass.

    Args:
        layout: with noisy frames; of at most as many frames as the clips have.
        on_path: the clips. Frames without loss (a given first frame) keep their times.
    """
    context, last = layout.context_frames, layout.context_frames + layout.full_frames
    frames = torch.tensor(layout.frames, device=on_path.clean.device)
    is_noisy = torch.zeros(layout.num_frames, dtype=torch.bool, device=frames.device)
    is_noisy[context:last] = True

    def spread(time: Tensor) -> Tensor:
        time = time[:, None].expand(-1, layout.num_frames) if time.ndim == 1 else time[:, frames]
        return time.masked_fill(~is_noisy, 0.0)

    trained = is_noisy.expand(len(on_path.clean), -1)
    if on_path.loss_frames is not None:
        trained = trained & on_path.loss_frames[:, frames]
    return PathBatch(
        on_path.clean[:, frames],
        on_path.noise[:, frames],
        spread(on_path.timestep),
        spread(on_path.r_timestep),
        trained,
    )
