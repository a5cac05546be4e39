"""Means with 95 % intervals of few seeds, over one data set or several. Pure functions of numbers.

Student's t, because three seeds know little of their own spread. Several data sets are strata: each has its own mean,
their spread around those means is pooled, so that a difference between data sets is not taken for noise.

Ratios are compared in logarithms: half and twice are equally far from 1, and data sets of other scales count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anyflow.evaluation.intervals import t_quantile


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval; both ends are None where one value says nothing of the spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the value."""
        low = None if self.low is None else function(self.low)
        return Estimate(function(self.mean), low, None if self.high is None else function(self.high), self.count)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" [{self.low:.2f}, {self.high:.2f}]" if self.low is not None else "")


def estimate(strata: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the strata's means, with its interval.

    ``s^2 = sum of squares within strata / (N - D)``, standard error ``s sqrt(sum 1 / n_d) / D``, N - D degrees of
    freedom, for D strata of n_d values, N in all. With one stratum it is the usual t-interval.

    Raises:
        ValueError: a stratum is empty, or there is none.
    """
    if not strata or not all(strata):
        raise ValueError("every stratum needs a value")
    means = [sum(values) / len(values) for values in strata]
    mean, count = sum(means) / len(means), sum(map(len, strata))
    freedom = count - len(strata)
    if freedom == 0:
        return Estimate(mean, None, None, count)
    pairs = zip(strata, means, strict=True)
    variance = sum((value - middle) ** 2 for values, middle in pairs for value in values) / freedom
    error = math.sqrt(variance * sum(1 / len(values) for values in strata)) / len(strata)
    half = t_quantile(freedom) * error
    return Estimate(mean, mean - half, mean + half, count)


def badness_ratio(one: float, other: float, better: str) -> float:
    """How many times as bad ``one`` is as ``other``: of distances their ratio, of accuracies the inverse one.

    NaN where one of them is 0 or negative: nothing is a multiple of 0.
    """
    if min(one, other) <= 0:
        return math.nan
    return one / other if better == "lower" else other / one
