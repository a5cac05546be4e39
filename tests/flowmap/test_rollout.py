"""Backward simulation: the plan of jumps, and gradients through all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.exact import GAUSSIAN
from torch import Tensor

from anyflow.flowmap.rollout import DEFAULT_BUDGETS, RELEASED_BUDGETS, BackwardSimulation, draw_simulation
from anyflow.flowmap.sampling import follow, sample
from anyflow.flowmap.schedule import inference_timesteps, step


@settings(deadline=None)
@given(num_steps=st.integers(1, 60), share=st.floats(0, 0.999), shift=st.floats(0.5, 10))
def test_at_most_three_jumps_span_the_path_and_hold_the_drawn_step(num_steps: int, share: float, shift: float) -> None:
    index = int(share * num_steps)
    jumps = BackwardSimulation(num_steps, index, shift).jumps
    schedule = inference_timesteps(num_steps, shift).tolist()
    assert 1 <= len(jumps) <= 3
    assert jumps[0][0] == 1000 and jumps[-1][1] == 0
    assert all(first[1] == second[0] for first, second in pairwise(jumps))
    assert jumps[min(index, 1)] == (schedule[index], schedule[index + 1]), "one jump at most before the drawn step"
    assert all(start > end for start, end in jumps)


@settings(deadline=None)
@given(first=st.floats(0, 0.9999999), second=st.floats(0, 0.9999999))
def test_a_draw_is_in_the_list(first: float, second: float) -> None:
    plan = draw_simulation(torch.tensor([first, second], dtype=torch.float64), (1, 4, 50))
    assert plan.num_steps in (1, 4, 50) and 0 <= plan.index < plan.num_steps


def test_every_budget_and_step_is_drawn_equally_often() -> None:
    grid = (torch.arange(12) + 0.5) / 12
    drawn = [draw_simulation(torch.stack([a, b]), (1, 2, 4)) for a in grid for b in grid]
    counts = {(plan.num_steps, plan.index): 0 for plan in drawn}
    for plan in drawn:
        counts[plan.num_steps, plan.index] += 1
    assert counts == {(1, 0): 48, (2, 0): 24, (2, 1): 24, **{(4, index): 12 for index in range(4)}}


def test_one_step_is_among_the_budgets_by_default() -> None:
    """The released list has no 1, and quality at one step falls with it."""
    assert RELEASED_BUDGETS == (2, 4, 8, 16, 50)
    assert list(DEFAULT_BUDGETS) == [1, *RELEASED_BUDGETS]


def test_every_step_of_every_budget_can_be_drawn() -> None:
    """At the middle of each one's share, and in float32 just below 1."""
    count = len(DEFAULT_BUDGETS)
    for place, num_steps in enumerate(DEFAULT_BUDGETS):
        for index in range(num_steps):
            uniforms = torch.tensor([(place + 0.5) / count, (index + 0.5) / num_steps])
            assert draw_simulation(uniforms, shift=3.0) == BackwardSimulation(num_steps, index, 3.0)
    last = draw_simulation(torch.full((2,), 1 - 2**-24))
    assert last == BackwardSimulation(DEFAULT_BUDGETS[-1], DEFAULT_BUDGETS[-1] - 1)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_step_that_is_not_there_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"index is {index}; a sampler of 4 steps has 0..3"):
        BackwardSimulation(4, index)


@pytest.mark.parametrize("budgets", [(), (0, 4)])
def test_impossible_budgets_are_refused(budgets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="budgets"):
        draw_simulation(torch.tensor([0.5, 0.5]), budgets)


@settings(deadline=None)
@given(num_steps=st.integers(1, 50), share=st.floats(0, 0.999), shift=st.floats(0.5, 10))
def test_on_the_exact_map_every_simulation_ends_where_one_jump_does(num_steps: int, share: float, shift: float) -> None:
    """Composition: whichever step is drawn, the exact map of a Gaussian gives the exact clean point."""
    noise = torch.tensor([[1.0, -1.5], [-0.5, 0.2]], dtype=torch.float64)
    clean = BackwardSimulation(num_steps, int(share * num_steps), shift).run(
        lambda z, t, r: GAUSSIAN.mean_velocity(z, t.double(), r.double()), noise
    )
    # Times reach the velocity in float32, hence the tolerance.
    torch.testing.assert_close(clean, GAUSSIAN.mean + GAUSSIAN.spread * noise, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(num_steps=st.integers(1, 50), share=st.floats(0, 0.999))
def test_the_path_is_measured_in_float64(num_steps: int, share: float) -> None:
    """A constant velocity moves every sample by exactly itself: float32 times would leave 1e-8 and more."""
    noise, velocity = torch.randn(2, 3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    clean = BackwardSimulation(num_steps, int(share * num_steps), 3.0).run(lambda z, t, r: velocity.expand(2, 3), noise)
    torch.testing.assert_close(clean, noise - velocity, rtol=0, atol=1e-14)


def field(weight: Tensor) -> object:
    """A velocity that depends on everything, and on a weight."""
    return lambda z, t, r: weight * z + (t - 0.5 * r)[:, None] / 1000


@pytest.mark.parametrize("num_steps", [1, 2])
def test_short_samplers_are_simulated_whole(num_steps: int) -> None:
    noise, velocity = torch.randn(3, 2, dtype=torch.float64), field(torch.tensor(0.7, dtype=torch.float64))
    whole = sample(velocity, noise, num_steps, 5.0)  # type: ignore[arg-type]
    for index in range(num_steps):
        torch.testing.assert_close(BackwardSimulation(num_steps, index, 5.0).run(velocity, noise), whole)  # type: ignore[arg-type]


def test_of_three_steps_only_the_middle_one_leaves_nothing_out() -> None:
    """Longer samplers are not simulated whole: the simulation costs three calls, not N."""
    noise, velocity = torch.randn(3, 2, dtype=torch.float64), field(torch.tensor(0.7, dtype=torch.float64))
    whole = sample(velocity, noise, 3, 5.0)  # type: ignore[arg-type]
    gaps = [(BackwardSimulation(3, index).run(velocity, noise) - whole).abs().max() for index in range(3)]  # type: ignore[arg-type]
    assert gaps[1] < 1e-6 < 1e-3 < min(gaps[0], gaps[2])


def by_hand(jumps: list[tuple[float, float]], noise: Tensor, weights: Tensor, cut: int | None = None) -> Tensor:
    """The jumps written out, each with its own weight; what goes into jump ``cut`` is detached."""
    z = noise
    for number, (start, end) in enumerate(jumps):
        z = z.detach() if number == cut else z
        t, r = (torch.full((3,), time, dtype=torch.float64).float() for time in (start, end))
        z = step(z, weights[number] * z + (t - 0.5 * r)[:, None] / 1000, torch.tensor(start), torch.tensor(end))
    return z


@pytest.mark.parametrize(("num_steps", "index"), [(1, 0), (2, 1), (8, 0), (8, 3), (8, 7)])
def test_the_gradient_passes_through_every_jump(num_steps: int, index: int) -> None:
    """Each jump's own weight gets the gradient of the composition by hand; a cut before any jump would show."""
    noise = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = BackwardSimulation(num_steps, index, 5.0)
    weights = torch.tensor([0.7, 1.1, 0.4], dtype=torch.float64)[: len(plan.jumps)].requires_grad_()
    own_weight = iter(weights)
    made = plan.run(lambda z, t, r: next(own_weight) * z + (t - 0.5 * r)[:, None] / 1000, noise)

    def gradient(made: Tensor) -> Tensor:
        return torch.autograd.grad(made.square().sum(), weights)[0]

    simulated = gradient(made)
    assert simulated.all()
    torch.testing.assert_close(simulated, gradient(by_hand(plan.jumps, noise, weights)), rtol=1e-5, atol=0)
    for cut in range(1, len(plan.jumps)):
        short = torch.autograd.grad(
            by_hand(plan.jumps, noise, weights, cut).square().sum(), weights, materialize_grads=True
        )[0]
        assert not short[:cut].any() and simulated[:cut].all()


def test_given_frames_come_back_as_given() -> None:
    noise, first = torch.randn(2, 3, 4), torch.randn(2, 1, 4)
    times: list[Tensor] = []

    def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        times.extend((t, r))
        return z

    plan = BackwardSimulation(4, 1)
    made = plan.run(velocity, noise, first)
    assert torch.equal(made[:, :1], first)
    assert torch.equal(made, follow(velocity, noise, plan.jumps, first_frames=first))
    assert all((time[:, 0] == 0).all() for time in times)
    assert all((time[:, 1:] == time[:1, 1:2]).all() for time in times) and times[0][0, 1] == 1000
