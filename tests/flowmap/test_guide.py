"""Guidance in closed form: where both answers are Gaussians' of one spread, so is the guided one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from anyflow.flowmap.sampling import guide, sample, take_velocity
from anyflow.flowmap.schedule import inference_timesteps

SPREAD, SHIFT = 0.7, 3.0
PROMPT, NEGATIVE = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5])
NOISE = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def velocity(mean: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """E[noise - clean | z] of data N(mean, SPREAD^2 I): affine in the mean."""
    sigma = (t.double() / 1000)[:, None]
    variance = ((1 - sigma) * SPREAD).square() + sigma.square()
    return -mean + (sigma - (1 - sigma) * SPREAD**2) / variance * (z - (1 - sigma) * mean)


@pytest.mark.parametrize("scale", [1.0, 1.5, 5.0])
@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_guided_euler_samples_lead_away_from_the_negative_prompt(scale: float, num_steps: int) -> None:
    """Catches a wrong sign, swapped answers and an extra scale of one more: each has another mean."""
    mean = NEGATIVE + scale * (PROMPT - NEGATIVE)

    def guided(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return guide(velocity(PROMPT, z, t), velocity(NEGATIVE, z, t), scale)

    found = sample(guided, NOISE, num_steps, SHIFT, take=take_velocity)
    expected = NOISE
    times = inference_timesteps(num_steps, SHIFT)
    for start, end in pairwise(times):
        expected = expected - (start - end) / 1000 * velocity(mean, expected, start.float().expand(len(NOISE)))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_the_answers_meet_in_float32() -> None:
    """Catches a combination in the answers' own precision: at scale 7 bfloat16 loses two digits."""
    prompt, negative = torch.tensor([1.0]).bfloat16(), torch.tensor([0.99]).bfloat16()
    found = guide(prompt, negative, 7.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(float(negative) + 7 * (float(prompt) - float(negative)), abs=1e-6)
