"""Backward simulation: the plan of jumps, and gradients through all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anyflow.flowmap import BackwardSimulation, draw_simulation, follow, inference_timesteps, sample, step


@given(num_steps=st.integers(1, 60), share=st.floats(0, 0.999), shift=st.floats(0.5, 10))
def test_at_most_three_jumps_span_the_path_and_hold_the_drawn_step(num_steps: int, share: float, shift: float) -> None:
    index = int(share * num_steps)
    jumps = BackwardSimulation(num_steps, index, shift).jumps
    schedule = inference_timesteps(num_steps, shift).tolist()
    assert 1 <= len(jumps) <= 3
    assert jumps[0][0] == 1000 and jumps[-1][1] == 0
    assert all(first[1] == second[0] for first, second in pairwise(jumps))
    assert (schedule[index], schedule[index + 1]) in jumps
    assert all(start > end for start, end in jumps)


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


@pytest.mark.parametrize("budgets", [(), (0, 4)])
def test_impossible_budgets_are_refused(budgets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="budgets"):
        draw_simulation(torch.tensor([0.5, 0.5]), budgets)
    with pytest.raises(ValueError, match="index"):
        BackwardSimulation(4, 4)


def field(weight: Tensor) -> object:
    """A velocity that depends on everything, and on a weight."""
    return lambda z, t, r: weight * z + (t - 0.5 * r)[:, None] / 1000


@pytest.mark.parametrize("num_steps", [1, 2])
def test_short_samplers_are_simulated_whole(num_steps: int) -> None:
    noise, velocity = torch.randn(3, 2, dtype=torch.float64), field(torch.tensor(0.7, dtype=torch.float64))
    whole = sample(velocity, noise, num_steps, 5.0)  # type: ignore[arg-type]
    for index in range(num_steps):
        torch.testing.assert_close(BackwardSimulation(num_steps, index, 5.0).run(velocity, noise), whole)  # type: ignore[arg-type]


def test_the_gradient_passes_through_every_jump() -> None:
    noise = torch.randn(3, 2, dtype=torch.float64)
    weight, by_hand = (torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    plan = BackwardSimulation(8, 3, 5.0)
    plan.run(field(weight), noise).square().sum().backward()  # type: ignore[arg-type]
    z = noise
    for start, end in plan.jumps:
        t, r = (torch.full((3,), time, dtype=torch.float64).float() for time in (start, end))
        z = step(z, by_hand * z + (t - 0.5 * r)[:, None] / 1000, torch.tensor(start), torch.tensor(end))
    z.square().sum().backward()
    assert weight.grad is not None and by_hand.grad is not None
    torch.testing.assert_close(weight.grad, by_hand.grad, rtol=1e-5, atol=0)


def test_given_frames_come_back_as_given() -> None:
    noise, first = torch.randn(2, 3, 4), torch.randn(2, 1, 4)
    times: list[Tensor] = []

    def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        times.extend((t, r))
        return z

    made = follow(velocity, noise, BackwardSimulation(4, 1).jumps, first_frames=first)
    assert torch.equal(made[:, :1], first)
    assert all((time[:, 0] == 0).all() for time in times)
