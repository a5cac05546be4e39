"""The real command line, in a process of its own or in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from forked import Forked
from typer.testing import CliRunner


def command(*words: str) -> list[str]:
    """As a user's shell would start it, imports and all."""
    return [sys.executable, "-m", "anyflow", *words]


def environment() -> dict[str, str]:
    """One thread: the tests share the machine, and sums keep their order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def start(*words: str, program: str = "", own_group: bool = False) -> Forked:
    """Start ``anyflow words...``, or a program that is given the words."""
    return Forked(words, environment(), program, own_group)


def run(*words: str, program: str = "", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``anyflow words...``, or a program that is given the words, to its end."""
    process = start(*words, program=program)
    written, said = (stream.decode() for stream in process.communicate(timeout))
    assert process.returncode is not None
    return subprocess.CompletedProcess(words, process.returncode, written, said)


def here(*words: str) -> Any:
    """Run ``anyflow words...`` in this process: what it said, or its error raised."""
    done = CliRunner().invoke(_app(), list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def call(*words: str) -> str:
    """What ``anyflow words...`` prints on stdout, in this process; its own exceptions come through."""
    done = here(*words)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def _app() -> Any:
    from anyflow.cli.main import app

    return app


def state_after(out: Path, steps: int) -> dict[str, Any]:
    """The tensors of a run's newest checkpoint, which is of that many steps."""
    import torch

    from anyflow.tracking.checkpoints import latest_checkpoint

    path = latest_checkpoint(out / "checkpoints")
    assert path is not None
    loaded = torch.load(path, weights_only=True)
    assert loaded["anyflow"]["step"] == steps
    return loaded["state_dict"]
