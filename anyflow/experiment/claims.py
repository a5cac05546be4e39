"""The answers: each claim holds, does not hold, or is not decided, and why, in words.

A claim compares an arm at some step counts with another arm, or with itself at another step count, seed by seed on the
same prompts and noise. It holds if the interval of the comparison lies wholly on its side at every step count; it does
not hold if it lies wholly on the other side at one of them; otherwise the seeds do not decide. Nor is anything decided
before every data set that the claim is about has been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import sub

from anyflow.evaluation.figures import LOWER, Figure
from anyflow.evaluation.retention import mean_ratio
from anyflow.evaluation.statistics import Estimate, estimate
from anyflow.experiment.measured import Measured, short, strata_of
from anyflow.experiment.schema import Claim

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
NO_INTERVAL = "one pair, or pairs without any spread, have no interval"


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
    logs = measured.pairs(one, other, metric, cards=claim.cards)
    if missing := [short(card) for card, found in logs.items() if not found]:
        return OPEN, f"{where}: not measured" + (f" on {', '.join(missing)}" if len(missing) < len(logs) else "")
    found = mean_ratio(logs)
    if claim.relation == "within":
        return _within(found, claim.factor, metric, where)
    if found is not None and metric.better == LOWER:
        every = {card: mean_ratio({card: values}) for card, values in logs.items()}
        parts = {card: ratio.percent for card, ratio in every.items() if ratio is not None}
        return _sided(found.percent, parts, " %", claim, metric, where)
    growth = measured.pairs(one, other, metric, sub, claim.cards)
    parts = {card: estimate([list(values.values())]) for card, values in growth.items()}
    return _sided(estimate(strata_of(growth)), parts, "", claim, metric, where)


def _sided(
    change: Estimate, parts: Mapping[str, Estimate], unit: str, claim: Claim, metric: Figure, where: str
) -> tuple[str, str]:
    """Better or worse: is the change of the metric's value on the claimed side, its whole interval?

    ``parts`` are the changes on each data set: a mean may hide one that goes the other way.
    """
    wanted = -1 if (claim.relation == "better") == (metric.better == LOWER) else 1
    text = f"{where}: {metric.heading} {_changed(change, unit)} ({_pairs(change)})"
    if len(parts) > 1:
        text += f"; {', '.join(f'{short(card)} {part.mean:+.3g}{unit}' for card, part in parts.items())}"
    if change.low is None or change.high is None or change.low == change.high:
        return OPEN, f"{text}; {NO_INTERVAL}"
    if min(wanted * change.low, wanted * change.high) > 0:
        return HOLDS, text
    if max(wanted * change.low, wanted * change.high) < 0:
        return FAILS, f"{text}, the other way round"
    return OPEN, f"{text}, and 0 is inside the interval"


def _within(worse: Estimate | None, factor: float, metric: Figure, where: str) -> tuple[str, str]:
    """Within a factor: is the ratio of badness below it, its whole interval?"""
    if worse is None:
        return OPEN, f"{where}: {metric.heading} is 0 somewhere, so that there is no ratio"
    interval = "" if worse.low is None else f" [{worse.low:.3f}, {worse.high:.3f}]"
    text = f"{where}: {metric.heading} {worse.mean:.3f} times as bad{interval} ({_pairs(worse)}), {factor:g} allowed"
    if worse.low is None or worse.high is None or worse.low == worse.high:
        return OPEN, f"{text}; {NO_INTERVAL}"
    if worse.high <= factor:
        return HOLDS, text
    return (FAILS, text) if worse.low > factor else (OPEN, f"{text}, which is inside the interval")


def _changed(change: Estimate, unit: str) -> str:
    """``12 % lower [5, 18]``: a change by its size."""
    sign = 1 if change.mean >= 0 else -1
    ends = sorted(sign * end for end in (change.low, change.high) if end is not None)
    interval = f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else ""
    return f"{abs(change.mean):.3g}{unit} {'higher' if sign > 0 else 'lower'}{interval}"


def _side(side: tuple[str, int]) -> str:
    arm, steps = side
    return f"{arm} at {steps} step{'s' * (steps > 1)}"


def _pairs(found: Estimate) -> str:
    return f"{found.count} pair{'s' * (found.count > 1)}"
