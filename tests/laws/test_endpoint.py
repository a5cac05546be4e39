"""Endpoint networks on a Gaussian, where the end of every path is known: their loss, their sampler, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow.flowmap.endpoint import Renoise, consistency_loss, guided_velocity, normalised
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.flowmap.rollout import RenoisingSimulation
from anyflow.flowmap.sampling import follow, sample, steps_of, take_velocity
from laws.exact import GAUSSIAN, GUIDED, draw

SHIFT = 3.0
EXACT = FlowMapObjective(guidance_scale=1.0, derivative="jvp", weight="uniform", shift=SHIFT)


def ends(z: Tensor, t: Tensor, bias: float = 0.0, flow: Any = GAUSSIAN) -> Tensor:
    """The one-time velocity whose endpoint is the end of the flow's path from z, plus a bias."""
    sigma = (t / 1000)[:, None]
    return flow.mean_velocity(z, t, torch.zeros_like(t)) - bias / sigma


def loss_of(bias: float = 0.0, objective: FlowMapObjective = EXACT, flow: Any = GAUSSIAN) -> Tensor:
    """The consistency losses of an endpoint network with a bias that grows with time, taught by the flow's velocity."""
    points, t, _ = draw(GAUSSIAN, 60)
    clean, noise = points.flip(0), points
    rows = torch.arange(60)

    def student(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        assert torch.equal(t, r), "an endpoint network knows one time"
        return ends(z, t, flow=flow) - bias * (t / 1000)[:, None]

    def teacher(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        assert torch.equal(t, r)
        if flow is GAUSSIAN:
            return flow.velocity(z, t / 1000)
        is_negative = (rows >= 60)[:, None]
        return torch.where(is_negative, flow.negative.velocity(z, t / 1000), flow.text.velocity(z, t / 1000))

    return consistency_loss(objective, student, teacher, clean, noise, t, rows)


def test_the_exact_endpoint_has_no_loss_under_the_exact_teacher() -> None:
    assert loss_of().max() < 1e-10
    central = FlowMapObjective(guidance_scale=1.0, delta=1.0, weight="uniform", shift=SHIFT)
    assert loss_of(objective=central).max() < 1e-5


def test_guidance_is_the_teachers() -> None:
    """The endpoint of the guided flow has no loss under a guided teacher, and has one under an unguided teacher."""
    guided = FlowMapObjective(guidance_scale=GUIDED.scale, derivative="jvp", weight="uniform", shift=SHIFT)
    assert loss_of(objective=guided, flow=GUIDED).max() < 1e-9
    assert loss_of(flow=GUIDED).mean() > 1e-2


def test_a_wrong_endpoint_has_a_loss_that_grows_with_the_fault() -> None:
    small, large = loss_of(0.1), loss_of(0.2)
    assert (small > 1e-4).all()
    torch.testing.assert_close(large, 4 * small)


def test_a_dropped_text_is_not_guided() -> None:
    z, t = torch.randn(4, 2), torch.full((4,), 500.0)
    rows = torch.tensor([0, 5, 2, 7])

    def teacher(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        return torch.where((rows >= 4)[:, None], 0.25, 1.0).expand_as(z)

    guided = guided_velocity(teacher, z, t, rows, 3.0)
    torch.testing.assert_close(guided[:, 0], torch.tensor([2.5, 0.25, 2.5, 0.25]))


def test_normalised_gradients_have_the_size_of_the_errors_direction() -> None:
    """Squared errors of 1 and 10,000 pull about equally; a vanishing one vanishes."""
    error = torch.tensor([1.0, 100.0, 1e-4], requires_grad=True)
    normalised(error.square()).sum().backward()
    assert error.grad is not None
    torch.testing.assert_close(error.grad, 2 * error.detach() / (error.detach() + 0.1))


# The sampler -------------------------------------------------------------------------------------------------------


def renoised(num_steps: int, bias: float = 0.0, count: int = 20_000, flow: Any = GAUSSIAN) -> Tensor:
    generator = torch.Generator().manual_seed(num_steps)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    noise = draw(torch.empty(count, 2))
    return sample(lambda z, t, r: ends(z, t.double(), bias, flow), noise, num_steps, SHIFT, take=Renoise(draw))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 16])
def test_with_the_exact_endpoint_the_distribution_is_right_at_any_step_count(num_steps: int) -> None:
    samples = renoised(num_steps)
    torch.testing.assert_close(samples.mean(0), GAUSSIAN.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(samples.std(0), torch.full((2,), GAUSSIAN.spread).double(), atol=0.01, rtol=0)


def test_the_errors_of_an_imperfect_endpoint_add_up() -> None:
    """A bias in every jump: one step has it once, and each further step adds to it (flow maps share it out)."""
    gaps = [float((renoised(count, bias=0.05).mean(0) - GAUSSIAN.mean).mean()) for count in (1, 2, 4, 8, 16, 32)]
    assert gaps[0] == pytest.approx(0.05, abs=0.01)
    assert gaps[-1] > gaps[-2] > gaps[2] > gaps[0] and gaps[-1] > 3 * gaps[0]

    def flow_map(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The same fault in the jump to data, in proportion to the length of any other."""
        return GAUSSIAN.mean_velocity(z, t.double(), r.double()) - 0.05

    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = [float((sample(flow_map, noise, count, SHIFT).mean(0) - GAUSSIAN.mean).mean()) for count in (1, 32)]
    assert shared[1] < 1.2 * shared[0]


def test_euler_steps_follow_the_instantaneous_velocity() -> None:
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        assert torch.equal(t, r)
        return GAUSSIAN.velocity(z, t.double() / 1000)

    clean = GAUSSIAN.mean + GAUSSIAN.spread * noise
    gaps = [
        (sample(network, noise, count, SHIFT, take=take_velocity) - clean).abs().mean().item() for count in (4, 16, 64)
    ]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]


def test_re_noising_keeps_given_frames_and_draws_once_a_jump_but_the_last() -> None:
    noise, given, drawn = torch.randn(2, 3, 4), torch.full((2, 1, 4), 7.0), []

    def draw(like: Tensor) -> Tensor:
        drawn.append(torch.randn(like.shape))
        return drawn[-1]

    made = sample(lambda z, t, r: torch.ones_like(z), noise, 3, SHIFT, first_frames=given, take=Renoise(draw))
    assert torch.equal(made[:, :1], given) and len(drawn) == 2
    sigma = steps_of(3, SHIFT)[2][0] / 1000
    before = made[:, 1:] + sigma  # z = x + sigma * u, u = 1
    first = steps_of(3, SHIFT)[1][0] / 1000
    one = noise[:, 1:] - 1
    two = (1 - first) * one + first * drawn[0][:, 1:] - first
    torch.testing.assert_close(before, (1 - sigma) * two + sigma * drawn[1][:, 1:])


@pytest.mark.parametrize("index", range(4))
def test_a_re_noising_rollout_ends_at_the_drawn_step_and_learns_from_it_alone(index: int) -> None:
    jumps, whole = RenoisingSimulation(4, index, SHIFT).jumps, steps_of(4, SHIFT)
    assert jumps == [*whole[:index], (whole[index][0], 0.0)]
    weights = torch.full((len(jumps),), 0.5, requires_grad=True)
    own = iter(weights)
    made = follow(lambda z, t, r: next(own) * z, torch.randn(3, 2), jumps, take=Renoise(torch.randn_like))
    made.square().sum().backward()
    assert weights.grad is not None
    assert not weights.grad[:-1].any() and weights.grad[-1] != 0
