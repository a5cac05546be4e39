"""The schema of an experiment's file: every key, its type, its default, its meaning and its range.

In ``recipe``, ``overrides`` and ``folder`` the text ``{card}`` stands for a data set of ``cards``: an arm that has it
is trained once for each of them. ``{arm.NAME}`` stands for the model that another arm's run of the same seed has made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from anyflow.evaluation.figures import Figure, figure_of
from anyflow.system.option import option


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: a recipe with overrides, or a finished model."""

    title: str = option("", "what it is, in a few words; empty: the arm's name")
    recipe: str = option("", "stage file that it is trained by; empty: the experiment's")
    model: str = option("", "model file of the recipe; empty: the experiment's")
    overrides: list[str] = option([], "dotted.key=value, after the experiment's own")
    start_from: str = option("", "arm of this experiment whose model is trained further")
    folder: str = option("", "a finished model (folder or hub id), evaluated as it is: nothing is trained")
    seeds: list[int] = option([], "seeds that it is trained with; empty: the experiment's", low=0, high=999)
    steps: int = option(0, "a budget of its own, told in the report; 0: the experiment's", low=0)
    before: str = option("", "arm that its retention is measured against (itself: none); empty: as the experiment says")
    given_frames: int = option(-1, "latent frames given when it is evaluated; -1: as the experiment says", low=-1)
    shown: bool = option(True, "evaluate and compare it; false: it is there for others to start from")


@dataclass(frozen=True)
class Claim:
    """A sentence that the report answers: an arm at some step counts, against another arm or step count."""

    say: str = option("", "the sentence, as a reader should see it")
    arm: str = option("", "the arm that it is about")
    than: str = option("", "the arm that it is compared with; empty: the same arm, at other step counts (of)")
    steps: list[int] = option([], "step counts, each of which must agree", low=1, high=1000)
    of: int = option(0, "step count of the other side; 0: the same as this side's", low=0, high=1000)
    relation: str = option(
        "better",
        "better or worse by more than the interval, or within a factor (a distance's growth, an accuracy's fall)",
        choices=("better", "worse", "within"),
    )
    factor: float = option(1.0, "for within: how many times as bad it may be", above=0)
    metric: str = option("", "the metric that decides; empty: the first of metrics")
    cards: list[str] = option([], "data sets that count, taken together; empty: all")


@dataclass(frozen=True)
class Budget:
    """What every trained arm may use, so that none wins by more training."""

    steps: int = option(0, "optimiser steps of each arm since its start, tails and their teachers included", low=0)
    batch: int = option(0, "clips of one optimiser step; 0: not checked", low=0)
    note: str = option("", "what is to be said of it: steps of unlike cost, how the arms' settings were found")


@dataclass(frozen=True)
class Evaluation:
    """How every arm and seed is measured: the same prompts, the same noise."""

    prompts: int = option(16, "held-out prompts of each data set", low=2)
    draws: int = option(1, "noises that each prompt is sampled from; a seed's figure is their mean", low=1)
    steps: list[int] = option([1, 2, 4, 8, 16, 32], "step counts that each prompt is sampled at", low=1, high=1000)
    given_frames: int = option(0, "latent frames given from each prompt's own clip: 1 is image-to-video", low=0)
    split: str = option("heldout", "split that prompts and real clips come from")
    guidance_scale: float = option(
        1.0, "of networks that have no guidance in their weights; 1: none, 0: as each model says", low=0
    )
    batch_size: int = option(8, "clips a pass", low=1)
    encoders: list[str] = option([], "further distances, as sampling.encoders of a recipe")
    precision: str = option(
        "", "of sampling; empty: bfloat16 on a GPU, float32 on the CPU", choices=("", "float32", "bfloat16")
    )


@dataclass(frozen=True)
class Experiment:
    """A whole experiment."""

    question: str = option("", "what is asked, one sentence")
    expect: str = option("", "what is expected and why, written before it was run")
    cards: list[str] = option([], "data sets that every arm is evaluated on: names in data/, or paths")
    seeds: list[int] = option([0, 1, 2], "seeds of training, and of the noise that is sampled from", low=0, high=999)
    recipe: str = option("", "stage file of the arms that name none")
    model: str = option("", "model file of the arms that name none; empty: what the stage file says")
    hardware: str = option("", "hardware file of all arms; empty: what the stage file says")
    overrides: list[str] = option([], "dotted.key=value of every trained arm")
    arms: dict[str, Arm] = field(default_factory=dict, metadata={"help": "name: what it is"})
    budget: Budget = field(default_factory=Budget)
    evaluation: Evaluation = field(default_factory=Evaluation)
    metrics: list[str] = option([], "figures that are reported, the deciding one first (docs/measures.md)")
    few: int = option(4, "step count of the few-step ratio, against the largest of evaluation.steps", low=1)
    before: str = option("", "arm that the others began as: retention is its few-step ratio over theirs")
    claims: list[Claim] = field(default_factory=list, metadata={"help": "what the report answers"})
    file: str = option("", "where it was read from; set by itself")

    @property
    def name(self) -> str:
        """The file's name."""
        return Path(self.file).stem

    @property
    def results(self) -> Path:
        """The folder of the report, beside the file."""
        return Path(self.file).parent / "results" / self.name

    def seeds_of(self, arm: str) -> list[int]:
        """The seeds of an arm."""
        return self.arms[arm].seeds or self.seeds

    def began_as(self, arm: str) -> str:
        """The arm that one is compared with for its retention; empty: none."""
        found = self.arms[arm].before or self.before
        return "" if found == arm else found

    def given_to(self, arm: str) -> int:
        """Latent frames that an arm is given when it is evaluated."""
        own = self.arms[arm].given_frames
        return own if own >= 0 else self.evaluation.given_frames

    @property
    def left_out(self) -> int:
        """Latent frames that comparisons leave out, of every arm: those that any of them is given."""
        return max(map(self.given_to, self.shown), default=0)

    @property
    def figures(self) -> list[Figure]:
        """What the metrics are."""
        return [self.metric(name) for name in self.metrics]

    def metric(self, name: str) -> Figure:
        """A metric by name; an empty name is the first."""
        found = figure_of(name or self.metrics[0])
        assert found is not None, "names were checked when the file was read"
        return found

    @property
    def shown(self) -> list[str]:
        """The arms that are compared."""
        return [name for name, arm in self.arms.items() if arm.shown]

    @property
    def most(self) -> int:
        """The largest step count."""
        return max(self.evaluation.steps)
