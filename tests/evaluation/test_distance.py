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

from anyflow.evaluation.distance import FrameFeatures, frame_frechet, motion_energy, sliced_wasserstein


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
