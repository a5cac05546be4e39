"""Processes that this one starts and answers for: signals are passed on to them, and they end with all they started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from anyflow.system.signals import STOPPING

Process = subprocess.Popen[bytes]


def begin(command: Sequence[str], **options: Any) -> Process:
    """Start a process in a session of its own: Ctrl-C reaches it from here alone. ``options`` are ``Popen``'s."""
    return subprocess.Popen(command, start_new_session=True, **options)


def end(process: Process, grace: float = 0.0) -> None:
    """End a process and all of its session: by SIGTERM if there are seconds of grace, then by SIGKILL."""
    with suppress(subprocess.TimeoutExpired):
        if grace:
            _signal(process, signal.SIGTERM)
            process.wait(grace)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: Process, number: int) -> None:
    with suppress(ProcessLookupError):  # nobody of its session is left
        os.killpg(process.pid, number)


class Processes:
    """Several processes, all of which hear the same signals and end together.

    Attributes:
        passed: the signals that were passed on; once there is one, nothing is started any more.
    """

    def __init__(self) -> None:
        self.passed: list[int] = []
        self._started: list[Process] = []
        self._guard = threading.RLock()  # a signal's handler may interrupt start

    def start(self, command: Sequence[str], **options: Any) -> Process | None:
        """Start a process as :func:`begin` does; None if a signal was passed on already."""
        with self._guard:
            if self.passed:
                return None
            process = begin(command, **options)
            self._started.append(process)
            if self.passed:  # a signal came meanwhile
                process.send_signal(self.passed[-1])
            return process

    def pass_on(self, number: int) -> None:
        """Send a signal to each process that runs, which passes it on to what it started itself."""
        with self._guard:
            self.passed.append(number)
            for process in self._started:
                if process.poll() is None:
                    process.send_signal(number)

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Within the block, which the main thread runs, SIGTERM and Ctrl-C are passed on."""
        previous = {number: signal.signal(number, lambda got, frame: self.pass_on(got)) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wait(self) -> None:
        """Wait until all have ended."""
        for process in self._started:
            process.wait()

    def end(self) -> None:
        """Kill what still runs of all of them."""
        for process in self._started:
            end(process)
