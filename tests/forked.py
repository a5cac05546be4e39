"""Processes that begin with the libraries loaded: a server imports them once, and each process is forked from it.

They are processes like any other, with a group, signals and an end of their own; each saves four seconds of imports.
What happens while libraries are imported is tested by processes that really import them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

PROJECT = Path(__file__).resolve().parents[1]
LOADED = ("torch", "lightning.pytorch", "transformers", "diffusers", "anyflow.training.launch", "anyflow.cli.main")


def _context() -> Any:
    """The server's, which it starts with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    with patch.dict(os.environ, {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def on_ranks(function: Callable[..., None], arguments: Sequence[Any], ranks: int = 2) -> None:
    """``function(rank, *arguments)`` in a process a rank; raises what one of them has raised."""
    import torch

    _context()
    torch.multiprocessing.start_processes(function, tuple(arguments), nprocs=ranks, start_method="forkserver")


class Forked:
    """A program in a process of its own, as ``subprocess.Popen`` would start it.

    Args:
        words: the command line after ``anyflow``, or after the program.
        environment: its variables.
        program: Python source instead of the command line's.
        own_group: begin a session.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], program: str = "", own_group: bool = False
    ) -> None:
        self._outputs = tempfile.TemporaryDirectory(prefix="anyflow-forked-")
        given = (self._outputs.name, os.getcwd(), list(words), dict(environment), program, own_group)
        self._process = _context().Process(target=_run, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Wait for its end; what it wrote to stdout and stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("anyflow", timeout or 0)
        return self._written("stdout"), self._written("stderr")

    def _written(self, stream: str) -> bytes:
        return (Path(self._outputs.name) / stream).read_bytes()


def _run(outputs: str, folder: str, words: list[str], environment: dict[str, str], program: str, own: bool) -> None:
    if own:
        os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{outputs}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["anyflow", *words]
    if program:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    else:
        from anyflow.cli.main import main

        main()
