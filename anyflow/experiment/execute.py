"""Running what is missing of an experiment: a training in a process of its own, then its curves, piece by piece.

Whatever stops it, the same command goes on: finished pieces stay, a training that was cut resumes from its checkpoint.
A piece whose recipe, data or start has changed is done again, and what was there is kept in ``replaced/``.
"""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from anyflow.callbacks.checkpoints import write_atomically
from anyflow.callbacks.progress import clock
from anyflow.console import progress_line, quiet_libraries
from anyflow.data.locks import locked
from anyflow.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER, UserError
from anyflow.experiment.jobs import Job, curve_state, jobs_of, left, measured_on, training_of, with_speeds
from anyflow.experiment.pieces import Piece, curve_folder, read_curve
from anyflow.experiment.schema import Experiment
from anyflow.tracking import record_curves

SHOW_EVERY = 20.0
"""Seconds between two lines about a training that goes on."""


class Stopped(Exception):
    """A signal came; ``code`` is the exit code that says so."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_pieces(experiment: Experiment, pieces: Sequence[Piece]) -> dict[str, str]:
    """Do everything that is missing; returns what failed: the piece's name and why.

    Raises:
        UserError: another process is at this experiment.
        Stopped: SIGTERM or Ctrl-C; everything so far is kept.
    """
    quiet_libraries()
    home = pieces[0].run.path.parent
    home.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    try:
        with locked(home / ".lock", patience=0) as lock, _terminable():
            jobs = jobs_of(experiment, pieces)
            _say(f"experiment {experiment.name}: {len(jobs)} pieces of work, {left(jobs, clock)}")
            todo = [job for job in jobs if job.state != "done"]
            for index, job in enumerate(todo):
                _do(experiment, job, failed, lock)
                rest = [later for later in todo[index + 1 :] if later.piece.name not in failed]
                _say(f"  {left(with_speeds(experiment, pieces, rest), clock)}")
    except BlockingIOError:
        raise UserError(
            f"another process is at experiment {experiment.name}, or a training of it still runs: wait for its end"
        ) from None
    except KeyboardInterrupt:
        raise Stopped(EXIT_INTERRUPTED) from None
    return failed


def _do(experiment: Experiment, job: Job, failed: dict[str, str], lock: TextIO) -> None:
    """One training or curve, looked at once more: what it needs may have failed, or come out as it was before."""
    piece = job.piece
    if piece.name in failed:
        return
    for needed in piece.needs:
        if needed in failed:
            failed[piece.name] = f"it needs {needed}"
            return
    state, reason = training_of(piece) if job.is_training else curve_state(experiment, piece, job.card)
    if state == "done":
        return
    _say(f"{job.title}{' (goes on)' if state == 'cut' else ''}")
    if state == "changed":
        _say(f"  is done again: {reason}")
    began = time.monotonic()
    if job.is_training:
        if state == "changed":
            _replace(piece)
        why = _train(piece, lock)
        if why:
            failed[piece.name] = why
            _say(f"  failed: {why}")
            return
    else:
        _evaluate(experiment, piece, job.card)
    _say(f"  done in {clock(time.monotonic() - began)}")


def _replace(piece: Piece) -> None:
    """Put a folder aside, under a name that is free."""
    aside = piece.run.path.parent / "replaced"
    aside.mkdir(exist_ok=True)
    number = 1
    while (kept := aside / f"{piece.name}-{number}").exists():
        number += 1
    piece.run.path.rename(kept)
    _say(f"  what was there is kept in {kept}")


def _train(piece: Piece, lock: TextIO) -> str:
    """Run or resume a training by the command that a user would type; returns why it failed, or nothing.

    The process has its output in a file and holds the experiment's lock: it survives this one.
    """
    words = ["train", *piece.words, "--out", str(piece.run.path), "--resume", "auto"]
    piece.run.path.parent.mkdir(parents=True, exist_ok=True)
    log = piece.run.path.parent / f"{piece.name}.log"
    began = time.monotonic()
    with open(log, "ab") as sink:
        start = sink.tell()
        command = [sys.executable, "-m", "anyflow.cli", *words]
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=sink,
            stdin=subprocess.DEVNULL,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # a Ctrl-C comes to it from here alone, once
        )
        try:
            code = _follow(process, log, start)
        except (KeyboardInterrupt, Stopped) as stop:
            process.send_signal(signal.SIGTERM if isinstance(stop, Stopped) else signal.SIGINT)
            process.wait()
            raise
        finally:
            if piece.run.path.is_dir():
                spent = piece.run.status.get("train_seconds", 0.0) + time.monotonic() - began
                piece.run.note(train_seconds=round(spent, 1))
    if code in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
        raise Stopped(code)
    if code == 0:
        return ""
    last = next((line for line in reversed(_lines(log, start)) if line.strip()), "no output").strip()
    told = last if code == EXIT_USER else f"exit code {code}, see {log}: {last}"
    return told.removeprefix("anyflow: ")


def _follow(process: subprocess.Popen[bytes], log: Path, start: int) -> int:
    """Wait for a training, and show now and then where it is."""
    shown, newest = time.monotonic(), ""
    while process.poll() is None:
        time.sleep(0.2)
        if time.monotonic() - shown > SHOW_EVERY:
            shown = time.monotonic()
            told = next((line.strip() for line in reversed(_lines(log, start)) if line.endswith(" left")), newest)
            if told != newest:
                newest = told
                _say(f"  {newest}")
    return process.returncode


def _lines(log: Path, start: int) -> list[str]:
    with open(log, "rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()


def _evaluate(experiment: Experiment, piece: Piece, card: str) -> None:
    """Measure the any-step curve of a piece on a card, keep it, and give it to the tracker."""
    from anyflow.backbone.load import read_sampler
    from anyflow.commands.models import load_model, native_shape
    from anyflow.curves import curve_of, save_curve

    began, settings = time.monotonic(), experiment.evaluation
    stands_on = measured_on(experiment, piece, card)
    shape = native_shape(piece.model, frames=None, height=None, width=None, fps=None)
    codec, backbone, shift = load_model(piece.model)
    with progress_line(f"  {piece.name} on {card}", plain_every=SHOW_EVERY) as on_progress:
        result = curve_of(
            backbone,
            codec,
            [card],
            shape,
            prompts=settings.prompts,
            steps=settings.steps,
            shift=shift,
            seeds=(piece.seed,),
            sampler=read_sampler(piece.model),
            label=Path(card).stem,
            split=settings.split,
            given_frames=piece.given_frames,
            batch_size=settings.batch_size,
            on_progress=on_progress,
        )
    del codec, backbone
    gc.collect()
    folder = curve_folder(piece)
    folder.mkdir(parents=True, exist_ok=True)
    if piece.seed == experiment.seeds_of(piece.arm)[0]:  # one seed's samples make the picture
        save_curve(folder, result)
    seconds = round(time.monotonic() - began, 1)
    found = {"curve": result.curve.to_json(), "measured_on": stands_on, "seconds": seconds}
    write_atomically(folder / f"{Path(card).stem}.json", json.dumps(found, indent=1) + "\n")
    record_piece(experiment, piece, [card])


def record_piece(experiment: Experiment, piece: Piece, cards: Sequence[str]) -> None:
    """Give curves of a piece to the tracker: named ``after`` as a training's, or ``after/CARD`` if it has several."""
    found = {card: read_curve(piece, card) for card in cards}
    rows = {card: document["curve"]["rows"] for card, document in found.items() if document is not None}
    several = len(piece.cards) > 1
    record_curves(
        piece.run,
        uri=piece.tracking_uri,
        experiment=experiment.name,
        curves={f"after/{Path(card).stem}" if several else "after": curve for card, curve in rows.items()},
        tags={"anyflow.arm": piece.arm, "anyflow.seed": str(piece.seed), "anyflow.cards": " ".join(piece.cards)},
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM raises :class:`Stopped`."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(EXIT_PREEMPTED)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
