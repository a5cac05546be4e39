"""The plain sampler against the golden case."""

from __future__ import annotations

import torch

from anyflow.flowmap.sampling import sample

from .reference import GoldenVelocity, load_case, relative_error


def test_four_steps() -> None:
    case, velocity = load_case("bi_rollout"), GoldenVelocity()
    noise, expected = case["in/init_noise"], case["out/sampler_full/4"]
    rows = torch.arange(len(noise))
    clean = sample(lambda z, t, r: velocity(z, t, r, rows), noise, num_steps=4, shift=5.0)
    assert clean.dtype == torch.float32
    assert relative_error(clean, expected) < 1e-4
    assert velocity.calls == [2, 2, 2, 2]
