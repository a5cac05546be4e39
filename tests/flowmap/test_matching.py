"""Distribution matching: which way samples are pulled, how strongly, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws.exact import Gaussian
from torch import Tensor

from anyflow.flowmap.matching import critic_loss, matching_gradient, matching_loss, matching_timestep
from anyflow.flowmap.objective import flow_matching_loss
from anyflow.flowmap.schedule import TIMESTEPS, interpolate, step

ROWS = torch.arange(4)


def gaussian(mean: float, calls: list[Tensor] | None = None) -> Callable[..., Tensor]:
    """The exact velocity of data N(mean, 1); a negative prompt (rows 4 to 7) has mean 0."""

    def velocity(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        if calls is not None:
            calls.append(rows)
        sigma = (t / TIMESTEPS)[:, None]
        centre = torch.where(rows >= 4, 0.0, mean)[:, None]
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


def exact(mean: list[float], spread: float) -> Callable[..., Tensor]:
    """The velocity of data N(mean, spread^2) in two dimensions; only ever asked where it stands, at r = t."""
    flow = Gaussian(torch.tensor(mean, dtype=torch.float64), spread)

    def velocity(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        assert torch.equal(t, r)
        return flow.velocity(z, t / TIMESTEPS)

    return velocity


def test_between_gaussians_the_pull_is_the_difference_of_their_means() -> None:
    """fake - real = (mean of samples - mean of data) sigma^2 / var(z): from data to samples, at every noise level."""
    generator = torch.Generator().manual_seed(3)
    samples_mean, data_mean = [1.5, -0.5], [-1.0, 0.25]
    samples, noise = (torch.randn(64, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    samples = torch.tensor(samples_mean) + 0.4 * samples
    timestep = torch.linspace(10, 990, 64, dtype=torch.float64)
    critic, teacher = exact(samples_mean, 0.4), exact(data_mean, 0.4)
    found = matching_gradient(critic, teacher, samples, noise, timestep, torch.arange(64), extra_guidance=0.0)
    sigma = (timestep / TIMESTEPS)[:, None]
    apart = torch.tensor(samples_mean) - torch.tensor(data_mean)
    torch.testing.assert_close(found.raw, apart * sigma**2 / ((1 - sigma) ** 2 * 0.4**2 + sigma**2))
    assert torch.equal(found.gradient.sign(), apart.sign().double().expand(64, 2))


def test_following_the_loss_brings_the_samples_to_the_data() -> None:
    """Gradient descent on the samples themselves, the critic kept exact: their mean becomes the data's."""
    generator = torch.Generator().manual_seed(4)
    samples = torch.tensor([1.5, -0.5]) + 0.4 * torch.randn(256, 2, generator=generator, dtype=torch.float64)
    data_mean, distances = torch.tensor([-1.0, 0.25]), []
    for _ in range(60):
        samples = samples.detach().requires_grad_()
        noise = torch.randn(256, 2, generator=generator, dtype=torch.float64)
        timestep = matching_timestep(torch.rand(256, generator=generator, dtype=torch.float64), 5.0)
        critic, teacher = exact(samples.detach().mean(dim=0).tolist(), 0.4), exact(data_mean.tolist(), 0.4)
        found = matching_gradient(critic, teacher, samples, noise, timestep, torch.arange(256), extra_guidance=0.0)
        (slope,) = torch.autograd.grad(matching_loss(samples, found.gradient).mean(), samples)
        samples = samples - 0.05 * samples.numel() * slope
        distances.append((samples.mean(dim=0) - data_mean).norm().item())
    assert distances[0] < 2.6 and distances[10] < distances[0] - 0.5 and distances[-1] < 0.1


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
    assert [rows.tolist() for rows in calls] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_released_guidance_is_a_usual_scale_of_four() -> None:
    samples, noise, timestep = question()
    by_default = matching_gradient(gaussian(0.0), gaussian(3.0), samples, noise, timestep, ROWS)
    at_three = matching_gradient(gaussian(0.0), gaussian(3.0), samples, noise, timestep, ROWS, extra_guidance=3.0)
    unguided = matching_gradient(gaussian(0.0), gaussian(3.0), samples, noise, timestep, ROWS, extra_guidance=0.0)
    assert torch.equal(by_default.gradient, at_three.gradient)
    torch.testing.assert_close(by_default.raw, 4 * unguided.raw, rtol=1e-4, atol=1e-5)


def test_each_sample_has_its_own_normaliser() -> None:
    """Another sample's distance does not matter: pulls are equally strong whatever the rest of the batch."""
    samples, noise, timestep = question()
    before = matching_gradient(gaussian(1.0), gaussian(3.0), samples, noise, timestep, ROWS)
    samples[0] += 100
    after = matching_gradient(gaussian(1.0), gaussian(3.0), samples, noise, timestep, ROWS)
    assert before.normaliser.shape == (4,) and after.normaliser[0] > 2 * before.normaliser[0]
    assert torch.equal(before.gradient[1:], after.gradient[1:])


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


@pytest.mark.parametrize("side", [0.0, 2.0])
def test_a_sample_where_the_teacher_wants_it_is_not_thrown_away(side: float) -> None:
    """Distance 0 divides by 0: plus or minus infinity becomes no pull, not the largest number there is."""
    samples, noise, timestep = torch.zeros(1, 6), torch.ones(1, 6), torch.tensor([500.0])
    found = matching_gradient(
        lambda z, t, r, rows: torch.full_like(z, side),
        lambda z, t, r, rows: torch.ones_like(z),
        samples,
        noise,
        timestep,
        ROWS[:1],
        extra_guidance=0.0,
    )
    assert not found.normaliser.any() and found.raw.all() and not found.gradient.any()


def test_given_frames_do_not_count_in_the_normaliser() -> None:
    """The mean is over the sampled frames alone, so one given frame does not make the pull stronger."""
    generator = torch.Generator().manual_seed(1)
    samples, noise = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    given = torch.tensor([[True, False, False], [False, False, False]])
    timestep = torch.full((2, 3), 500.0).masked_fill(given, 0.0)
    found = matching_gradient(
        lambda z, t, r, rows: z,
        lambda z, t, r, rows: 2 * z,
        samples,
        noise,
        timestep,
        ROWS[:2],
        extra_guidance=0.0,
        given_frames=given,
    )
    z = interpolate(samples, noise, timestep)
    distance = (samples - step(z, 2 * z, timestep, torch.zeros(2, 3))).abs()
    torch.testing.assert_close(found.normaliser, torch.stack([distance[0, 1:].mean(), distance[1].mean()]))
    torch.testing.assert_close(found.gradient, found.raw / found.normaliser[:, None, None])


@pytest.mark.parametrize("times_know", [True, False], ids=["time 0 there", "one time a sample"])
def test_given_frames_are_left_alone(times_know: bool) -> None:
    """By the mask, even where the times do not say so."""
    generator = torch.Generator().manual_seed(1)
    samples, noise = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    given = torch.tensor([[True, False, False]]).expand(2, 3)
    timestep = torch.full((2, 3), 500.0).masked_fill(given, 0.0) if times_know else torch.full((2,), 500.0)
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


def test_through_the_loss_only_the_samples_learn() -> None:
    """Neither critic nor teacher, though the loss is built from their answers."""
    samples, noise, timestep = question()
    samples.requires_grad_()
    critic, teacher = (torch.tensor(value, requires_grad=True) for value in (0.5, -0.5))
    found = matching_gradient(
        lambda z, t, r, rows: critic * z, lambda z, t, r, rows: teacher * z, samples, noise, timestep, ROWS
    )
    matching_loss(samples, found.gradient).mean().backward()
    assert critic.grad is None and teacher.grad is None
    torch.testing.assert_close(samples.grad, 2 * found.gradient / samples.numel(), rtol=1e-5, atol=1e-7)


def test_the_critic_learns_plain_flow_matching_of_the_sampled_frames() -> None:
    generator = torch.Generator().manual_seed(5)
    samples, noise = (torch.randn(4, 3, 5, generator=generator) for _ in range(2))
    sampled = torch.tensor([[False, True, True]]).expand(4, 3)
    timestep = torch.full((4, 3), 400.0) * sampled

    def velocity(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        assert torch.equal(t, r) and torch.equal(rows, ROWS)
        return 0.5 * z

    loss = critic_loss(velocity, samples, noise, timestep, ROWS, sampled)
    error = (0.5 * interpolate(samples, noise, timestep) - (noise - samples)).square()
    torch.testing.assert_close(loss, error[:, 1:].flatten(1).mean(dim=1).to(loss.dtype))
    assert torch.equal(loss, flow_matching_loss(velocity, samples, noise, timestep, ROWS, sampled))


def test_times_stay_in_range_and_are_shifted() -> None:
    times = matching_timestep(torch.tensor([0.0, 0.5, 1.0]), 5.0)
    torch.testing.assert_close(times, torch.tensor([0.0, 2500 / 3, 1000.0]))
    assert float(matching_timestep(torch.tensor(1.0 + 1e-6), 5.0)) <= 1000
    assert float(matching_timestep(torch.tensor(-1e-6), 5.0)) == 0
