"""Intervals: the textbook's for one stratum, blind to what strata differ in, and right as often as they say."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyflow.evaluation.intervals import t_quantile
from anyflow.evaluation.statistics import badness_ratio, estimate, ratio_of, shared

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=6)


def test_one_stratum_is_the_textbooks_interval() -> None:
    """1, 2, 3: mean 2, standard deviation 1, t(2) = 4.3027, half width 4.3027 / sqrt(3)."""
    found = estimate([[1.0, 2.0, 3.0]])
    assert found.mean == 2 and found.count == 3
    assert found.high == pytest.approx(2 + 4.30265 / math.sqrt(3), rel=1e-5)
    assert found.low == pytest.approx(2 - 4.30265 / math.sqrt(3), rel=1e-5)
    assert t_quantile(10**6) == pytest.approx(1.95996, rel=1e-4)


@given(VALUES, VALUES, st.floats(-1000, 1000))
def test_what_strata_differ_in_is_no_noise(one: list[float], other: list[float], shift: float) -> None:
    plain, moved = estimate([one, other]), estimate([one, [value + shift for value in other]])
    assert plain.low is not None and plain.high is not None and moved.low is not None and moved.high is not None
    assert moved.high - moved.low == pytest.approx(plain.high - plain.low, abs=1e-6)
    assert moved.mean == pytest.approx(plain.mean + shift / 2, abs=1e-6)


def test_one_value_has_no_interval() -> None:
    assert estimate([[3.0]]).low is None and estimate([[3.0], [4.0]]).high is None
    with pytest.raises(ValueError, match="value"):
        estimate([[1.0], []])


@pytest.mark.parametrize("spreads", [(1.0, 1.0, 1.0), (0.05, 1.0, 0.5), (0.1, 0.2, 3.0)])
def test_the_interval_holds_the_truth_as_often_as_it_says(spreads: tuple[float, ...]) -> None:
    """3 seeds of 3 data sets, quiet and restless ones, 4000 times: at least 95 % of the intervals hold the mean.

    Two standard errors are 0.7 %; of three seeds Welch's interval errs a little to the careful side.
    """
    draw = random.Random(0)
    hits = 0
    for _ in range(4000):
        places = zip((0.0, 10.0, -4.0), spreads, strict=True)
        found = estimate([[draw.gauss(centre, spread) for _ in range(3)] for centre, spread in places])
        hits += found.low <= 2.0 <= found.high  # type: ignore[operator]
    assert 0.943 < hits / 4000 < 0.985


def test_a_stratum_of_one_borrows_the_spread_of_the_others() -> None:
    """s^2 = 1 from three values; half = t(2) sqrt(1 / 3 + 1) / 2."""
    found = estimate([[1.0, 2.0, 3.0], [5.0]])
    assert found.mean == 3.5 and found.high == pytest.approx(3.5 + 4.30265 * math.sqrt(4 / 3) / 2, rel=1e-5)


def test_only_seeds_of_both_are_compared() -> None:
    assert shared({0: 3.0, 1: 5.0}, {1: 2.0, 2: 9.0}, lambda one, other: one - other) == {1: 3.0}
    assert ratio_of([]) is None and ratio_of([[0.1, math.nan]]) is None


def test_badness_is_a_distance_or_a_missing_accuracy() -> None:
    assert badness_ratio(3.0, 2.0, "lower") == 1.5
    assert badness_ratio(0.4, 0.8, "higher") == 2.0
    assert math.isnan(badness_ratio(0.0, 1.0, "higher"))
