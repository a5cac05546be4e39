"""What a report says, as text: answers, tables, notes; page and Markdown only lay it out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from anyflow.evaluation.figures import FIGURES, Figure
from anyflow.evaluation.statistics import Estimate
from anyflow.experiment.claims import Answer
from anyflow.experiment.kept import origins
from anyflow.experiment.load import asked_by
from anyflow.experiment.measured import Measured, few_step_ratio, retention, short
from anyflow.experiment.pieces import Piece
from anyflow.experiment.schema import Experiment
from anyflow.system.tables import markdown_table
from anyflow.tracking.mlflow import code_version, machine

NOTE_CLAIMS = (
    "Compared seed by seed on the same prompts and noise; in brackets the 95 % interval (Student's t over the seeds, "
    "every data set with its own spread, Welch), then the mean change on each data set. A claim holds if the interval "
    "is on its side at every step count, does not hold if it is on the other side at one of them, and is not decided "
    "otherwise."
)


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the rows."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def is_empty(self) -> bool:
        """Whether nothing stands in it but names."""
        return all(cell == "-" for row in self.rows for cell in row[1:])

    def markdown(self) -> list[str]:
        """Its lines."""
        return markdown_table(self.headings, self.rows, "lr")


@dataclass(frozen=True)
class Content:
    """Everything that a report says, top to bottom; ``plots`` are the notes of picture files by name."""

    name: str
    question: str
    expect: str
    missing: str
    answers: Sequence[Answer]
    note_claims: str
    plots: dict[str, str]
    tables: Sequence[Table]
    note_tables: str
    arms: Table
    note_arms: str
    commands: str
    provenance: str


def content_of(
    measured: Measured, pieces: Sequence[Piece], answers: Sequence[Answer], missing: int, kept: Collection[str]
) -> Content:
    """What there is to say of what was measured; ``missing`` tasks are not done, ``kept`` pieces measured elsewhere."""
    experiment = measured.experiment
    name = asked_by(experiment)
    told, ratios = [*experiment.figures, FIGURES["spread"]], [_ratios(measured, one) for one in experiment.figures]
    tables = [_table(measured, figure, card) for figure in told for card in measured.cards()]
    return Content(
        name=experiment.name,
        question=experiment.question,
        expect=experiment.expect,
        missing=f"{missing} trainings and curves are still missing: this is what there is so far." if missing else "",
        answers=answers,
        note_claims=NOTE_CLAIMS,
        plots={
            "curves.png": "Quality against the number of steps: mean over seeds and 95 % interval",
            "cost.png": f"{experiment.figures[0].heading} against the seconds that a clip took where it was sampled, "
            "decoding included",
        },
        tables=[table for table in (*tables, *ratios) if not table.is_empty],
        note_tables=_note(measured),
        arms=_arms(experiment, pieces),
        note_arms=_budget(experiment),
        commands=f"make experiment NAME={name}\n.venv/bin/anyflow experiment {name} --dry-run",
        provenance=_provenance(experiment, pieces, kept),
    )


def _note(measured: Measured) -> str:
    experiment, settings = measured.experiment, measured.experiment.evaluation
    clips = ", ".join(map(str, sorted(set(measured.clips.values())))) or "no"
    given = (
        f"; comparisons of clips leave the first {experiment.left_out} latent frames out, which an arm is given"
        if experiment.left_out
        else ""
    )
    noise = f"the mean of {settings.draws} noises each, the same" if settings.draws > 1 else "the same noise"
    ratio = (
        f" Few-step ratio: how many times as bad {experiment.few} steps are as {experiment.most}; retention: the ratio "
        "before over the ratio after, 1 is kept, below 1 few steps became worse."
    )
    return (
        f"Mean over the seeds {experiment.seeds} [95 % interval]; {clips} prompts of the {settings.split} split at a "
        f"time, {noise} for every arm and step count{given}. Real clips: what other real clips of the same number get. "
        "Spread: how much clips differ among each other, against real ones; read it beside the sliced distance, which "
        f"is a little smaller for clips that are too alike.{ratio if experiment.few < experiment.most else ''}"
        f"{_other_latents(measured)}"
    )


def _other_latents(measured: Measured) -> str:
    """A warning where real clips have another distance in the eyes of one arm: it has a codec of its own."""
    apart = set()
    for (arm, card), marks in measured.real_of.items():
        if not math.isclose(marks["sliced_w1"], measured.real[card]["sliced_w1"], rel_tol=0.02):
            apart.add(arm)
    return f" The codec of {', '.join(sorted(apart))} is another: no distance of latents compares." if apart else ""


def _table(measured: Measured, metric: Figure, card: str) -> Table:
    counts = sorted(measured.experiment.evaluation.steps)
    rows = []
    for arm in measured.experiment.shown:
        curve = measured.curve(arm, card, metric.name)
        rows.append([arm, *(_written(curve.get(count), metric.is_share) for count in counts)])
    floor = measured.real[card].get(metric.name)
    rows.append(["real clips", *([f"{floor:.3g}" if isinstance(floor, int | float) else "-"] * len(counts))])
    better = f"{metric.better} is better" if metric.better else "the nearer to real clips the better"
    headings = ["arm", *(f"{count} step{'s' * (count > 1)}" for count in counts)]
    return Table(f"{metric.heading} on {short(card)} ({better})", headings, rows)


def _ratios(measured: Measured, metric: Figure) -> Table:
    experiment = measured.experiment
    rows = [
        [arm, _written(few_step_ratio(measured, arm, metric)), _written(retention(measured, arm, metric))]
        for arm in experiment.shown
    ]
    headings = ["arm", f"few-step ratio ({experiment.few} / {experiment.most})", "retention"]
    return Table(f"few steps against many, by {metric.heading}, all data", headings, rows)


def _written(found: Estimate | None, is_share: bool = False) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:.3g}"
    low, high = (max(0.0, found.low), min(1.0, found.high)) if is_share else (found.low, found.high)
    return f"{found.mean:.3g} [{low:.3g}, {high:.3g}]"


def _arms(experiment: Experiment, pieces: Sequence[Piece]) -> Table:
    rows = []
    for name, arm in experiment.arms.items():
        own = [piece for piece in pieces if piece.arm == name]
        recipe = arm.folder or (arm.recipe or experiment.recipe)
        start = f"starts from {arm.start_from}" if arm.start_from else ""
        model = f"model {arm.model}" if arm.model else ""
        given = f"{count} latent frames given" if (count := experiment.given_to(name)) else ""
        changes = "; ".join(filter(None, [start, model, *arm.overrides, given]))
        steps = str(own[0].steps) if own and own[0].recipe is not None else "-"
        label = name if arm.shown else f"{name} (a start for others)"
        rows.append([label, arm.title, recipe, changes, steps, " ".join(map(str, experiment.seeds_of(name)))])
    return Table("What was compared", ["arm", "what", "recipe or folder", "apart by", "steps", "seeds"], rows)


def _budget(experiment: Experiment) -> str:
    budget = experiment.budget
    every = f"Every arm: {' '.join(experiment.overrides)}. " if experiment.overrides else ""
    if not budget.steps:
        return every + budget.note
    batch = f" of {budget.batch} clips" if budget.batch else ""
    apart = [f"{name} has {arm.steps}" for name, arm in experiment.arms.items() if arm.steps]
    return (
        f"{every}The budget of a trained arm is {budget.steps} steps{batch}{'; ' if apart else ''}{', '.join(apart)}. "
        f"{budget.note}"
    ).strip()


def _provenance(experiment: Experiment, pieces: Sequence[Piece], kept: Collection[str]) -> str:
    code, here = code_version(), machine()
    changes = " (with changes)" if code.get("git.dirty") == "True" else ""
    trained = "; ".join(origins(experiment, pieces, kept))
    return (
        f"Written at commit {code['git.commit']}{changes}, torch {here['version.torch']}, diffusers "
        f"{here['version.diffusers']}." + (f" Trained: {trained}." if trained else "")
    )
