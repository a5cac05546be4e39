"""What of an experiment is done and what is missing, and how long that may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anyflow.errors import UserError
from anyflow.experiment.kept import kept_pieces, read_kept
from anyflow.experiment.pieces import Piece, judged_by, read_curve, setting_changes, training_state
from anyflow.experiment.schema import Experiment
from anyflow.tracking.fingerprints import facts_of, model_fingerprint

TRAIN = "train"


@dataclass(frozen=True)
class Task:
    """One training, or one curve.

    Attributes:
        piece: whose.
        card: the data set that a curve is measured on; empty for the training.
        state: ``done``, ``kept`` (measured elsewhere, among the results), ``missing``, ``cut`` (it goes on from its
            checkpoint) or ``changed`` (it is done again).
        reason: what changed.
        seconds: an estimate of what is left, from the speeds seen so far; None before anything was seen.
        has_kept: whether the results keep what it would measure: also of a model that is needed, and trained, again.
    """

    piece: Piece
    card: str
    state: str
    reason: str = ""
    seconds: float | None = None
    has_kept: bool = False

    @property
    def is_training(self) -> bool:
        """Whether it trains."""
        return not self.card

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to do."""
        return self.state in ("done", "kept")

    @property
    def name(self) -> str:
        """Of a training its piece's, of a curve with the data set."""
        return self.piece.name if self.is_training else f"{self.piece.name} on {self.card}"

    @property
    def title(self) -> str:
        """What stands on the screen."""
        what = f"train {self.piece.steps} steps" if self.is_training else f"evaluate on {self.card}"
        return f"{self.piece.name}: {what}"


def select(experiment: Experiment, pieces: Sequence[Piece], only: Sequence[str], seeds: Sequence[int]) -> list[Piece]:
    """The pieces of some arms and seeds (all, where none are named), and those that they need.

    Raises:
        UserError: an arm or seed that the experiment does not have.
    """
    for arm in only:
        if arm not in experiment.arms:
            raise UserError(f"--only {arm}: experiment {experiment.name} has the arms {', '.join(experiment.arms)}")
    known = {piece.seed for piece in pieces}
    for seed in seeds:
        if seed not in known:
            raise UserError(f"--seeds {seed}: experiment {experiment.name} has the seeds {sorted(known)}")
    wanted = {p.name for p in pieces if (not only or p.arm in only) and (not seeds or p.seed in seeds)}
    for piece in reversed(pieces):  # what needs something stands behind it
        if piece.name in wanted:
            wanted |= set(piece.needs)
    return [piece for piece in pieces if piece.name in wanted]


def tasks_of(experiment: Experiment, pieces: Sequence[Piece], *, afresh: bool = False) -> list[Task]:
    """All trainings and curves of some pieces, with their state; ``afresh``: what the results keep does not count.

    Raises:
        UserError: a card's shards are missing.
    """
    kept = {} if afresh else kept_pieces(experiment, pieces)
    by_piece: dict[str, list[Task]] = {}
    stale: set[str] = set()
    for piece in pieces:
        by_piece[piece.name] = found = _tasks_of(experiment, piece, stale, kept.get(piece.name))
        if piece.recipe is not None and not found[0].is_done:
            stale.add(piece.name)
    for piece in reversed(pieces):  # a model that is kept as figures alone cannot be gone on from
        if not all(task.is_done for task in by_piece[piece.name]):
            for name in kept.keys() & piece.needs:
                by_piece[name] = [replace(task, state="missing") for task in by_piece[name]]
    return with_speeds(experiment, pieces, [task for piece in pieces for task in by_piece[piece.name]])


def _tasks_of(experiment: Experiment, piece: Piece, stale: set[str], kept: str | None) -> list[Task]:
    """A piece's training and curves; ``kept``: nothing kept (None), kept (empty), or why what is kept is useless."""
    training = [""] if piece.recipe is not None else []
    cards = list(piece.cards) if piece.is_shown else []
    if kept == "":
        return [Task(piece, card, "kept", has_kept=True) for card in training + cards]
    state, reason = training_of(piece, stale)
    if state == "missing" and kept:
        reason = kept
    tasks = [Task(piece, card, state, reason) for card in training]
    for card in cards:
        found = curve_state(experiment, piece, card) if state == "done" else ("missing", reason)
        tasks.append(Task(piece, card, *found))
    return tasks


def finished_pieces(tasks: Sequence[Task]) -> set[str]:
    """Names of the pieces that are trained and measured here."""
    states: dict[str, set[str]] = {}
    for task in tasks:
        states.setdefault(task.piece.name, set()).add(task.state)
    return {name for name, found in states.items() if found == {"done"}}


def with_speeds(experiment: Experiment, pieces: Sequence[Piece], tasks: Sequence[Task]) -> list[Task]:
    """The tasks with estimates of their time from what the pieces took so far."""
    speeds = Speeds(experiment, pieces)
    return [replace(task, seconds=0.0 if task.is_done else speeds.of(task)) for task in tasks]


def training_of(piece: Piece, stale: set[str] | frozenset[str] = frozenset()) -> tuple[str, str]:
    """A training's state and what changed; ``stale`` names the pieces that are not trained as they should be."""
    state, reason = training_state(piece, facts_of(piece.recipe) if piece.recipe is not None else {})
    waits_for = [name for name in piece.needs if name in stale]
    if waits_for and state in ("done", "cut", "changed"):
        return "changed", reason or f"it starts from {waits_for[0]}"
    return state, reason


def measured_on(experiment: Experiment, piece: Piece, card: str) -> dict[str, Any]:
    """What a curve stands on: model, data and settings."""
    return {"model": model_fingerprint(piece.model), **judged_by(experiment, piece, card)}


def curve_state(experiment: Experiment, piece: Piece, card: str) -> tuple[str, str]:
    """A curve's state and what changed."""
    found = read_curve(piece, card)
    if found is None:
        return "missing", ""
    changes = list(setting_changes(found["measured_on"], measured_on(experiment, piece, card)).values())
    return ("changed", "; ".join(changes[:3])) if changes else ("done", "")


def curve_of_task(experiment: Experiment, task: Task) -> dict[str, Any] | None:
    """What was measured, by the settings of now: here, or elsewhere if the results keep it."""
    if task.state == "done":
        return read_curve(task.piece, task.card)
    kept = read_kept(experiment, task.piece) if task.has_kept else None
    return None if kept is None else kept["curves"].get(task.card)


class Speeds:
    """Seconds that trainings and curves took: of the same arm if it was seen, else of any."""

    def __init__(self, experiment: Experiment, pieces: Sequence[Piece]) -> None:
        self.step: dict[str, list[float]] = {}
        self.whole_curve: dict[str, list[float]] = {}
        for piece in pieces:
            status = piece.run.status
            if piece.recipe is not None and status.get("state") == "finished" and status.get("train_seconds"):
                self.step.setdefault(piece.arm, []).append(status["train_seconds"] / piece.steps)
            for card in piece.cards:
                found = read_curve(piece, card)
                if found is not None:
                    self.whole_curve.setdefault(piece.arm, []).append(found["seconds"])

    def of(self, task: Task) -> float | None:
        """Seconds that a task has left; None before one of its kind was seen."""
        piece = task.piece
        if not task.is_training:
            return _mean(self.whole_curve, piece.arm)
        step = _mean(self.step, piece.arm)
        spent = piece.run.status.get("train_seconds", 0.0) if task.state == "cut" else 0.0
        return None if step is None else max(10.0, step * piece.steps - spent)


def _mean(seen: dict[str, list[float]], arm: str) -> float | None:
    values = seen.get(arm) or [value for found in seen.values() for value in found]
    return sum(values) / len(values) if values else None


def left(tasks: Sequence[Task], clock: Callable[[float], str], at_once: int = 1) -> str:
    """How much is missing, in words: ``12 to go, about 34:00`` where ``at_once`` tasks are done at a time."""
    todo = [task for task in tasks if not task.is_done]
    known = [task.seconds for task in todo if task.seconds is not None]
    if not todo:
        return "nothing to do"
    more = f" and {len(todo) - len(known)} whose speed is not known yet" if len(known) < len(todo) else ""
    return f"{len(todo)} to go" + (f", about {clock(sum(known) / at_once)}{more}" if known else ", no speed seen yet")
