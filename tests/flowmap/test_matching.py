"""Distribution matching: which way samples are pulled, how strongly, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anyflow.flowmap import TIMESTEPS, critic_loss, matching_gradient, matching_loss, matching_timestep, step

ROWS = torch.arange(4)


def gaussian(mean: float, calls: list[Tensor] | None = None) -> Callable[..., Tensor]:
    """The exact velocity of data N(mean, 1); a negative prompt (row 4) has mean 0."""

    def velocity(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        if calls is not None:
            calls.append(rows)
        sigma = (t / TIMESTEPS)[:, None]
        centre = torch.where(rows == 4, 0.0, mean)[:, None]
        excess = (z - (1 - sigma) * centre) / ((1 - sigma) ** 2 + sigma**2)
        return sigma * excess - (centre + (1 - sigma) * excess)

    return velocity


def question() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples, noise = (torch.randn(4, 6, generator=generator) for _ in range(2))
    return samples, noise, torch.tensor([200.0, 400.0, 600.0, 800.0])


def test_descending_moves_samples_to_the_teachers_mean() -> None:
    samples, noise, timestep = question()
    found = matching_gradient(gaussian(1.0), gaussian(3.0), samples + 1, noise, timestep, ROWS, extra_guidance=0.0)
    assert (found.gradient < 0).all(), "samples at 1 must grow towards 3"
    z = (timestep / TIMESTEPS)[:, None] * noise + (1 - timestep / TIMESTEPS)[:, None] * (samples + 1)
    clean = step(z, gaussian(3.0)(z, timestep, timestep, ROWS), timestep, torch.zeros(4))
    torch.testing.assert_close(found.normaliser, (samples + 1 - clean).abs().mean(dim=1))
    torch.testing.assert_close(found.gradient, found.raw / found.normaliser[:, None])


def test_nothing_pulls_where_critic_and_teacher_agree() -> None:
    calls: list[Tensor] = []
    found = matching_gradient(gaussian(2.0), gaussian(2.0, calls), *question(), ROWS, extra_guidance=0.0)
    assert not found.gradient.any()
    assert len(calls) == 1, "no guidance, no second pass"


def test_extra_guidance_is_a_usual_scale_of_one_more() -> None:
    samples, noise, timestep = question()
    calls: list[Tensor] = []
    found = matching_gradient(gaussian(0.0), gaussian(3.0, calls), samples, noise, timestep, ROWS, extra_guidance=2.0)
    z = (timestep / TIMESTEPS)[:, None] * noise + (1 - timestep / TIMESTEPS)[:, None] * samples

    def clean(mean: float) -> Tensor:
        return step(z, gaussian(mean)(z, timestep, timestep, ROWS), timestep, torch.zeros(4))

    usual = clean(0.0) + 3.0 * (clean(3.0) - clean(0.0))
    torch.testing.assert_close(found.raw, clean(0.0) - usual, rtol=1e-4, atol=1e-5)
    assert [rows.tolist() for rows in calls] == [[0, 1, 2, 3], [4, 4, 4, 4]]


def test_the_losss_derivative_is_the_gradient() -> None:
    samples = torch.randn(4, 6, requires_grad=True)
    gradient = torch.randn(4, 6)
    loss = matching_loss(samples, gradient)
    assert loss.shape == (4,) and loss.dtype == torch.float64
    loss.mean().backward()
    torch.testing.assert_close(samples.grad, 2 * gradient / gradient.numel(), rtol=1e-5, atol=1e-7)


def test_what_is_no_number_pulls_nowhere() -> None:
    samples, noise, timestep = question()
    broken = samples.clone()
    broken[1] = torch.nan
    found = matching_gradient(gaussian(1.0), gaussian(3.0), broken, noise, timestep, ROWS)
    assert not found.gradient[1].any() and found.gradient[0].all() and torch.isfinite(found.gradient).all()


def test_given_frames_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    samples, noise = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    given = torch.tensor([[True, False, False]]).expand(2, 3)
    timestep = torch.full((2, 3), 500.0).masked_fill(given, 0.0)
    found = matching_gradient(
        lambda z, t, r, rows: z, lambda z, t, r, rows: 2 * z, samples, noise, timestep, ROWS[:2], given_frames=given
    )
    assert not found.gradient[:, 0].any() and found.gradient[:, 1:].all()


def test_gradients_reach_the_critic_alone() -> None:
    samples, noise, timestep = question()
    samples.requires_grad_()
    weight = torch.tensor(0.5, requires_grad=True)
    found = matching_gradient(lambda z, t, r, rows: weight * z, gaussian(3.0), samples, noise, timestep, ROWS)
    assert not found.gradient.requires_grad
    critic_loss(lambda z, t, r, rows: weight * z, samples, noise, timestep, ROWS).sum().backward()
    assert samples.grad is None and weight.grad is not None


def test_times_stay_in_range_and_are_shifted() -> None:
    times = matching_timestep(torch.tensor([0.0, 0.5, 1.0]), 5.0)
    torch.testing.assert_close(times, torch.tensor([0.0, 2500 / 3, 1000.0]))
    assert float(matching_timestep(torch.tensor(1.0 + 1e-6), 5.0)) <= 1000
