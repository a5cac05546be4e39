"""Distances between sets of clips that need no downloaded weights, to be read beside their floor.

Two views of the same clips:

- ``sliced_wasserstein``: how far apart two sets of *latents* are, along fixed random directions.
- ``frechet`` and ``kernel_distance`` of ``frame_features``: simple, fixed features of *frames* (colour layout,
  sharpness layout, motion layout). That is not FVD and not FID: no learned network is involved, and the values compare
  only with each other. Both take any other features, too.

A distance between finite sets of one and the same distribution is not zero. So every figure is reported beside its
**floor**: the distance between two disjoint sets of real clips of the same size.

Shapes: N clips, F frames, H height, W width, C channels. All arithmetic in float64.
"""

from __future__ import annotations

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


def preview_error(samples: Tensor, finals: Tensor, real: Tensor) -> float:
    """How far samples of few steps lie from those of the same noise at many: ``rms(samples - finals) / spread(real)``.

    A flow map's jumps end where its many steps end, so a preview shows the clip that many steps would make. No two sets
    are compared here, each sample has its own counterpart: so the figure tells small differences, and says nothing of
    quality. 0: the same clips. About 1.4: clips that have nothing to do with each other.

    Args:
        samples: latents ``[N, ...]``.
        finals: of the same prompts and noise, of the same shape.
        real: latents ``[M, ...]`` of real clips; their spread around their mean is the unit.
    """
    spread = (real - real.mean(dim=0)).square().mean().sqrt()
    return float((samples - finals).square().mean().sqrt() / spread)


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


def frame_features(clips: Tensor) -> Tensor:
    """``FrameFeatures`` of every pair of successive frames of uint8 clips ``[N, F, H, W, 3]``: ``[N * (F - 1), 120]``.

    Raises:
        ValueError: if there are fewer than two pairs of frames.
    """
    if clips.shape[0] * (clips.shape[1] - 1) < 2:
        raise ValueError(f"at least two pairs of frames are needed, got clips of shape {tuple(clips.shape)}")
    extract = FrameFeatures()
    # Clip by clip: memory stays small at any resolution.
    return torch.cat([extract(torch.stack([clip[:-1], clip[1:]], dim=1)) for clip in clips])


class _AsTheyAre(nn.Module):
    """Stands where torchmetrics' metrics have their network: the features come in computed."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features ``[M, D]``, M >= 2."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = _AsTheyAre(first.shape[1])
    # every rank has all features: summed over the ranks each would count several times
    metric = FrechetInceptionDistance(feature=network, sync_on_compute=False).set_dtype(torch.float64)
    metric.update(first.double(), real=True)
    metric.update(second.double(), real=False)
    try:
        distance = float(metric.compute())
    except torch.linalg.LinAlgError:  # few or still clips: eigenvalues of a product of singular matrices were not found
        distance = _symmetric_frechet(metric)
    # Rounding can leave a tiny negative number where the two sets are one and the same.
    return max(0.0, distance)


def kernel_distance(reference: Tensor, features: Tensor, *, clips: int | None = None) -> float:
    """Squared maximum mean discrepancy of two sets of features ``[M, D]`` under KID's cubic kernel; unbiased.

    ``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)``, where x and x' are of different *clips*: features of one clip
    are alike, so counting them as independent (as KID does of pictures) makes equal distributions look far apart.

    The features are first brought to the reference's mean, and to its spread over all dimensions: one unit for all, or
    a dimension that hardly varies in the reference (a patch of sky) would drown the others. Unlike the Frechet distance
    it fits no Gaussian and does not grow where clips are few (but for what the unit itself is uncertain by); chance can
    bring it a little below 0.

    Args:
        reference: of the clips that distances are taken to.
        features: of the clips that are judged.
        clips: how many clips each set's features are of, the same number in turn; None: one feature a clip.
    Raises:
        ValueError: a set has fewer than two clips, or features that cannot be dealt out to them.
    """
    variance, mean = torch.var_mean(reference.double(), dim=0)
    unit = variance.mean().sqrt().clamp(min=1e-6)
    first, second = ((values.double() - mean) / unit for values in (reference, features))
    counts = [clips or len(values) for values in (first, second)]
    if min(counts) < 2 or any(len(v) % n for v, n in zip((first, second), counts, strict=True)):
        raise ValueError(f"{len(first)} and {len(second)} features cannot be dealt out to {clips} clips, at least two")
    within = [_clip_kernels(values, values, n, n) for values, n in zip((first, second), counts, strict=True)]
    alike = [float((kernels.sum() - kernels.trace()) / (len(kernels) * (len(kernels) - 1))) for kernels in within]
    return sum(alike) - 2 * float(_clip_kernels(first, second, *counts).mean())


def _clip_kernels(first: Tensor, second: Tensor, first_clips: int, second_clips: int) -> Tensor:
    """The mean kernel ``(x . y / D + 1)^3`` of the features of every two clips, ``[first_clips, second_clips]``."""
    rows = []
    for own in first.chunk(first_clips):  # clip by clip: a matrix of all features would not fit
        kernels = (own @ second.T / first.shape[1] + 1) ** 3
        rows.append(kernels.mean(dim=0).unflatten(0, (second_clips, -1)).mean(dim=1))
    return torch.stack(rows)


def spread_ratio(samples: Tensor, real: Tensor) -> float:
    """How much samples differ among each other, in units of how much real clips do: ``rms`` around each set's mean.

    1: as varied as real clips; below 1: too alike (blur, or the same clip again and again). It stands beside the sliced
    distance, which between few clips is a little smaller for samples that are too alike than for real ones.

    Args:
        samples: latents ``[N, ...]``, N >= 2.
        real: latents ``[M, ...]`` of real clips, M >= 2.
    """
    return float((samples.var(dim=0).mean() / real.var(dim=0).mean()).sqrt())


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


def motion_energy(clips: Tensor) -> float:
    """Mean absolute change between successive frames, in grey levels (0..255), of uint8 clips ``[N, F, H, W, 3]``."""
    total = sum(float(clip.to(torch.float64).diff(dim=0).abs().mean()) for clip in clips)
    return total / max(1, clips.shape[0])


def temporal_consistency(clips: Tensor) -> float:
    """Mean structural similarity (SSIM) of successive frames of uint8 clips ``[N, F, H, W, 3]``; 1 is a still picture.

    Flicker and things that appear and vanish lower it, and so does honest motion: read it beside the real clips'.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = []
    for clip in clips:
        frames = clip.permute(0, 3, 1, 2).float()
        alike = structural_similarity_index_measure(frames[1:], frames[:-1], data_range=255.0)
        found.append(float(torch.as_tensor(alike)))
    return sum(found) / len(found)


def given_frame_psnr(clips: Tensor, real: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of given frames ``[N, k, H, W, 3]`` to the real ones, at most 100."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ratio = peak_signal_noise_ratio(clips.double(), real.double(), data_range=255.0)
    return min(100.0, float(ratio))
