"""Means with 95 % intervals of few seeds, over one data set or several. Pure functions of numbers.

Student's t, because three seeds know little of their own spread. Several data sets are strata: each has its own mean
and its own spread around it, so that a difference between data sets is not taken for noise, nor a quiet data set's
calm for that of a restless one.

Ratios are compared in logarithms: half and twice are equally far from 1, and data sets of other scales count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

    @property
    def percent(self) -> Estimate:
        """Of a ratio: the change in percent."""
        return self.map(lambda ratio: 100 * (ratio - 1))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" [{self.low:.2f}, {self.high:.2f}]" if self.low is not None else "")


def estimate(strata: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the strata's means, with its interval.

    ``v_d = s_d^2 / n_d`` of each of D strata; standard error ``sqrt(sum v_d) / D``; degrees of freedom by Welch and
    Satterthwaite, ``(sum v_d)^2 / sum(v_d^2 / (n_d - 1))``. With one stratum it is the usual t-interval. Where a
    stratum has one value alone, the spread within the others stands for its own too (N - D degrees of freedom).

    Raises:
        ValueError: a stratum is empty, or there is none.
    """
    if not strata or not all(strata):
        raise ValueError("every stratum needs a value")
    means = [sum(values) / len(values) for values in strata]
    mean, count = sum(means) / len(means), sum(map(len, strata))
    pairs = zip(strata, means, strict=True)
    squares = [sum((value - middle) ** 2 for value in values) for values, middle in pairs]
    freedom: float = count - len(strata)
    if not freedom:
        return Estimate(mean, None, None, count)
    variances = [sum(squares) / freedom / len(values) for values in strata]
    if min(map(len, strata)) > 1:
        variances = [s / (len(values) - 1) / len(values) for s, values in zip(squares, strata, strict=True)]
        weights = [v**2 / (len(values) - 1) for v, values in zip(variances, strata, strict=True)]
        freedom = sum(variances) ** 2 / sum(weights) if sum(weights) > 0 else freedom
    half = t_quantile(freedom) * math.sqrt(sum(variances)) / len(strata)
    return Estimate(mean, mean - half, mean + half, count)


def log_badness(one: float, other: float, better: str) -> float:
    """The logarithm of :func:`badness_ratio`."""
    return math.log(ratio) if (ratio := badness_ratio(one, other, better)) > 0 else math.nan


def ratio_of(strata: Sequence[Sequence[float]]) -> Estimate | None:
    """The estimate of a ratio from its logarithms; None where there are none, or a value was no ratio.

    Strata without a value are left out.
    """
    strata = [values for values in strata if values]
    if not strata or any(not math.isfinite(value) for values in strata for value in values):
        return None
    return estimate(strata).map(math.exp)


def shared(
    one: Mapping[int, float], other: Mapping[int, float], compare: Callable[[float, float], float]
) -> dict[int, float]:
    """``compare`` of two values by seed, of the seeds that both have: those alone were measured on the same noise."""
    return {seed: compare(value, other[seed]) for seed, value in one.items() if seed in other}


def badness_ratio(one: float, other: float, better: str) -> float:
    """How many times as bad ``one`` is as ``other``: of distances their ratio, of accuracies the inverse one.

    NaN where one of them is 0 or negative: nothing is a multiple of 0.
    """
    if min(one, other) <= 0:
        return math.nan
    return one / other if better == "lower" else other / one
