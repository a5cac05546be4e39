"""The figures of an experiment: every arm's curve with its interval, the floor, few-step ratio and retention.

few-step ratio   badness at few steps / badness at the most steps    (badness: a distance, or 1 / accuracy; 1 is equal)
retention        few-step ratio before / few-step ratio after        (1: kept; below 1: few steps became worse)

Both are taken seed by seed, on the same prompts and noise, so that what they share drops out; then averaged as
logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyflow.evaluation.statistics import Estimate, badness_ratio, estimate
from anyflow.experiment.kept import read_kept
from anyflow.experiment.pieces import Piece, read_curve
from anyflow.experiment.schema import Experiment, Metric


@dataclass(frozen=True)
class Measured:
    """What was measured: ``rows[arm, card, seed]`` are a curve's rows by step count, ``real[card]`` real clips' marks.

    ``clips[card]`` is the number of prompts.
    """

    experiment: Experiment
    rows: dict[tuple[str, str, int], dict[int, dict[str, Any]]]
    real: dict[str, dict[str, Any]]
    clips: dict[str, int]

    def cards(self, chosen: Sequence[str] = ()) -> list[str]:
        """The chosen cards (all, if none is) of which anything was measured."""
        return [card for card in (chosen or self.experiment.cards) if card in self.real]

    def value(self, arm: str, card: str, seed: int, steps: int, metric: str) -> float | None:
        """One figure; None where it was not measured."""
        found = self.rows.get((arm, card, seed), {}).get(steps, {}).get(metric)
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None

    def values(self, arm: str, card: str, steps: int, metric: str) -> list[float]:
        """A figure of every seed that has it."""
        seeds = self.experiment.seeds_of(arm)
        found = (self.value(arm, card, seed, steps, metric) for seed in seeds)
        return [value for value in found if value is not None]

    def curve(self, arm: str, card: str, metric: str) -> dict[int, Estimate]:
        """A figure by step count, with its interval over the seeds."""
        counts = sorted(self.experiment.evaluation.steps)
        found = {steps: self.values(arm, card, steps, metric) for steps in counts}
        return {steps: estimate([values]) for steps, values in found.items() if values}

    def pairs(
        self,
        one: tuple[str, int],
        other: tuple[str, int],
        metric: Metric,
        compare: Callable[[float, float], float],
        cards: Sequence[str] = (),
    ) -> list[list[float]]:
        """``compare`` of two (arm, step count) seed by seed; a list for each card, without cards that have none.

        An arm without a seed stands with its first one: it is then the same for all.
        """
        strata = []
        for card in self.cards(cards):
            found = []
            for seed in dict.fromkeys([*self.experiment.seeds_of(one[0]), *self.experiment.seeds_of(other[0])]):
                sides = [self._own(arm, card, seed, steps, metric.name) for arm, steps in (one, other)]
                if sides[0] is not None and sides[1] is not None:
                    found.append(compare(sides[0], sides[1]))
            if found:
                strata.append(found)
        return strata

    def _own(self, arm: str, card: str, seed: int, steps: int, metric: str) -> float | None:
        seeds = self.experiment.seeds_of(arm)
        return self.value(arm, card, seed if seed in seeds else seeds[0], steps, metric)


def measure(experiment: Experiment, pieces: Iterable[Piece], kept: Collection[str] = ()) -> Measured:
    """Read what was measured so far: here, and of the pieces named ``kept`` among the results."""
    rows: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}
    real: dict[str, dict[str, Any]] = {}
    clips: dict[str, int] = {}
    for piece in pieces:
        elsewhere = (read_kept(experiment, piece) or {"curves": {}})["curves"] if piece.name in kept else {}
        for card in piece.cards if piece.is_shown else ():
            found = elsewhere.get(card) or read_curve(piece, card)
            if found is None:
                continue
            curve = found["curve"]
            rows[piece.arm, card, piece.seed] = {row["num_steps"]: row for row in curve["rows"]}
            real[card], clips[card] = curve["real"], curve["clips"]
    return Measured(experiment, rows, real, clips)


def few_step_ratio(measured: Measured, arm: str, metric: Metric, cards: Sequence[str] = ()) -> Estimate | None:
    """How many times as bad few steps are as the most; None if it was not measured, or is no ratio."""
    experiment = measured.experiment
    few, most = (arm, experiment.few), (arm, experiment.most)
    return ratio(measured.pairs(few, most, metric, _logs(metric), cards))


def retention(measured: Measured, arm: str, metric: Metric, cards: Sequence[str] = ()) -> Estimate | None:
    """The few-step ratio before over the one after, seed by seed; None as for the ratio, or without an arm before."""
    experiment = measured.experiment
    if not experiment.before or arm == experiment.before:
        return None
    strata = []
    for card in measured.cards(cards):
        pairs = [
            measured.pairs((name, experiment.few), (name, experiment.most), metric, _logs(metric), [card])
            for name in (experiment.before, arm)
        ]
        if all(pairs):
            before, after = pairs[0][0], pairs[1][0]
            strata.append([b - a for b, a in zip(_as_many(before, len(after)), after, strict=True)])
    return ratio(strata)


def ratio(strata: list[list[float]]) -> Estimate | None:
    """The estimate of a ratio from logarithms; None where there are none, or a value was no ratio."""
    if not strata or any(not math.isfinite(value) for values in strata for value in values):
        return None
    return estimate(strata).map(math.exp)


def _as_many(values: list[float], count: int) -> list[float]:
    return values if len(values) == count else [sum(values) / len(values)] * count


def _logs(metric: Metric) -> Callable[[float, float], float]:
    return lambda one, other: _log(badness_ratio(one, other, metric.better))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def figures_of(measured: Measured) -> dict[str, Any]:
    """Everything as one document for machines: curves, the floor, ratios, retention."""
    experiment = measured.experiment
    curves: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for arm in experiment.shown:
        for metric in experiment.metrics:
            for card in measured.cards():
                curve = measured.curve(arm, card, metric.name)
                shown = {
                    str(steps): {**asdict(found), "values": measured.values(arm, card, steps, metric.name)}
                    for steps, found in curve.items()
                }
                curves.setdefault(arm, {}).setdefault(card, {})[metric.name] = shown
            found = {
                "few_step_ratio": few_step_ratio(measured, arm, metric),
                "retention": retention(measured, arm, metric),
            }
            ratios.setdefault(arm, {})[metric.name] = {name: asdict(value) for name, value in found.items() if value}
    floor = {
        card: {metric.name: measured.real[card].get(metric.name) for metric in experiment.metrics}
        for card in measured.cards()
    }
    return {"curves": curves, "floor": floor, "ratios": ratios, "few": experiment.few, "most": experiment.most}


def short(card: str) -> str:
    """A card's name for a heading."""
    return Path(card).stem
