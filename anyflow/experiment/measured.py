"""The figures of an experiment: every arm's curve with its interval, the floor, few-step ratio and retention.

Few-step ratio and retention are those of :mod:`anyflow.evaluation.retention`, over all data sets and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyflow.evaluation.figures import Figure
from anyflow.evaluation.retention import mean_ratio, ratio_before_over_after
from anyflow.evaluation.statistics import Estimate, estimate, log_badness, shared
from anyflow.experiment.schema import Experiment
from anyflow.experiment.tasks import Task, curve_of_task


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        experiment: the question.
        rows: by arm, card and seed, a curve's rows by step count.
        real_of: by arm and card, what real clips get; decoded ones where real ones have no such figure.
        clips: by card, the number of prompts.
    """

    experiment: Experiment
    rows: dict[tuple[str, str, int], dict[int, dict[str, Any]]]
    real_of: dict[tuple[str, str], dict[str, Any]]
    clips: dict[str, int]

    @property
    def real(self) -> dict[str, dict[str, Any]]:
        """By card, what real clips get, in the latents of the first arm that was measured on it."""
        return {card: marks for (_, card), marks in reversed(self.real_of.items())}

    def cards(self, chosen: Sequence[str] = ()) -> list[str]:
        """The chosen cards (all, if none is) of which anything was measured."""
        return [card for card in (chosen or self.experiment.cards) if card in self.real]

    def value(self, arm: str, card: str, seed: int, steps: int, metric: str) -> float | None:
        """One figure; None where it was not measured."""
        found = self.rows.get((arm, card, seed), {}).get(steps, {}).get(metric)
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None

    def by_seed(self, arm: str, card: str, steps: int, metric: str) -> dict[int, float]:
        """A figure of every seed that has it."""
        found = {seed: self.value(arm, card, seed, steps, metric) for seed in self.experiment.seeds_of(arm)}
        return {seed: value for seed, value in found.items() if value is not None}

    def values(self, arm: str, card: str, steps: int, metric: str) -> list[float]:
        """The same without the seeds."""
        return list(self.by_seed(arm, card, steps, metric).values())

    def curve(self, arm: str, card: str, metric: str) -> dict[int, Estimate]:
        """A figure by step count, with its interval over the seeds."""
        counts = sorted(self.experiment.evaluation.steps)
        found = {steps: self.values(arm, card, steps, metric) for steps in counts}
        return {steps: estimate([values]) for steps, values in found.items() if values}

    def pairs(
        self,
        one: tuple[str, int],
        other: tuple[str, int],
        metric: Figure,
        compare: Callable[[float, float], float] | None = None,
        cards: Sequence[str] = (),
    ) -> dict[str, dict[int, float]]:
        """``compare`` of two (arm, step count) by card and seed, of the seeds that both have; cards without any too.

        Without ``compare`` it is the logarithm of how many times as bad the first is.
        """
        how = compare or (lambda first, second: log_badness(first, second, metric.better))
        sides = {
            card: [self.by_seed(arm, card, steps, metric.name) for arm, steps in (one, other)]
            for card in cards or self.experiment.cards
        }
        return {card: shared(first, second, how) for card, (first, second) in sides.items()}


def read_measured(experiment: Experiment, tasks: Iterable[Task]) -> Measured:
    """Read the curves that were measured as the experiment is now: here, and elsewhere where they are kept."""
    rows: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}
    real: dict[tuple[str, str], dict[str, Any]] = {}
    clips: dict[str, int] = {}
    for task in tasks:
        found = None if task.is_training else curve_of_task(experiment, task)
        if found is not None:
            curve, piece = found["curve"], task.piece
            rows[piece.arm, task.card, piece.seed] = {row["num_steps"]: row for row in curve["rows"]}
            floor = {name: value for name, value in curve["real"].items() if value is not None}
            real.setdefault((piece.arm, task.card), {**curve["codec"], **floor})
            clips[task.card] = curve["clips"]
    return Measured(experiment, rows, real, clips)


def few_step_ratio(measured: Measured, arm: str, metric: Figure, cards: Sequence[str] = ()) -> Estimate | None:
    """How many times as bad few steps are as the most; None if it was not measured, or is no ratio."""
    return mean_ratio(_few_step_logs(measured, arm, metric, cards))


def retention(measured: Measured, arm: str, metric: Figure, cards: Sequence[str] = ()) -> Estimate | None:
    """The few-step ratio before over the one after, seed by seed; None as for the ratio, or without an arm before."""
    before = measured.experiment.began_as(arm)
    if not before:
        return None
    was, now = (_few_step_logs(measured, name, metric, cards) for name in (before, arm))
    return mean_ratio(ratio_before_over_after(was, now))


def strata_of(pairs: dict[str, dict[int, float]]) -> list[list[float]]:
    """The values of each card that has any."""
    return [list(found.values()) for found in pairs.values() if found]


def _few_step_logs(measured: Measured, arm: str, metric: Figure, cards: Sequence[str]) -> dict[str, dict[int, float]]:
    experiment = measured.experiment
    if experiment.few == experiment.most or not metric.compares:
        return {}
    return measured.pairs((arm, experiment.few), (arm, experiment.most), metric, cards=cards)


def figures_of(measured: Measured) -> dict[str, Any]:
    """Everything as one document for machines: curves, the floor, ratios, retention."""
    experiment = measured.experiment
    curves: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for arm in experiment.shown:
        for metric in experiment.figures:
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
        card: {metric.name: measured.real[card].get(metric.name) for metric in experiment.figures}
        for card in measured.cards()
    }
    return {"curves": curves, "floor": floor, "ratios": ratios, "few": experiment.few, "most": experiment.most}


def short(card: str) -> str:
    """A card's name for a heading."""
    return Path(card).stem
