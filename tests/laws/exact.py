"""Flow maps known exactly, in float64: of a Gaussian, of a mixture of Gaussians, and of guidance between two Gaussians.

Points are ``[n, 2]``; times are timesteps ``[n]``. All functions are differentiable, so jvp goes through them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""``field(z, sigma)``: an instantaneous velocity."""


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, spread^2 I). At sigma, z is normal with mean ``(1-sigma) mean`` and variance
    ``((1-sigma) spread)^2 + sigma^2``; the flow moves every point with its standard score, so the map is affine."""

    mean: Tensor
    spread: float

    def level(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[n, 2]`` and standard deviation ``[n, 1]`` of z at sigma ``[n]``."""
        sigma = sigma[:, None]
        return (1 - sigma) * self.mean, (((1 - sigma) * self.spread).square() + sigma.square()).sqrt()

    def velocity(self, z: Tensor, sigma: Tensor) -> Tensor:
        """E[noise - clean | z] = dmean/dsigma + (dstd/dsigma / std) (z - mean)."""
        mean, std = self.level(sigma)
        sigma = sigma[:, None]
        return -self.mean + (sigma - (1 - sigma) * self.spread**2) / std.square() * (z - mean)

    def mean_velocity(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u(z, t, r) = (z - z_r) / (sigma_t - sigma_r), closed form; the velocity at t = r."""
        start, end = t / 1000, r / 1000
        (mean, std), (mean_end, std_end) = self.level(start), self.level(end)
        landed = mean_end + std_end / std * (z - mean)
        return mean_over(z - landed, start, end, self.velocity(z, start))


@dataclass(frozen=True)
class Mixture:
    """Data of equally likely N(centre_k, spread^2 I): the velocity is closed form, its map an ODE solved to 1e-7."""

    centres: Tensor
    spread: float

    def velocity(self, z: Tensor, sigma: Tensor) -> Tensor:
        """Each component's velocity, weighted by how likely it is to have made z."""
        column = sigma[:, None, None]
        variance = ((1 - column) * self.spread).square() + column.square()
        offset = z[:, None] - (1 - column) * self.centres
        share = torch.softmax(-offset.square().sum(-1) / (2 * variance[..., 0]), dim=-1)
        each = -self.centres + (column - (1 - column) * self.spread**2) / variance * offset
        return (share[..., None] * each).sum(dim=1)

    def mean_velocity(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u(z, t, r) by solving the flow's ODE from t to r."""
        return solved(self.velocity, z, t, r)


@dataclass(frozen=True)
class Guided:
    """The flow of ``scale * velocity_text + (1 - scale) * velocity_negative``: what fused guidance should become.

    Each velocity is ``a z + b`` with ``a = dlog(std)/dsigma``, so the guided one is affine too: its homogeneous
    solution is ``growth = std_text^scale * std_negative^(1 - scale)``, the rest one smooth integral (Gauss-Legendre).
    """

    text: Gaussian
    negative: Gaussian
    scale: float

    def velocity(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.scale * self.text.velocity(z, sigma) + (1 - self.scale) * self.negative.velocity(z, sigma)

    def growth(self, sigma: Tensor) -> Tensor:
        return self.text.level(sigma)[1] ** self.scale * self.negative.level(sigma)[1] ** (1 - self.scale)

    def mean_velocity(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """z_r = growth_r (z / growth_t + integral from t to r of b / growth)."""
        start, end = t / 1000, r / 1000
        integral = torch.zeros_like(z)
        for node, weight in zip(*np.polynomial.legendre.leggauss(24), strict=True):
            sigma = (start + end) / 2 + float(node) * (end - start) / 2
            b = self.velocity(torch.zeros_like(z), sigma)
            integral = integral + float(weight) * ((end - start) / 2)[:, None] * b / self.growth(sigma)
        landed = self.growth(end) * (z / self.growth(start) + integral)
        return mean_over(z - landed, start, end, self.velocity(z, start))


def mean_over(moved: Tensor, start: Tensor, end: Tensor, at_start: Tensor) -> Tensor:
    """``moved / (start - end)``, and the velocity where nothing moves."""
    length = (start - end)[:, None]
    still = length == 0
    return torch.where(still, at_start, moved / torch.where(still, torch.ones_like(length), length))


def solved(field: Field, z: Tensor, t: Tensor, r: Tensor, num_steps: int = 60) -> Tensor:
    """The mean velocity between t and r by classical Runge-Kutta, each sample with its own step."""
    start, end = t / 1000, r / 1000
    jump = (end - start) / num_steps
    point, time = z, start
    for _ in range(num_steps):
        column = jump[:, None]
        one = field(point, time)
        two = field(point + column / 2 * one, time + jump / 2)
        three = field(point + column / 2 * two, time + jump / 2)
        four = field(point + column * three, time + jump)
        point, time = point + column / 6 * (one + 2 * two + 2 * three + four), time + jump
    return mean_over(z - point, start, end, field(z, start))


def pair_through(z: Tensor, velocity: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The clean and the noise whose straight path passes z at t with this velocity.

    With the exact velocity there, the target for the exact map is the prediction itself, not only on average.
    """
    sigma = (t / 1000)[:, None]
    return z - sigma * velocity, z + (1 - sigma) * velocity


GAUSSIAN = Gaussian(torch.tensor([1.5, -0.5], dtype=torch.float64), 0.4)
MIXTURE = Mixture(torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], dtype=torch.float64), 0.5)
GUIDED = Guided(GAUSSIAN, Gaussian(torch.tensor([-0.5, 0.5], dtype=torch.float64), 1.2), 3.0)
EXACT: dict[str, Gaussian | Mixture] = {"gaussian": GAUSSIAN, "mixture": MIXTURE}


def draw(flow: Gaussian | Mixture, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points and intervals of every kind: z ``[n, 2]``, t ``[n]``, r ``[n]`` with r = t, r = 0 and free in turn."""
    generator = torch.Generator().manual_seed(seed)
    times = 1000 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    t, r = times.max(dim=1).values.clamp(min=20), times.min(dim=1).values
    kind = torch.arange(count) % 3
    r = torch.where(kind == 0, t, torch.where(kind == 1, 0.0, r.minimum(t - 10)))
    return 1.5 * torch.randn(count, 2, generator=generator, dtype=torch.float64), t, r
