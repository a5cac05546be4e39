"""The answers: each claim holds, does not hold, or is not decided, and why, in words.

A claim compares an arm at some step counts with another arm, or with itself at another step count, seed by seed on the
same prompts and noise. It holds if the interval of the comparison lies wholly on its side at every step count; it does
not hold if it lies wholly on the other side at one of them; otherwise the seeds do not decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from anyflow.evaluation.statistics import Estimate, badness_ratio, estimate
from anyflow.experiment.figures import Measured, ratio
from anyflow.experiment.schema import Claim, Metric

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"


@dataclass(frozen=True)
class Answer:
    """A claim's verdict and the sentence behind each step count."""

    claim: Claim
    verdict: str
    reasons: tuple[str, ...]


def answer(measured: Measured, claim: Claim) -> Answer:
    """Answer one claim from what was measured so far."""
    found = [_at(measured, claim, steps) for steps in claim.steps]
    verdicts = [verdict for verdict, _ in found]
    whole = FAILS if FAILS in verdicts else HOLDS if all(verdict == HOLDS for verdict in verdicts) else OPEN
    return Answer(claim, whole, tuple(reason for _, reason in found))


def _at(measured: Measured, claim: Claim, steps: int) -> tuple[str, str]:
    """Verdict and reason at one step count."""
    metric = measured.experiment.metric(claim.metric)
    one, other = (claim.arm, steps), (claim.than or claim.arm, claim.of or steps)
    where = f"{_side(one)} against {_side(other)}"

    def log_ratio(first: float, second: float) -> float:
        worse = badness_ratio(first, second, metric.better)
        return math.log(worse) if worse > 0 else math.nan

    strata = measured.pairs(one, other, metric, log_ratio, claim.cards)
    if not strata:
        return OPEN, f"{where}: not measured"
    found = ratio(strata)
    if claim.relation == "within":
        return _within(found, claim.factor, metric, where)
    if found is not None and metric.better == "lower":
        return _sided(found.map(lambda worse: 100 * (worse - 1)), " %", claim, metric, where)

    def growth(first: float, second: float) -> float:
        return first - second

    return _sided(estimate(measured.pairs(one, other, metric, growth, claim.cards)), "", claim, metric, where)


def _sided(change: Estimate, unit: str, claim: Claim, metric: Metric, where: str) -> tuple[str, str]:
    """Better or worse: is the change of the metric's value on the claimed side, its whole interval?"""
    wanted = -1 if (claim.relation == "better") == (metric.better == "lower") else 1
    text = f"{where}: {_title(metric)} {_changed(change, unit)} ({_pairs(change)})"
    if change.low is None or change.high is None:
        return OPEN, f"{text}; one seed has no interval"
    if min(wanted * change.low, wanted * change.high) > 0:
        return HOLDS, text
    if max(wanted * change.low, wanted * change.high) < 0:
        return FAILS, f"{text}, the other way round"
    return OPEN, f"{text}, and 0 is inside the interval"


def _within(worse: Estimate | None, factor: float, metric: Metric, where: str) -> tuple[str, str]:
    """Within a factor: is the ratio of badness below it, its whole interval?"""
    if worse is None:
        return OPEN, f"{where}: {_title(metric)} is 0 somewhere, so that there is no ratio"
    interval = "" if worse.low is None else f" [{worse.low:.3g}, {worse.high:.3g}]"
    text = f"{where}: {_title(metric)} {worse.mean:.3g} times as bad{interval} ({_pairs(worse)}), {factor:g} allowed"
    if worse.low is None or worse.high is None:
        return OPEN, f"{text}; one seed has no interval"
    if worse.high <= factor:
        return HOLDS, text
    return (FAILS, text) if worse.low > factor else (OPEN, f"{text}, which is inside the interval")


def _changed(change: Estimate, unit: str) -> str:
    """``12 % lower [5, 18]``: a change, told by its size."""
    sign = 1 if change.mean >= 0 else -1
    ends = sorted(sign * end for end in (change.low, change.high) if end is not None)
    interval = f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else ""
    return f"{abs(change.mean):.3g}{unit} {'higher' if sign > 0 else 'lower'}{interval}"


def _side(side: tuple[str, int]) -> str:
    arm, steps = side
    return f"{arm} at {steps} step{'s' * (steps > 1)}"


def _title(metric: Metric) -> str:
    return metric.title or metric.name


def _pairs(found: Estimate) -> str:
    return f"{found.count} pair{'s' * (found.count > 1)}"
