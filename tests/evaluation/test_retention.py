"""Few-step ratio and retention: orientation, seeds paired, and what has none."""

from __future__ import annotations

import pytest

from anyflow.evaluation.curve import Curve, CurveRow, Marks, over_seeds
from anyflow.evaluation.retention import change, few_step_ratio, retention

NOTHING = Marks(sliced_w1=0.1, frame_frechet=0.1, motion_accuracy=1.0, motion_unread=0.0, motion_energy=1.0)


def row(num_steps: int, distance: float, accuracy: float | None = 0.5) -> CurveRow:
    figures = {"sliced_w1": distance, "frame_frechet": distance, "motion_energy": 1.0, "motion_unread": 0.0}
    cost = {"nfe": num_steps, "sampling_seconds": 1.0, "decoding_seconds": 1.0}
    return CurveRow.from_json({**figures, **cost, "motion_accuracy": accuracy, "num_steps": num_steps})


def curve(few: list[float], many: list[float], accuracies: tuple[float | None, float | None] = (0.5, 0.5)) -> Curve:
    """A curve of as many seeds as there are distances."""
    rows = tuple(
        over_seeds([row(steps, value, accuracy) for value in values])
        for steps, values, accuracy in ((4, few, accuracies[0]), (32, many, accuracies[1]))
    )
    seeds = tuple(range(len(few)))
    return Curve("x", "driving", 8, 0, 3.0, (17, 64, 96), rows, NOTHING, NOTHING, seeds=seeds)


def test_one_is_no_loss_and_more_is_worse_for_distances_and_shares_alike() -> None:
    worse = curve([0.3], [0.2], (0.5, 0.75))
    for name in ("sliced_w1", "motion_accuracy"):
        ratio = few_step_ratio(worse, name)
        assert ratio is not None and ratio.mean == pytest.approx(1.5) and ratio.low is None
        even = few_step_ratio(curve([0.2], [0.2]), name)
        assert even is not None and even.mean == 1


def test_retention_is_below_one_where_few_steps_were_lost() -> None:
    before, after = curve([0.22], [0.2]), curve([0.3], [0.15])
    kept = retention(before, after, "sliced_w1")
    assert kept is not None and kept.mean == pytest.approx(1.1 / 2)
    same = retention(before, before, "sliced_w1")
    assert same is not None and same.mean == 1


def test_seeds_are_paired() -> None:
    """Noise that both step counts share cancels: the interval is that of the ratios, not of the distances."""
    apart = curve([0.2, 0.4, 0.6], [0.1, 0.2, 0.3])
    ratio = few_step_ratio(apart, "frame_frechet")
    assert ratio is not None and ratio.mean == pytest.approx(2) and ratio.low == pytest.approx(2)
    assert str(ratio) == "2.00 [2.00, 2.00]"
    spread = few_step_ratio(curve([0.2, 0.4], [0.2, 0.2]), "frame_frechet")
    assert spread is not None and spread.mean == pytest.approx(2**0.5), "1 and 2: half and twice are equally far from 1"
    assert spread.high == pytest.approx(2 ** (0.5 + 12.706 * 0.5), rel=1e-3)


def test_a_change_is_paired_by_seed() -> None:
    """Every seed falls by a fifth, whatever the seeds differ in; of an accuracy the inverse counts."""
    before, after = curve([0.2, 0.4], [0.1, 0.3]), curve([0.16, 0.32], [0.1, 0.3])
    found = change(before, after, "sliced_w1", 4)
    assert found is not None and found.mean == pytest.approx(0.8) and found.high == pytest.approx(0.8)
    even = change(before, after, "motion_accuracy", 32)
    assert even is not None and even.mean == 1
    with pytest.raises(KeyError):
        change(before, after, "sliced_w1", 16)


def test_what_has_no_ratio() -> None:
    assert few_step_ratio(curve([0.2], [0.0]), "sliced_w1") is None
    assert few_step_ratio(curve([0.2], [0.2], (None, None)), "motion_accuracy") is None
    assert retention(curve([0.2], [0.0]), curve([0.2], [0.2]), "sliced_w1") is None
    for name in ("motion_energy", "frame_kernel", "preview_error"):
        with pytest.raises(KeyError, match="no few-step ratio"):
            few_step_ratio(curve([0.2], [0.2]), name)


def test_seeds_that_one_side_lacks_are_left_out() -> None:
    kept = retention(curve([0.22], [0.2]), curve([0.2, 0.9], [0.2, 0.1]), "sliced_w1")
    assert kept is not None and kept.mean == pytest.approx(1.1) and kept.count == 1
