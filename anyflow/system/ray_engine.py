"""The workers of a Ray cluster: one actor for each CPU, or for each GPU where the work is a network's.

Ray starts, watches and reaches them; what they do and who does it again is decided in
:mod:`anyflow.system.engines`. They find footage and results under the same paths as this process, on a disk that all
machines share. Whoever may talk to a cluster may run code on it, so one without a token is refused.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Hashable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anyflow.errors import UserError, first_line
from anyflow.system.engines import Results, Staff, Work, WorkerLost, map_by
from anyflow.system.pool import Hand

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")
"""Variables of this process that its workers take over: they decide what is computed, and with how many threads."""

PACKAGES = ("torch", "av", "numpy")
"""Whose versions must be the same everywhere, as the code must, for the same bytes."""

PATIENCE = 2.0
"""Seconds between two looks at the cluster for machines that have come."""

MARKER = ".seen-"
"""How a file begins that workers must find in the folder that they write in: only one disk has it."""

TOLD_AFTER = 60.0
"""Seconds without any worker after which the user is told what is waited for."""

MAX_FAILED_STARTS = 3
"""Workers that may be lost one after another before any of them has begun."""

RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_NUM_REDIS_GET_RETRIES": "3",
    "RAY_py_gcs_connect_timeout_s": "10",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Of Ray in this process, unless the user has set them: tokens, and no waiting for what does not answer."""

_IS_OPEN = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"


class RayEngine:
    """The workers of a running cluster, which this machine must belong to.

    Args:
        address: its head's, ``HOST:PORT``; ``auto`` finds the one of this machine.

    Raises:
        UserError: there is none, it refuses this process's token, or it asks for none.
    """

    def __init__(self, address: str) -> None:
        _connect(address)

    @property
    def is_here(self) -> bool:
        """This process only hands the work out."""
        return False

    def workers(self, gpu: bool = False) -> int:
        """Tasks that are done at a time, if nobody else uses the cluster."""
        import ray

        return int(ray.cluster_resources().get("GPU" if gpu and self.has_gpus() else "CPU", 0))

    def has_gpus(self) -> bool:
        """Whether a machine of the cluster has GPUs."""
        import ray

        return ray.cluster_resources().get("GPU", 0) >= 1

    def map_unordered(self, work: Work, tasks: Sequence[Any]) -> Results:
        """The end of every task, as they come.

        Raises:
            UserError: workers cannot start, or do not see what this process sees.
        """
        return map_by(self.staff(work, len(tasks)), tasks)

    def staff(self, work: Work, most: int) -> Staff:
        """Workers for several lists of tasks."""
        return _Actors(self, work, most)


class _Worker:
    """An actor's side."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def problem(self, seen: Sequence[str], versions: dict[str, str]) -> str:
        """What keeps this worker from working, in words; empty: nothing."""
        missing = [path for path in (self.folder, *seen) if not os.path.exists(path)]
        marked = [os.path.dirname(path) if os.path.basename(path).startswith(MARKER) else path for path in missing]
        here = _versions()
        other = [name for name in versions if versions[name] != here[name]]
        if missing:
            what = f"cannot see {marked[0]}: workers need the same paths as this machine, on a disk that all share"
        elif other:
            told = " and ".join(f"{name} {here[name]} instead of {versions[name]}" for name in other)
            what = f"has {told}: install the same versions on every machine"
        else:
            os.chdir(self.folder)
            return ""
        return f"--engine ray: the worker on {os.uname().nodename} {what}"

    def prepare(self, work: Work) -> None:
        """Take the work on."""
        self.hand = Hand(work)

    def do(self, task: Any) -> tuple[Any, Exception | None]:
        """(value, error) of a task."""
        try:
            return self.hand.do(task), None
        except (UserError, OSError) as error:
            return None, error
        except Exception as error:  # of a class that this process may not know
            return None, RuntimeError("".join(traceback.format_exception(error)))


class _Actors:
    """A staff of actors. New machines get workers while the work goes on."""

    def __init__(self, engine: RayEngine, work: Work, tasks: int) -> None:
        self._engine, self._work, self._most = engine, work, tasks
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[Any, Any] = {}
        self._failed_starts, self._since, self._looked = 0, time.monotonic(), 0.0
        self._marker = None if work.writes is None else work.writes.absolute() / f"{MARKER}{uuid.uuid4().hex}"
        if self._marker is not None:
            self._marker.touch()  # another disk may have a folder of that name
        self._seen = [str(path.absolute()) for path in (self._marker, *work.sees) if path is not None]
        self._hire()

    def start(self, task: Any) -> Hashable | None:
        if not self._idle:
            return None
        worker = self._idle.pop()
        handle = worker.do.remote(task)
        self._busy[handle] = worker
        return handle

    def finished(self) -> list[tuple[Hashable, Any, Exception | None]]:
        import ray

        refs = [*self._busy, *self._starting]
        ready: list[Any] = []
        if refs:
            ready, _ = ray.wait(refs, num_returns=1, timeout=PATIENCE)
        else:
            time.sleep(PATIENCE)
        ended: list[tuple[Hashable, Any, Exception | None]] = []
        for ref in ready:
            if ref in self._starting:
                self._begin(ref, self._starting.pop(ref))
                continue
            worker = self._busy.pop(ref)
            try:
                value, error = ray.get(ref)
            except ray.exceptions.RayTaskError as failure:  # what it was given, or made, cannot be sent
                value, error = None, RuntimeError(_cause(failure))
            except ray.exceptions.RayError:
                value, error = None, WorkerLost()
            if self._work.fresh or isinstance(error, WorkerLost):
                ray.kill(worker)
                self._looked = 0.0
            else:
                self._idle.append(worker)
            ended.append((ref, value, error))
        if ended or self._idle or self._busy:
            self._since = time.monotonic()
        self._hire()
        return ended

    def close(self) -> None:
        import ray

        for worker in (*self._idle, *self._busy.values(), *self._starting.values()):
            ray.kill(worker)
        if self._marker is not None:
            self._marker.unlink(missing_ok=True)

    def _begin(self, ref: Any, worker: Any) -> None:
        """A worker's first answers: it is asked whether it can work, then given the work."""
        import ray

        try:
            answer = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise UserError(
                f"--engine ray: a worker cannot begin ({_cause(error)}): is the same code there?"
            ) from error
        except ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts == MAX_FAILED_STARTS:
                raise UserError(f"--engine ray: workers die when they start ({_cause(error)})") from error
            return
        if answer:
            raise UserError(answer)
        if answer is None:  # it has the work
            self._failed_starts = 0
            self._idle.append(worker)
        else:
            self._starting[worker.prepare.remote(self._work)] = worker

    def _hire(self) -> None:
        """Ask for as many workers as the cluster has places for, and no more than there are tasks."""
        import ray

        if time.monotonic() - self._looked < PATIENCE:
            return
        self._looked = time.monotonic()
        gpus = int(self._work.gpu and self._engine.has_gpus())
        here = len(self._idle) + len(self._busy) + len(self._starting)
        for _ in range(here, min(self._engine.workers(self._work.gpu), self._most)):
            kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": _settings()})(_Worker)
            worker: Any = kind.remote(os.getcwd())
            self._starting[worker.problem.remote(self._seen, _versions())] = worker
        if time.monotonic() - self._since > TOLD_AFTER:
            self._since = float("inf")
            print("waiting: no worker of the cluster is free yet, or they are gone (ray status)", file=sys.stderr)


def _connect(address: str) -> None:
    """Join a running cluster as one who gives work.

    Raises:
        UserError: there is none, it refuses this process's token, or it asks for none.
    """
    how = "start one (docs/cluster.md), or give --address HOST:PORT of its head, from a machine of the cluster"
    if address != "auto":
        _require_door(address, how)
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)  # read when Ray is imported
    import ray

    if ray.is_initialized():
        return
    listening = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:
        if isinstance(error, ray.exceptions.AuthenticationError) or "InvalidAuthToken" in str(error.__cause__):
            what, how = "this machine's token is not the cluster's", "copy ~/.ray/auth_token from its head"
        else:
            what = f"no cluster takes this process at {address!r} ({first_line(error)})"
        raise UserError(f"--engine ray: {what}: {how}") from error
    finally:
        signal.signal(signal.SIGTERM, listening)  # Ray sets its own
    _require_token(ray.get_runtime_context().gcs_address)


def _require_door(address: str, how: str) -> None:
    """Refuse an address where nobody listens: Ray itself would wait for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--address {address!r} is not HOST:PORT: give for example --address 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"--address {address}: nobody answers ({error.strerror or error}): {how}") from error


def _require_token(address: str) -> None:
    """Refuse a cluster that answers to whoever asks, unless the user has said that it may."""
    if os.environ["RAY_AUTH_MODE"].lower() != "token":
        return
    ask = [sys.executable, "-c", _IS_OPEN, address]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    if subprocess.run(ask, env=environment, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0:
        raise UserError(
            f"--engine ray: the cluster at {address} asks for no token, so whoever reaches it can run code on it: "
            "start it again with RAY_AUTH_MODE=token on every machine (docs/cluster.md), or set RAY_AUTH_MODE=disabled "
            "here if its network is closed"
        )


def _settings() -> dict[str, str]:
    """The environment of workers: this code, wherever it lies, and the settings of this process."""
    own = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return {**own, "PYTHONPATH": str(Path(__file__).parents[2])}


def _versions() -> dict[str, str]:
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return {"anyflow's code": code.hexdigest()[:12], **{name: version(name) for name in PACKAGES}}


def _cause(error: BaseException) -> str:
    """What a failure of Ray's comes from, in a line."""
    lines = [line for line in str(error).split("\n") if line.strip()]
    return lines[-1].strip() if lines else first_line(error)
