"""What the tests share: few threads, no network, and ``anyflow`` run in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

PROJECT = Path(__file__).resolve().parents[1]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def project() -> Path:
    """The repository's root."""
    return PROJECT


@pytest.fixture
def anyflow(project: Path) -> Run:
    """``anyflow("train", "finetune/driving", cwd=...)``; it runs in the repository's root by default."""

    def run(*arguments: str, cwd: Path = project, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "anyflow.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(project)}
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment, stdin=subprocess.DEVNULL
        )

    return run
