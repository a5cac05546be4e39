"""Laws of the schedule: monotone, anchored, invertible, never below float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyflow.flowmap.schedule import (
    inference_timesteps,
    interpolate,
    logit_normal_timestep,
    shift_sigma,
    step,
    train_weight,
    weight_table,
)

SHIFTS = st.floats(0.2, 20)


@given(shift=SHIFTS)
def test_shift_keeps_the_ends_and_the_order(shift: float) -> None:
    sigma = shift_sigma(torch.linspace(0, 1, 101, dtype=torch.float64), shift)
    assert sigma[0] == 0 and sigma[-1] == pytest.approx(1)
    assert (sigma.diff() > 0).all()


@given(first=SHIFTS, second=SHIFTS)
def test_shifts_multiply(first: float, second: float) -> None:
    """Shifting twice is shifting once by the product; so 1 changes nothing and 1/s undoes s."""
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, first), second), shift_sigma(sigma, first * second))


@given(num_steps=st.integers(1, 200), shift=SHIFTS)
def test_inference_timesteps_fall_from_noise_to_data(num_steps: int, shift: float) -> None:
    timesteps = inference_timesteps(num_steps, shift)
    assert timesteps.dtype == torch.float64 and len(timesteps) == num_steps + 1
    assert timesteps[0] == pytest.approx(1000) and timesteps[-1] == 0
    assert (timesteps.diff() < 0).all()


def test_twice_the_steps_keep_every_time() -> None:
    assert torch.allclose(inference_timesteps(16, 5.0)[::2], inference_timesteps(8, 5.0))


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps is 0"):
        inference_timesteps(0, 5.0)


@pytest.mark.parametrize("shape", [(4,), (4, 3)], ids=["per sample", "per frame"])
def test_path_and_step_are_inverse(shape: tuple[int, ...]) -> None:
    """Along the straight path with its own velocity the step lands on the path, whatever the times."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 2, 5, 5, generator=generator, dtype=torch.float64)
    t, r = 1000 * torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    landed = step(interpolate(clean, noise, t), noise - clean, t, r)
    torch.testing.assert_close(landed, interpolate(clean, noise, r))


def test_path_ends_at_data_and_noise() -> None:
    clean, noise = torch.randn(2, 2, 3, 4)
    assert torch.equal(interpolate(clean, noise, torch.zeros(2)), clean)
    assert torch.equal(interpolate(clean, noise, torch.full((2,), 1000.0)), noise)


def test_nothing_is_below_float32() -> None:
    """bfloat16 latents and velocities are lifted; float64 is kept."""
    clean, noise = torch.randn(2, 2, 3, 4, dtype=torch.bfloat16)
    t = torch.tensor([400, 800])
    assert interpolate(clean, noise, t).dtype == torch.float32
    assert step(clean, noise, t, t - 100).dtype == torch.float32
    assert step(clean.double(), noise, t, t - 100).dtype == torch.float64
    assert logit_normal_timestep(torch.randn(4, dtype=torch.bfloat16), 5.0).dtype == torch.float32


def test_logit_normal_times_are_monotone_in_the_draw() -> None:
    timesteps = logit_normal_timestep(torch.linspace(-4, 4, 50), 5.0)
    assert (timesteps.diff() > 0).all() and timesteps[0] > 0 and timesteps[-1] < 1000
    assert logit_normal_timestep(torch.zeros(1), 1.0).item() == pytest.approx(500)


@pytest.mark.parametrize("kind", ["beta08", "gaussian"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_weight_tables_sum_to_1000_and_have_one_hump(kind: str, shift: float) -> None:
    timesteps, weights = weight_table(kind, shift)  # type: ignore[arg-type]
    assert len(timesteps) == len(weights) == 1001
    assert weights.sum().item() == pytest.approx(1000)
    assert weights.min() >= 0
    peak = {"beta08": 2000 / 3, "gaussian": 500}[kind]
    assert abs(timesteps[weights.argmax()].item() - peak) < 2
    top = int(weights.argmax())
    assert (weights[: top + 1].diff() > 0).all() and (weights[top:].diff() < 0).all()


def test_weight_is_the_nearest_entry() -> None:
    timesteps, weights = weight_table("beta08", 5.0)
    middle = (timesteps[10] + timesteps[11]) / 2
    query = torch.stack([timesteps[10], middle + 1e-6, middle - 1e-6, timesteps[11]])
    assert torch.equal(train_weight(query, "beta08", 5.0), weights[[10, 10, 11, 11]])
    assert train_weight(query[None].expand(3, -1)).shape == (3, 4)
    assert torch.equal(train_weight(query, "uniform"), torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="choose one of beta08, gaussian, uniform"):
        train_weight(query, "cosine")  # type: ignore[arg-type]
