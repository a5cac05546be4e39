"""The sampler: one call a step, the times of the schedule, given frames untouched."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from anyflow.flowmap.sampling import sample
from anyflow.flowmap.schedule import inference_timesteps

NOISE = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_straight_field_is_exact_in_any_number_of_steps(num_steps: int) -> None:
    clean = torch.full_like(NOISE, 0.3)
    torch.testing.assert_close(sample(lambda z, t, r: NOISE - clean, NOISE, num_steps, 5.0), clean)


def test_calls_follow_the_schedule() -> None:
    asked, seen = [], []

    def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        assert t.dtype == r.dtype == torch.float32 and t.shape == r.shape == (2,)
        assert not torch.is_grad_enabled()
        asked.append((t[0].item(), r[0].item()))
        return torch.zeros_like(z, dtype=torch.bfloat16)

    clean = sample(velocity, NOISE.bfloat16(), 4, 5.0, on_step=lambda done, latents: seen.append((done, latents.dtype)))
    schedule = inference_timesteps(4, 5.0).tolist()
    assert asked == [pytest.approx(pair) for pair in pairwise(schedule)]
    assert seen == [(done, torch.float32) for done in (1, 2, 3, 4)]
    assert torch.equal(clean, NOISE.bfloat16().float())


def test_given_frames_come_back_as_given() -> None:
    known = torch.full((2, 1, 4, 5, 5), 7.0)

    def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        assert t.shape == r.shape == (2, 3) and not t[:, 0].any() and not r[:, 0].any() and t[:, 1:].all()
        assert torch.equal(z[:, :1], known)
        return torch.ones_like(z)

    clean = sample(velocity, NOISE, 3, 5.0, first_frames=known)
    assert torch.equal(clean[:, :1], known)
    torch.testing.assert_close(clean[:, 1:], NOISE[:, 1:] - 1)
