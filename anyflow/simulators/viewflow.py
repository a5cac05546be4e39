"""How a whole view moves from frame to frame: one shift and one expansion, fitted to the pixels.

The model of a turning and walking camera, with ``c`` the picture's centre::

    next(x + a + b * (x - cx), y + b * (y - cy)) = this(x, y)

A whole-number search gives the first ``a``, Gauss-Newton on smoothed, shrunk frames the rest. Things that fit no common
motion (uncovered, passing, cut at the border) count less through robust weights.

Shapes: N pairs of frames, C colours, H height, W width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

FLOW_WIDTH = 48
"""Frames are averaged down to about this width before the fit: faster, and a global motion stays what it is."""

ITERATIONS = 5

OUTLIER = 0.1
"""Brightness error (of 1) at which a pixel counts half."""


class ViewFlow(NamedTuple):
    """The fit of each pair of successive frames, float64 ``[F - 1]`` each."""

    shift: NDArray[np.float64]
    """Pixels by which the scene moves to the right."""
    expansion: NDArray[np.float64]
    """The share by which the picture grows about its centre."""
    match: NDArray[np.float64]
    """Correlation of the frame with the next one moved back; near 1 if the model explains the change."""


@torch.no_grad()
def fit_view_flow(frames: NDArray[np.uint8]) -> ViewFlow:
    """Fit shift and expansion to each pair of successive frames of a clip, uint8 ``[F, H, W, 3]``."""
    shrink = max(1, round(frames.shape[2] / FLOW_WIDTH))
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    video = functional.avg_pool2d(video, shrink)
    video = functional.avg_pool2d(video, 3, stride=1, padding=1, count_include_pad=False)
    this, following = video[:-1], video[1:]
    shift, expansion = _whole_shift(this, following), torch.zeros(len(this))
    for _ in range(ITERATIONS):
        shift, expansion = _gauss_newton(this, following, shift, expansion)
    warped, inside = _move_back(following, shift, expansion)
    match = _correlation(this, warped, inside)
    return ViewFlow(shift.double().numpy() * shrink, expansion.double().numpy(), match.double().numpy())


def _whole_shift(this: Tensor, following: Tensor) -> Tensor:
    """Return the whole number of pixels, up to a sixth of the width, by which each picture moves to the right."""
    width = this.shape[-1]
    reach = width // 6
    costs = []
    for shift in range(-reach, reach + 1):
        here = this[..., max(0, -shift) : width - max(0, shift)]
        there = following[..., max(0, shift) : width - max(0, -shift)]
        # Where nothing has texture, all shifts cost the same: prefer none.
        costs.append((here - there).abs().mean((1, 2, 3)) + 1e-6 * abs(shift))
    return torch.stack(costs).argmin(0).float() - reach


def _offsets(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return each pixel's distance from the centre: x ``[1, W]`` and y ``[H, 1]``."""
    height, width = image.shape[-2:]
    return torch.arange(width)[None, :] - (width - 1) / 2, torch.arange(height)[:, None] - (height - 1) / 2


def _move_back(following: Tensor, shift: Tensor, expansion: Tensor) -> tuple[Tensor, Tensor]:
    """Sample the next frames where the model says that this one's pixels went, and mark the pixels inside."""
    x, y = _offsets(following)
    grow = 1 + expansion[:, None, None]
    at_x = (x * grow + shift[:, None, None]) / x.max()
    at_y = y * grow / y.max()
    places = torch.stack(torch.broadcast_tensors(at_x, at_y), -1)
    warped = functional.grid_sample(following, places, padding_mode="border", align_corners=True)
    return warped, (places.abs() <= 1).all(-1).float()[:, None]


def _gauss_newton(this: Tensor, following: Tensor, shift: Tensor, expansion: Tensor) -> tuple[Tensor, Tensor]:
    """Improve shift and expansion by one weighted least-squares step."""
    warped, inside = _move_back(following, shift, expansion)
    x, y = _offsets(this)
    slope_x = functional.pad(warped[..., 2:] - warped[..., :-2], (1, 1)) / 2
    slope_y = functional.pad(warped[..., 2:, :] - warped[..., :-2, :], (0, 0, 1, 1)) / 2
    slopes = torch.stack([slope_x, slope_x * x + slope_y * y], -1).flatten(1, -2)
    error = (this - warped).flatten(1)
    weight = inside.expand_as(this).flatten(1) / (1 + (error / OUTLIER).square())
    weighted = slopes * weight[..., None]
    # A little damping keeps a view without texture at rest.
    normal = weighted.mT @ slopes + torch.diag(torch.tensor([1e-3, 1e-3 * this.shape[-1] ** 2]))
    change = torch.linalg.solve(normal, weighted.mT @ error[..., None])[..., 0]
    return shift + change[:, 0], (expansion + change[:, 1]).clamp(-0.2, 0.2)


def _correlation(first: Tensor, second: Tensor, inside: Tensor) -> Tensor:
    """Return the correlation of two pictures over the pixels inside, ``[N]``; 0 if either is flat."""
    count = inside.sum((2, 3), keepdim=True).clamp_min(1)
    p, q = (inside * (image - (inside * image).sum((2, 3), keepdim=True) / count) for image in (first, second))
    norm = (p.square().sum((1, 2, 3)) * q.square().sum((1, 2, 3))).sqrt()
    return (p * q).sum((1, 2, 3)) / norm.clamp_min(1e-6)
