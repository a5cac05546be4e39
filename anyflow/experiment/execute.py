"""Running what is missing of an experiment: a training in a process of its own, then its curves, piece by piece.

Whatever stops it, the same command goes on: finished pieces stay, a training that was cut resumes from its checkpoint.
A piece whose recipe, data or start has changed is done again, and what was there is kept in ``replaced/``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyflow.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError, first_line
from anyflow.experiment.children import SHOW_EVERY, Children, Stopped
from anyflow.experiment.curves import measure_piece, record_piece
from anyflow.experiment.pieces import Piece
from anyflow.experiment.schema import Experiment
from anyflow.experiment.tasks import Task, curve_state, left, tasks_of, training_of, with_speeds
from anyflow.experiment.together import Place, work_together
from anyflow.recipe import lagging_average
from anyflow.system.console import clock, progress_line, quiet_libraries
from anyflow.system.locks import locked
from anyflow.system.signals import sigterm_raises


def run_pieces(
    experiment: Experiment, pieces: Sequence[Piece], at_once: int = 1, *, afresh: bool = False
) -> dict[str, str]:
    """Do everything that is missing, ``at_once`` tasks at a time; returns what failed: the task's name and why.

    ``afresh``: what was measured elsewhere is missing too.

    Raises:
        UserError: another process is at this experiment.
        Stopped: SIGTERM or Ctrl-C; everything so far is kept.
    """
    quiet_libraries()
    home = pieces[0].run.path.parent
    home.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    try:
        with locked(home / ".lock", patience=0) as lock, sigterm_raises(lambda: Stopped(EXIT_PREEMPTED)):
            tasks = tasks_of(experiment, pieces, afresh=afresh)
            _say(f"experiment {experiment.name}: {len(tasks)} pieces of work, {left(tasks, clock, at_once)}")
            for lag in lagging_arms(pieces):
                _say(lag)
            todo = [task for task in tasks if not task.is_done]
            children = Children(lock)

            def tell_what_is_left(rest: Sequence[Task]) -> None:
                rest = [task for task in rest if not {task.name, task.piece.name} & failed.keys()]
                _say(f"  {left(with_speeds(experiment, pieces, rest), clock, at_once)}")

            if at_once == 1:
                for index, task in enumerate(todo):
                    _do(experiment, task, failed, children)
                    tell_what_is_left(todo[index + 1 :])
            else:

                def do(task: Task, place: Place) -> None:
                    _do(experiment, task, failed, children, place)

                work_together(todo, do, children, at_once, tell_what_is_left)
    except BlockingIOError:
        raise UserError(
            f"another process is at experiment {experiment.name}, or a training of it still runs: wait for its end"
        ) from None
    except KeyboardInterrupt:
        raise Stopped(EXIT_INTERRUPTED) from None
    return failed


def lagging_arms(pieces: Sequence[Piece]) -> list[str]:
    """A warning for each arm whose averaged weights cannot follow what it learns."""
    lags = {piece.arm: lagging_average(piece.recipe) for piece in pieces if piece.recipe is not None}
    return [f"arm {arm}: {lag}" for arm, lag in lags.items() if lag]


def _do(
    experiment: Experiment, task: Task, failed: dict[str, str], children: Children, place: Place | None = None
) -> None:
    """One training or curve, looked at once more: what it needs may have failed, or come out as it was before.

    Without a ``place`` it is the only one, and its curves are measured in this process.
    """
    piece, what = task.piece, "training" if task.is_training else task.card

    def say(text: str) -> None:
        _say(f"  {piece.name}: {text}" if place else f"  {text}")

    if piece.name in failed:
        return
    for needed in piece.needs:
        if needed in failed:
            failed[piece.name] = f"it needs {needed}"
            return
    state, reason = training_of(piece) if task.is_training else curve_state(experiment, piece, task.card)
    if state == "done":
        return
    _say(f"{task.title}{' (goes on)' if state == 'cut' else ''}")
    if state == "changed":
        say(f"is done again: {reason}")
    began = time.monotonic()
    if task.is_training:
        if state == "changed":
            say(f"what was there is kept in {_replace(piece)}")
        why = _train(piece, children, place, say)
        if why:
            failed[piece.name] = why
            say(f"failed: {why}")
            return
    else:
        try:
            _evaluate(experiment, piece, task.card, place)
        except (UserError, RuntimeError, OSError) as error:  # out of memory, a full disk: of this piece alone
            failed[task.name] = why = first_line(error)
            say(f"failed: {why}")
            return
    say(f"{what} done in {clock(time.monotonic() - began)}" if place else f"done in {clock(time.monotonic() - began)}")


def _replace(piece: Piece) -> Path:
    """Put a folder aside, under a name that is free; returns its new path."""
    aside = piece.run.path.parent / "replaced"
    aside.mkdir(exist_ok=True)
    number = 1
    while (kept := aside / f"{piece.name}-{number}").exists():
        number += 1
    piece.run.path.rename(kept)
    return kept


def _train(piece: Piece, children: Children, place: Place | None, say: Any) -> str:
    """Run or resume a training; returns why it failed, or nothing."""
    return children.train(piece, {**os.environ, **(place.environment if place else {})}, say)


def _evaluate(experiment: Experiment, piece: Piece, card: str, place: Place | None) -> None:
    """Measure a curve, and give it to the tracker."""
    if place is None:
        with progress_line(f"  {piece.name} on {card}", plain_every=SHOW_EVERY) as on_progress:
            measure_piece(experiment, piece, card, on_progress)
        record_piece(experiment, piece, [card])
    else:
        place.run(measure_piece, experiment, piece, card)
        with place.one_at_a_time:
            record_piece(experiment, piece, [card])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
