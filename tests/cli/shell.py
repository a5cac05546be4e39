"""The real command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def command(*words: str) -> list[str]:
    """The real command line, as a user's shell would start it."""
    return [sys.executable, "-m", "anyflow", *words]


def environment() -> dict[str, str]:
    """One thread: the tests share the machine, and sums keep their order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``anyflow words...`` to its end."""
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout, env=environment())
