"""A training as a process of its own: the command that a user would type, its output in a file."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from anyflow.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER
from anyflow.experiment.pieces import Piece
from anyflow.system.processes import Process, Processes

SHOW_EVERY = 20.0
"""Seconds between two lines about a running training."""
PROGRESS = re.compile(r" left$|^(encoding|sampling) .*\d+/\d+")
"""Lines of a training's output that show its progress."""


class Stopped(Exception):
    """A signal came; ``code`` is the exit code that says so."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Children:
    """The trainings that run, so that a signal reaches all of them."""

    def __init__(self, lock: TextIO) -> None:
        """``lock`` is handed to each of them: it is held until the last has ended."""
        self._lock = lock
        self._processes = Processes()

    def train(self, piece: Piece, environment: Mapping[str, str], say: Callable[[str], None]) -> str:
        """Run or resume a training; returns why it failed, or nothing.

        Raises:
            Stopped: It was asked to stop; what it has done is saved.
        """
        words = ["train", *piece.words, "--out", str(piece.run.path), "--resume", "auto"]
        piece.run.path.parent.mkdir(parents=True, exist_ok=True)
        log = piece.run.path.parent / f"{piece.name}.log"
        began = time.monotonic()
        with open(log, "ab") as sink:
            start = sink.tell()
            try:
                process = self._processes.start(
                    [sys.executable, "-m", "anyflow", *words],
                    stdout=sink,
                    stderr=sink,
                    stdin=subprocess.DEVNULL,
                    env=dict(environment),
                    pass_fds=[self._lock.fileno()],
                )
                if process is None:
                    raise Stopped(EXIT_INTERRUPTED)
                code = _follow(process, log, start, say)
            except (KeyboardInterrupt, Stopped) as stop:
                self.stop(stop)
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

    def stop(self, reason: KeyboardInterrupt | Stopped) -> None:
        """Have all of them save and end, and wait for it; none is started any more."""
        if not self._processes.passed:
            self._processes.pass_on(signal.SIGTERM if isinstance(reason, Stopped) else signal.SIGINT)
        self._processes.wait()


def _follow(process: Process, log: Path, start: int, say: Callable[[str], None]) -> int:
    """Wait for a training, and show now and then where it is."""
    shown, newest = time.monotonic(), ""
    while process.poll() is None:
        time.sleep(0.2)
        if time.monotonic() - shown > SHOW_EVERY:
            shown = time.monotonic()
            told = next((line.strip() for line in reversed(_lines(log, start)) if PROGRESS.search(line)), newest)
            if told != newest:
                newest = told
                say(newest)
    return process.returncode


def _lines(log: Path, start: int) -> list[str]:
    with open(log, "rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").replace("\r", "\n").split("\n")
