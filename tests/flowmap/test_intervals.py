"""Intervals: shares exact over a step's ranks and passes, or over steps; r never above t; given frames left alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyflow.flowmap.intervals import IntervalShares, draw_intervals, keep_first_frame
from anyflow.flowmap.schedule import shift_sigma


def uniforms(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))


@given(
    world_size=st.integers(1, 16),
    per_rank=st.integers(1, 8),
    diffusion_share=st.floats(0, 1),
    remainder=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_shares_hold_globally_for_any_number_of_ranks(
    world_size: int, per_rank: int, diffusion_share: float, remainder: float, seed: int
) -> None:
    """What the ranks hold together has exactly the rounded shares, and no sample is held twice."""
    count = world_size * per_rank
    consistency_share = remainder * (1 - diffusion_share)
    whole = draw_intervals(uniforms(count, seed), IntervalShares(diffusion_share, consistency_share))
    parts = [whole.of(range(rank, count, world_size)) for rank in range(world_size)]
    assert {len(part.timestep) for part in parts} == {per_rank}
    diffusion = torch.cat([part.is_diffusion for part in parts])
    timestep = torch.cat([part.timestep for part in parts])
    r_timestep = torch.cat([part.r_timestep for part in parts])
    assert torch.equal(timestep.sort().values, whole.timestep.sort().values)

    num_diffusion = round(diffusion_share * count)
    num_consistency = min(round(consistency_share * count), count - num_diffusion)
    assert int(diffusion.sum()) == num_diffusion
    assert int((r_timestep[~diffusion] == 0).sum()) == num_consistency
    assert torch.equal(timestep[diffusion], r_timestep[diffusion])
    assert (r_timestep <= timestep).all() and (timestep <= 1000).all() and (r_timestep >= 0).all()


@given(world_size=st.integers(1, 8), per_rank=st.integers(1, 8), seed=st.integers(0, 99))
def test_ranks_share_the_work_evenly(world_size: int, per_rank: int, seed: int) -> None:
    """No rank has two diffusion samples more than another: they cost less, and the slowest rank sets the pace."""
    whole = draw_intervals(uniforms(world_size * per_rank, seed))
    size = world_size * per_rank
    counts = [whole.of(range(rank, size, world_size)).num_diffusion for rank in range(world_size)]
    assert max(counts) - min(counts) <= 1


@given(
    diffusion=st.floats(0, 1),
    remainder=st.floats(0, 1),
    samples=st.integers(1, 40),
    step=st.integers(0, 10**6),
)
def test_counts_of_a_step_are_its_shares_rounded_up_or_down(
    diffusion: float, remainder: float, samples: int, step: int
) -> None:
    shares = IntervalShares(diffusion, remainder * (1 - diffusion))
    counts = shares.counts(samples, step)
    kinds = (*counts, samples - sum(counts))
    for count, share in zip(
        kinds, (shares.diffusion_share, shares.consistency_share, 1 - diffusion - shares.consistency_share), strict=True
    ):
        assert count >= 0 and abs(count - share * samples) < 1 + 1e-6
    if shares.are_whole(samples):
        assert counts == (round(shares.diffusion_share * samples), round(shares.consistency_share * samples))


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("shares", [IntervalShares(), IntervalShares(0.75, 0.125), IntervalShares(0.5, 0.0)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_shares_that_a_step_cannot_hold_hold_over_steps(samples: int, shares: IntervalShares, stride: int) -> None:
    """Rounded alike at each step, a step of one clip would never have r = t, or one of two never r = 0. The student of
    an on-policy run has every second update, or every third.
    """
    steps = range(1, 1 + 64 * stride, stride)
    totals = torch.tensor([shares.counts(samples, step) for step in steps]).sum(dim=0) / (64 * samples)
    assert abs(totals[0] - shares.diffusion_share) < 0.03 and abs(totals[1] - shares.consistency_share) < 0.03


def test_times_are_the_shifted_uniforms() -> None:
    """0.9 and 0.2 at shift 5: t = 1000 * 4.5 / 4.6, r = 1000 * 1 / 1.8."""
    drawn = draw_intervals(torch.tensor([[0.2, 0.9]] * 4), IntervalShares(0.5, 0.25), shift=5.0)
    torch.testing.assert_close(drawn.timestep, torch.full((4,), 4500 / 4.6))
    torch.testing.assert_close(drawn.r_timestep, torch.tensor([4500 / 4.6, 4500 / 4.6, 0, 1000 / 1.8]))
    assert drawn.is_diffusion.tolist() == [True, True, False, False]


def test_the_released_rounding_is_pythons() -> None:
    """Halves go to the even number: of one sample none is diffusion, of three two are."""
    assert [int(draw_intervals(uniforms(count, 0)).is_diffusion.sum()) for count in (1, 2, 3, 5)] == [0, 1, 2, 2]


def test_times_are_float32_or_better() -> None:
    assert draw_intervals(uniforms(4, 0).bfloat16()).timestep.dtype == torch.float32
    draws = uniforms(4, 0).double()
    assert torch.equal(
        draw_intervals(draws, IntervalShares(0, 0)).timestep, 1000 * shift_sigma(draws.max(dim=1).values, 5.0)
    )


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[N, 2\]"):
        draw_intervals(torch.rand(4))
    with pytest.raises(ValueError, match="nor exceed 1 together"):
        IntervalShares(0.7, 0.5)


def test_given_first_frames_have_no_time_and_no_loss() -> None:
    drawn = draw_intervals(uniforms(3, 0), IntervalShares(0, 0))
    chosen = torch.tensor([True, False, True])
    t, r, frames = keep_first_frame(drawn.timestep, drawn.r_timestep, 4, chosen)
    assert t.shape == r.shape == frames.shape == (3, 4)
    assert (
        torch.equal(t[:, 0] == 0, chosen) and torch.equal(r[:, 0] == 0, chosen) and torch.equal(~frames[:, 0], chosen)
    )
    assert torch.equal(t[:, 1:], drawn.timestep[:, None].expand(-1, 3)) and frames[:, 1:].all()
