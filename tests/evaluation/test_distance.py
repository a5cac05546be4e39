"""Distances: closed forms for shifts and scales, zero for equal sets, and growth with damage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import lane_change
from torch import Tensor

from anyflow.evaluation.distance import (
    FrameFeatures,
    frame_features,
    frechet,
    given_frame_psnr,
    kernel_distance,
    motion_energy,
    preview_error,
    sliced_wasserstein,
    spread_ratio,
    temporal_consistency,
)


def _points(count: int = 12, seed: int = 0, dimensions: tuple[int, ...] = (5, 4)) -> Tensor:
    return torch.randn(count, *dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_set_is_at_no_distance_from_itself_in_any_order() -> None:
    points = _points()
    assert sliced_wasserstein(points, points.flip(0)) == pytest.approx(0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(length=st.floats(0.01, 100), axis=st.integers(0, 19))
def test_a_shift_costs_its_length_times_the_mean_cosine(length: float, axis: int) -> None:
    """In D dimensions E|cos| = Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)); 4096 directions give it to 3 %."""
    points = _points()
    shifted = points.flatten(1).clone()
    shifted[:, axis] += length
    dimensions = shifted.shape[1]
    cosine = math.gamma(dimensions / 2) / (math.sqrt(math.pi) * math.gamma((dimensions + 1) / 2))
    found = sliced_wasserstein(points, shifted.reshape(points.shape), projections=4096)
    assert found == pytest.approx(length * cosine, rel=0.03)


def test_two_gaussians_of_different_width_are_apart_by_the_difference_of_their_mean_sizes() -> None:
    """W1 of N(0, 1) and N(0, 2^2) is (2 - 1) E|x| = sqrt(2 / pi) in one dimension, whatever the direction."""
    narrow, wide = _points(4000, 0, (1,)), 2 * _points(4000, 1, (1,))
    assert sliced_wasserstein(narrow, wide) == pytest.approx(math.sqrt(2 / math.pi), rel=0.06)


def test_the_sliced_distance_is_symmetric_fixed_by_its_seed_and_independent_of_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = _points(seed=1), _points(seed=2) + 1
    value = sliced_wasserstein(first, second)
    assert value == sliced_wasserstein(first, second) == pytest.approx(sliced_wasserstein(second, first))
    assert value != sliced_wasserstein(first, second, seed=1)
    monkeypatch.setattr("anyflow.evaluation.distance.DIMENSIONS_AT_ONCE", 7)
    assert sliced_wasserstein(first, second, projections=4096) == pytest.approx(value, rel=0.1)


def test_sets_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="equal size"):
        sliced_wasserstein(_points(4), _points(5))


def _clips(count: int, seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(
        np.stack([lane_change(random.uniform(-18, 18), begin=random.integers(5)) for _ in range(count)])
    )


def test_frame_features_see_colour_sharpness_and_motion() -> None:
    grey = torch.full((1, 2, 64, 96, 3), 100, dtype=torch.uint8)
    features = FrameFeatures()(grey).reshape(5, -1)
    assert features.dtype == torch.float64 and features.numel() == FrameFeatures.num_features
    assert torch.allclose(features[:3], torch.tensor(100 / 255, dtype=torch.float64)) and not features[3:].any()
    changed = grey.clone()
    changed[:, 1] += 51
    assert torch.allclose(FrameFeatures()(changed).reshape(5, -1)[4], torch.tensor(0.8, dtype=torch.float64))
    striped = grey.clone()
    striped[..., ::2, :] = 0
    assert (FrameFeatures()(striped).reshape(5, -1)[3] > 0.5).all()


def frame_frechet(first: Tensor, second: Tensor) -> float:
    return frechet(frame_features(first), frame_features(second))


def test_the_frechet_distance_of_a_brightness_shift_is_its_square_length() -> None:
    """Adding 51 grey levels (0.2) to all frames shifts the 72 colour features by 0.2 and nothing else: 72 * 0.04."""
    clips = _clips(4)
    clips = (clips.float() * 0.5).byte()
    assert frame_frechet(clips, clips + 51) == pytest.approx(72 * 0.04, rel=1e-3)
    assert frame_frechet(clips, clips) == pytest.approx(0, abs=1e-4)


def test_the_frechet_distance_grows_with_blur_noise_and_frozen_time() -> None:
    real, other = _clips(6, 0), _clips(6, 1)
    floor = frame_frechet(real, other)
    frozen = other[:, :1].expand_as(other)
    noise = torch.randint(-40, 40, other.shape, generator=torch.Generator().manual_seed(0))
    noisy = (other.int() + noise).clamp(0, 255).byte()
    small = torch.nn.functional.avg_pool3d(other.permute(0, 4, 1, 2, 3).float(), (1, 9, 9), 1, (0, 4, 4))
    blurred = small.permute(0, 2, 3, 4, 1).byte()
    for damaged in (frozen, noisy, blurred):
        assert frame_frechet(real, damaged) > floor


def test_the_frechet_distance_is_found_where_eigenvalues_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By symmetric matrices it is the same number, of ordinary clips and of still ones."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    def fails(self: FrechetInceptionDistance) -> Tensor:
        raise torch.linalg.LinAlgError("failed to converge")

    real, other = _clips(6, 0), _clips(6, 1)
    expected, still = frame_frechet(real, other), torch.full_like(other, 77)
    monkeypatch.setattr(FrechetInceptionDistance, "compute", fails)
    assert frame_frechet(real, other) == pytest.approx(expected, rel=1e-3)
    assert frame_frechet(still, still) == pytest.approx(0, abs=1e-9)
    assert frame_frechet(still, still + 51) == pytest.approx(72 * 0.04, rel=1e-6)


def test_too_little_to_fit_a_gaussian_is_refused() -> None:
    with pytest.raises(ValueError, match="two pairs"):
        frame_frechet(_clips(1)[:, :2], _clips(1))


def test_motion_energy_is_the_mean_change() -> None:
    clips = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
    clips[:, 1] = 10
    assert motion_energy(clips) == pytest.approx(10)
    assert motion_energy(torch.full_like(clips, 200)) == 0


def test_the_kernel_distance_is_none_within_a_distribution_and_grows_with_a_shift() -> None:
    first, second = _points(400, 1, (6,)), _points(400, 2, (6,))
    assert kernel_distance(first, second) == pytest.approx(0, abs=0.05)
    near, far = kernel_distance(first, second + 0.5), kernel_distance(first, second + 1)
    assert far > near > 0.3
    # the unit does not matter, and a dimension that hardly varies in the reference says no more than its size
    assert kernel_distance(first * 100, (second + 1) * 100) == pytest.approx(far, rel=1e-6)
    still = torch.full((400, 1), 0.5, dtype=first.dtype)
    apart = kernel_distance(torch.cat([first, still], 1), torch.cat([second, still + 0.1], 1))
    assert apart == pytest.approx(0, abs=0.1)


def test_the_kernel_distance_is_the_unbiased_cubic_one() -> None:
    """Written out: mean off-diagonal kernel within each set, minus twice the mean between them."""
    first, second = _points(7, 1, (3,)), _points(7, 2, (3,)) * 2
    variance, mean = torch.var_mean(first, dim=0)
    x, y = ((points - mean) / variance.mean().sqrt() for points in (first, second))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 3 + 1) ** 3

    within = sum((kernel(a, a).sum() - kernel(a, a).trace()) / 42 for a in (x, y))
    assert kernel_distance(first, second) == pytest.approx(float(within - 2 * kernel(x, y).mean()), rel=1e-6)


def test_of_one_feature_a_clip_the_kernel_distance_is_kid() -> None:
    from torchmetrics.image.kid import poly_mmd

    first, second = _points(9, 1, (4,)), _points(9, 2, (4,)) + 0.5
    variance, mean = torch.var_mean(first, dim=0)
    x, y = ((points - mean) / variance.mean().sqrt() for points in (first, second))
    assert kernel_distance(first, second, clips=9) == pytest.approx(float(poly_mmd(x, y)), rel=1e-6)


def test_features_of_one_clip_are_not_compared_with_each_other() -> None:
    """Clips whose frames are alike: equal distributions have no distance, however many frames a clip has."""
    values = []
    for seed in range(40):
        clips = [_points(24, 2 * seed + part, (1, 8)).expand(24, 16, 8).flatten(0, 1) for part in (0, 1)]
        values.append((kernel_distance(*clips, clips=24), kernel_distance(*clips)))
    own, naive = torch.tensor(values).mean(dim=0).tolist()
    assert abs(own) < 0.15 < 0.5 < naive
    assert kernel_distance(clips[0], clips[1] + 1, clips=24) > 2


def test_features_that_no_clips_have_are_refused() -> None:
    with pytest.raises(ValueError, match="dealt out to 5 clips"):
        kernel_distance(_points(12, 1, (3,)), _points(12, 2, (3,)), clips=5)


def test_the_spread_ratio_tells_samples_that_are_too_alike() -> None:
    real = _points(50, 1, (2, 3))
    assert spread_ratio(real, real) == pytest.approx(1)
    assert spread_ratio(real * 0.8 + 3, real) == pytest.approx(0.8)
    assert spread_ratio(real[:1].expand(50, 2, 3), real) == pytest.approx(0, abs=1e-6)


def test_a_still_dimension_does_no_harm() -> None:
    first, second = _points(12, 1, (3,)), _points(12, 2, (3,))
    first[:, 0] = second[:, 0] = 0.3
    assert math.isfinite(kernel_distance(first, second))


def test_flicker_and_vanishing_lower_the_temporal_consistency() -> None:
    clips = _clips(2)
    honest, still = temporal_consistency(clips), temporal_consistency(clips[:, :1].expand_as(clips))
    flicker = clips.clone()
    flicker[:, ::2] //= 2
    assert still == pytest.approx(1, abs=1e-5) and 0.8 < honest < 1
    assert temporal_consistency(flicker) < honest


def test_given_frames_are_compared_in_decibels() -> None:
    real = torch.full((2, 1, 8, 8, 3), 100, dtype=torch.uint8)
    assert given_frame_psnr(real, real) == 100
    assert given_frame_psnr(real + 10, real) == pytest.approx(20 * math.log10(25.5))


def test_the_preview_error_is_in_units_of_the_real_clips_spread() -> None:
    draw = torch.randn(3, 400, 7, generator=torch.Generator().manual_seed(0))
    first, second, real = draw[0] * 5, draw[1] * 5, 5 * draw[2] + 30
    assert preview_error(first, first, real) == 0
    assert preview_error(first + 1, first, real) == pytest.approx(0.2, rel=0.05)
    assert preview_error(first, second, real) == pytest.approx(math.sqrt(2), rel=0.05)


def test_frame_features_of_clips_are_those_of_their_pairs() -> None:
    clips = _clips(2)[:, :3]
    assert torch.equal(frame_features(clips)[2:3], FrameFeatures()(clips[1:2, :2]))
    assert frame_features(clips).shape == (4, 120)
