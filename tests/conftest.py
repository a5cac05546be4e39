"""What the tests share: few threads, no network, and ``anyflow`` run in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from small_models import as_wan, make_model, wan22_vae

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
        command = [sys.executable, "-m", "anyflow", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(project)}
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment, stdin=subprocess.DEVNULL
        )

    return run


Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serve(project: Path) -> Serve:
    """``with serve("-m", "mlflow", "server") as address:`` runs a Python program that listens on a free port."""

    @contextmanager
    def serving(*words: str, cwd: Path = project, patience: float = 240) -> Iterator[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, *words, "--port", str(port)],
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(project)},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + patience
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)

    return serving


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Debian's chromium without a window; the test is skipped where there is none."""
    from looking import open_browser

    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained pipeline folder that loads in a moment: the embedded layout, two layers, random weights."""
    return make_model(tmp_path_factory.mktemp("models") / "small", "bidirectional")


@pytest.fixture(scope="session")
def small_causal_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, chunk by chunk."""
    return make_model(tmp_path_factory.mktemp("models") / "small-causal", "causal", chunk_partition=[1, 2, 2])


@pytest.fixture(scope="session")
def small_wan22(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained folder in the layout of Wan 2.2's TI2V-5B, as it is published."""
    folder = tmp_path_factory.mktemp("models") / "wan22"
    return as_wan(make_model(folder, "bidirectional", vae=wan22_vae()), expand_timesteps=True)
