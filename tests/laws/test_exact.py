"""The exact maps themselves: what every flow map must obey, before they judge the objective."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.flowmap.sampling import sample
from anyflow.flowmap.schedule import step

from .exact import EXACT, GAUSSIAN, GUIDED, Mixture, draw, solved

TIMES = st.floats(0, 1000)


@pytest.mark.parametrize("name", EXACT)
def test_velocity_is_the_mean_velocity_of_no_interval(name: str) -> None:
    """u(z, t, t) is the velocity, and u(z, t, r) nears it as r nears t."""
    flow = EXACT[name]
    z, t, _ = draw(flow, 12)
    instant = flow.velocity(z, t / 1000)
    torch.testing.assert_close(flow.mean_velocity(z, t, t), instant)
    torch.testing.assert_close(flow.mean_velocity(z, t, t - 1e-3), instant, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_velocity_is_what_the_data_say(name: str) -> None:
    """A finite jump along u solves the flow's equation: d z_r / d sigma_r is the velocity at z_r."""
    flow = EXACT[name]
    z, t, r = draw(flow, 12)
    z, t, r = z[2::3], t[2::3], r[2::3]

    def land(r: torch.Tensor) -> torch.Tensor:
        return step(z, flow.mean_velocity(z, t, r), t, r)

    slope = (land(r + 0.01) - land(r - 0.01)) / (0.02 / 1000)
    torch.testing.assert_close(slope, flow.velocity(land(r), r / 1000), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=10, deadline=None)
@given(times=st.tuples(TIMES, TIMES, TIMES))
def test_composition(name: str, times: tuple[float, float, float]) -> None:
    """z_t -> z_s -> z_r lands where z_t -> z_r does."""
    flow = EXACT[name]
    z = torch.tensor([[1.0, -1.5], [-0.5, 0.2]], dtype=torch.float64)
    t, s, r = (torch.full((2,), time, dtype=torch.float64) for time in sorted(times, reverse=True))
    middle = step(z, flow.mean_velocity(z, t, s), t, s)
    twice = step(middle, flow.mean_velocity(middle, s, r), s, r)
    torch.testing.assert_close(twice, step(z, flow.mean_velocity(z, t, r), t, r), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_any_number_of_steps_lands_in_the_same_place(name: str, shift: float) -> None:
    """The sampler on the exact map: 1, 2, 3 and 8 steps agree."""
    flow = EXACT[name]
    noise = draw(flow, 6)[0]

    def velocity(z: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return flow.mean_velocity(z, t.double(), r.double())

    once = sample(velocity, noise, 1, shift)
    for num_steps in (2, 3, 8):
        # Times reach the velocity in float32, hence the tolerance.
        torch.testing.assert_close(sample(velocity, noise, num_steps, shift), once, rtol=1e-4, atol=1e-4)


def test_one_step_turns_noise_into_the_data_distribution() -> None:
    """Standard normal noise lands on N(mean, spread^2): the affine map says so exactly."""
    noise = torch.randn(20000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = sample(lambda z, t, r: GAUSSIAN.mean_velocity(z, t.double(), r.double()), noise, 1, 5.0)
    torch.testing.assert_close(clean, GAUSSIAN.mean + GAUSSIAN.spread * noise)


def test_a_mixture_of_one_is_the_gaussian() -> None:
    """Two ways to the same map: the closed form and the solver."""
    alone = Mixture(GAUSSIAN.mean[None], GAUSSIAN.spread)
    z, t, r = draw(GAUSSIAN, 12)
    torch.testing.assert_close(alone.mean_velocity(z, t, r), GAUSSIAN.mean_velocity(z, t, r), rtol=1e-6, atol=1e-6)


def test_the_guided_map_is_the_guided_flow() -> None:
    """The closed form against the solver on the guided velocity."""
    z, t, r = draw(GAUSSIAN, 12)
    numeric = solved(GUIDED.velocity, z, t, r, num_steps=200)
    torch.testing.assert_close(GUIDED.mean_velocity(z, t, r), numeric, rtol=1e-6, atol=1e-6)
