"""What goes wrong in on-policy training, seen early: figures of the student's samples, and warnings when they drift.

Distribution matching fails in known ways, and its loss tells of none of them: samples that become alike (collapse),
video that stops moving, colours that burn out, a critic that loses track of the student. Each shows in a figure that is
cheap to have from the latents of a rollout beside the data's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

EXTREME = 0.001
"""Share of the data's values on either side that counts as extreme."""


@torch.no_grad()
def rollout_figures(samples: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """A batch of the student's samples against the data's, both latents ``[B, F, C, H, W]``.

    Returns:
        ``sample_mean`` and ``sample_variance``; over the data's, 1 being healthy: ``spread_ratio`` (standard
        deviation), and with several frames ``motion_ratio`` (mean difference of neighbouring frames); ``saturation``:
        the share of values beyond all but ``EXTREME`` of the data's on either side (2 ``EXTREME`` is healthy).
    """
    samples, clean = samples.float(), clean.float()
    low, high = _extremes(clean)
    figures = {
        "sample_mean": samples.mean(),
        "sample_variance": samples.var(),
        "spread_ratio": samples.std() / clean.std().clamp(min=1e-6),
        "saturation": ((samples < low) | (samples > high)).float().mean(),
    }
    if samples.shape[1] > 1:
        figures["motion_ratio"] = _motion(samples) / _motion(clean).clamp(min=1e-6)
    return figures


def _motion(latents: Tensor) -> Tensor:
    return latents.diff(dim=1).abs().mean()


def _extremes(clean: Tensor) -> tuple[Tensor, Tensor]:
    """The values that ``EXTREME`` of the data lies below, and above."""
    ordered = clean.flatten().sort().values
    index = int(EXTREME * (len(ordered) - 1))
    return ordered[index], ordered[-1 - index]


@dataclass(frozen=True)
class Rule:
    """When a figure's drift is worth a word.

    Attributes:
        figure: its name.
        direction: which way is bad.
        factor: how far from where the run began, as a ratio.
        beyond: a bound that must be passed as well, so that a healthy figure may move within it.
        sentence: what it means and what to do.
    """

    figure: str
    direction: Literal["falls", "rises"]
    factor: float
    beyond: float
    sentence: str

    def holds(self, began: float, now: float) -> bool:
        """Whether the figure has drifted."""
        if self.direction == "falls":
            return now < began / self.factor and now < self.beyond
        return now > began * self.factor and now > self.beyond


RULES = (
    Rule(
        "spread_ratio",
        "falls",
        1.25,
        0.8,
        "the samples become alike (mode collapse): lower optimizer.lr, raise stage.onpolicy.forward_weight or lower "
        "stage.onpolicy.extra_guidance",
    ),
    Rule(
        "spread_ratio",
        "rises",
        1.25,
        1.2,
        "the samples' contrast grows (oversaturation): lower stage.onpolicy.extra_guidance or optimizer.lr",
    ),
    Rule(
        "saturation",
        "rises",
        2.0,
        0.02,
        "values leave the data's range (oversaturation): lower stage.onpolicy.extra_guidance or optimizer.lr",
    ),
    Rule(
        "motion_ratio",
        "falls",
        1.25,
        0.8,
        "the video stops moving, as distribution matching is known for: raise stage.onpolicy.forward_weight, or stop "
        "earlier",
    ),
    Rule(
        "motion_ratio",
        "rises",
        1.5,
        1.5,
        "frames flicker: lower optimizer.lr, or raise stage.onpolicy.critic_turns so that the critic keeps up",
    ),
    Rule(
        "critic_loss",
        "rises",
        2.0,
        0.0,
        "the critic loses track of the student: raise stage.onpolicy.critic_turns or stage.onpolicy.critic.lr, or "
        "lower optimizer.lr",
    ),
    Rule(
        "normaliser",
        "falls",
        2.5,
        float("inf"),
        "the samples come to please the teacher instead of following the data: lower optimizer.lr, or stop earlier",
    ),
)


class DriftWatch:
    """Compares each figure's recent mean with its mean in the first turns; says each thing once, until it heals.

    A rollout of one step looks unlike one of fifty, so single figures are noisy: ``settle`` values make the reference,
    and the recent mean forgets as slowly.

    Attributes:
        state: plain numbers, for checkpoints: a resumed run has the references that it began with.
    """

    def __init__(self, settle: int = 20) -> None:
        self.settle = settle
        self.state: dict[str, Any] = {"figures": {}, "said": []}

    def see(self, figures: Mapping[str, float]) -> list[str]:
        """Take one turn's figures; returns the sentences that are due."""
        for name, value in figures.items():
            seen = self.state["figures"].setdefault(name, {"count": 0, "began": 0.0, "now": 0.0})
            seen["count"] += 1
            weight = 1 / min(seen["count"], self.settle)
            seen["now"] += weight * (value - seen["now"])
            if seen["count"] <= self.settle:
                seen["began"] = seen["now"]
        return [self._sentence(rule) for rule in RULES if rule.figure in figures and self._is_news(rule)]

    def _is_news(self, rule: Rule) -> bool:
        seen, name = self.state["figures"][rule.figure], f"{rule.figure} {rule.direction}"
        drifted = seen["count"] > self.settle and rule.holds(seen["began"], seen["now"])
        known = name in self.state["said"]
        if drifted and not known:
            self.state["said"].append(name)
        if not drifted and known:
            self.state["said"].remove(name)
        return drifted and not known

    def _sentence(self, rule: Rule) -> str:
        seen = self.state["figures"][rule.figure]
        return (
            f"{rule.figure} went from {seen['began']:.3g} to {seen['now']:.3g}: {rule.sentence} "
            "(stage.onpolicy.watch=false silences this)"
        )
