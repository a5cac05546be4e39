"""Distances between sets of clips that need no downloaded weights, to be read beside their floor.

Two views of the same clips:

- ``sliced_wasserstein``: how far apart two sets of *latents* are, along fixed random directions.
- ``frame_frechet``: the Frechet distance between Gaussians fitted to simple, fixed features of *frames* (colour
  layout, sharpness layout, motion layout). It is not FVD and not FID: no learned network is involved, and its
  values compare only with each other.

A distance between finite sets of one and the same distribution is not zero. So every figure is reported beside its
**floor**: the distance between two disjoint sets of real clips of the same size.

Shapes: N clips, F frames, H height, W width, C channels. All arithmetic in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PROJECTIONS = 256
"""Directions of the sliced distance."""

DIMENSIONS_AT_ONCE = 2**14
"""Dimensions whose directions are in memory together (32 MB)."""

GRID = (4, 6)
"""Rows and columns of the cells over which frame features are averaged."""

SHARPNESS_SCALE = 4.0
"""Makes the spread of the sharpness features comparable with that of the colours (both in [0, 1])."""

MOTION_SCALE = 4.0
"""The same for the motion features."""


def sliced_wasserstein(first: Tensor, second: Tensor, *, projections: int = PROJECTIONS, seed: int = 0) -> float:
    """Mean Wasserstein-1 distance of two sets of equal size along fixed random directions.

    Both sets are projected on ``projections`` unit vectors drawn once from ``seed``; in one dimension the optimal
    transport pairs the sorted values, so each direction costs a sort. For a pure shift by the vector ``d`` in ``D``
    dimensions the expectation is ``|d| * E|cos|``, about ``|d| * sqrt(2 / (pi * D))``.

    Args:
        first: ``[N, ...]``, one row per clip; the rest is flattened.
        second: ``[N, ...]``, of the same shape: sets of different sizes have different floors and do not compare.
    Raises:
        ValueError: if the shapes differ or a set is empty.
    """
    if first.shape != second.shape or first.shape[0] == 0:
        raise ValueError(f"two sets of equal size are needed, got {tuple(first.shape)} and {tuple(second.shape)}")
    generator = torch.Generator().manual_seed(seed)
    flat = torch.cat([points.detach().to("cpu", torch.float64).flatten(1) for points in (first, second)])
    projected = torch.zeros(len(flat), projections, dtype=torch.float64)
    squares = torch.zeros(projections, dtype=torch.float64)
    # Directions are drawn block by block: a long clip's latents have millions of dimensions.
    for block in flat.split(DIMENSIONS_AT_ONCE, dim=1):
        directions = torch.randn(block.shape[1], projections, generator=generator).double()
        projected += block @ directions
        squares += directions.square().sum(0)
    ordered = [part.sort(dim=0).values for part in (projected / squares.sqrt()).chunk(2)]
    return float((ordered[0] - ordered[1]).abs().mean())


class FrameFeatures(nn.Module):
    """Fixed features of a frame and its successor: colour, sharpness and motion, averaged over a grid of cells.

    Nothing is learned and nothing is random. Per cell: the mean colour (3 numbers), the mean absolute spatial gradient
    of the brightness (blur lowers it, noise raises it), and the mean absolute change to the next frame (a frozen clip
    has none).
    """

    num_features = GRID[0] * GRID[1] * 5

    def forward(self, pairs: Tensor) -> Tensor:
        """Map uint8 pairs ``[N, 2, H, W, 3]`` (a frame and the next) to float64 features ``[N, 120]``."""
        frames = pairs.to(torch.float64).div(255.0).permute(0, 1, 4, 2, 3)
        frame, following = frames[:, 0], frames[:, 1]
        brightness = frame.mean(1, keepdim=True)
        gradient = functional.pad(brightness.diff(dim=-1).abs(), (0, 1)) + functional.pad(
            brightness.diff(dim=-2).abs(), (0, 0, 0, 1)
        )
        change = (following - frame).abs().mean(1, keepdim=True)
        maps = torch.cat([frame, gradient * SHARPNESS_SCALE, change * MOTION_SCALE], dim=1)
        return functional.adaptive_avg_pool2d(maps, GRID).flatten(1)


def frame_frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance between Gaussians fitted to ``FrameFeatures`` of two sets of clips.

    Args:
        first: uint8 clips ``[N, F, H, W, 3]`` with F >= 2.
        second: the other set; take equal sizes, the estimate's bias depends on the size.
    Raises:
        ValueError: if a set has fewer than two pairs of frames.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=FrameFeatures()).set_dtype(torch.float64)
    for clips, real in ((first, True), (second, False)):
        if clips.shape[0] * (clips.shape[1] - 1) < 2:
            raise ValueError(f"at least two pairs of frames are needed, got clips of shape {tuple(clips.shape)}")
        for pairs in _frame_pairs(clips):
            metric.update(pairs, real=real)
    try:
        distance = float(metric.compute())
    except torch.linalg.LinAlgError:  # few or still clips: eigenvalues of a product of singular matrices were not found
        distance = _symmetric_frechet(metric)
    # Rounding can leave a tiny negative number where the two sets are one and the same.
    return max(0.0, distance)


def _symmetric_frechet(metric: Any) -> float:
    """The same distance by symmetric matrices alone, whose eigenvalues are always found.

    The trace of the root of S1 S2 is the sum of the singular values of root(S1) root(S2).
    """
    means, roots, traces = [], [], 0.0
    for kind in ("real", "fake"):
        count = getattr(metric, f"{kind}_features_num_samples")
        mean = getattr(metric, f"{kind}_features_sum") / count
        spread = (getattr(metric, f"{kind}_features_cov_sum") - count * torch.outer(mean, mean)) / (count - 1)
        values, vectors = torch.linalg.eigh((spread + spread.T) / 2)
        means.append(mean)
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
        traces += float(spread.trace())
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    return float((means[0] - means[1]).square().sum() - 2 * overlap) + traces


def _frame_pairs(clips: Tensor) -> Iterator[Tensor]:
    """Yield, clip by clip (memory stays small at any resolution), all pairs of successive frames."""
    for clip in clips:
        yield torch.stack([clip[:-1], clip[1:]], dim=1)


def motion_energy(clips: Tensor) -> float:
    """Mean absolute change between successive frames, in grey levels (0..255), of uint8 clips ``[N, F, H, W, 3]``."""
    total = sum(float(clip.to(torch.float64).diff(dim=0).abs().mean()) for clip in clips)
    return total / max(1, clips.shape[0])
