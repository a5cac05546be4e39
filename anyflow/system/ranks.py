"""Several ranks from one command: start them, watch them, and end all of them when one fails.

``anyflow train`` with a recipe of several devices becomes this watcher, which starts itself once for each device with
torchrun's variables. A rank that is under torchrun already trains at once. Over several nodes the same command is
started once on each node; ``MASTER_ADDR`` names the first and ``NODE_RANK`` (or SLURM) counts them.

Without a watcher a dead rank leaves the others waiting in a collective for half an hour, and each then reports an error
of its own. Here the first failure is the report, and the others are ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from anyflow.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER, UserError
from anyflow.system.files import write_atomically
from anyflow.system.processes import Process, Processes

REPORT = "ANYFLOW_RANK_REPORT"
"""The file that a watched rank leaves its last words in, instead of the screen."""

RESUME = "go on from the last checkpoint by the same command with --resume auto"

PLACE = "run"
"""The file beside the reports that names the run's folder."""

GRACE_SECONDS = 8.0
"""How long the other ranks may take to end by themselves once one has failed."""


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where PyTorch looks for settings of its GPU memory."""


def expand_segments() -> None:
    """Let PyTorch's GPU memory grow in place, here and in every process that this one starts.

    Clips of several shapes, encoding and sampling between steps ask for blocks of many sizes, and fixed segments leave
    gaps among them. It must be said before torch is imported; what the user has set is left alone.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def needs_watcher(world_size: int) -> bool:
    """Whether this process is to start ranks rather than to be one."""
    return world_size > 1 and "RANK" not in os.environ


def watch(devices: int, nodes: int, again: str = RESUME) -> int:
    """Run this very command as ``devices`` ranks; returns the exit code that the user sees.

    SIGTERM and Ctrl-C are passed on: the ranks save themselves and say how to go on. ``again`` says it for a rank that
    has failed.

    Raises:
        UserError: a run over several nodes does not say which node this is, or where the first one is.
    """
    node = _node(nodes)
    _clear_dead_watchers()  # reports and logs alone, which are small: what is large lies beside its place
    with tempfile.TemporaryDirectory(prefix=f"{_FOLDER}{os.getpid()}-") as folder:
        shared = {
            "WORLD_SIZE": str(devices * nodes),
            "LOCAL_WORLD_SIZE": str(devices),
            "GROUP_RANK": str(node),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
            "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_free_port()),
            "ANYFLOW_WATCHER": str(os.getpid()),
        }
        processes, ranks = Processes(), list[_Rank]()
        try:
            with processes.hearing():
                for local in range(devices):
                    ranks += _started(processes, node * devices + local, local, Path(folder), shared)
                code = _wait(ranks, devices * nodes, again, processes.passed)
        finally:
            processes.end()
        if code:
            _note_end(Path(folder), code)
        return code


def end_with_watcher() -> None:
    """Let the system end this rank if its watcher dies: nobody would stop it then, and it holds a device."""
    watcher = os.environ.get("ANYFLOW_WATCHER")
    if watcher is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(watcher):  # it died before we asked
        os._exit(1)


def leave_place(run: Path) -> None:
    """Leave the watcher, if there is one, the run's place: a rank that is killed cannot note its end."""
    place = os.environ.get(REPORT)
    if place is not None:
        with suppress(OSError):  # the folder for temporary files may be full
            (Path(place).parent / PLACE).write_text(str(run.resolve()), encoding="utf-8")


def leave_report(text: str | None = None) -> bool:
    """A failing rank's last words, for its watcher: ``text`` or the current traceback; False if they cannot be left."""
    place = os.environ.get(REPORT)
    if place is None:
        return False
    with suppress(OSError):  # the folder for temporary files may be full: then they go to the screen
        Path(place).write_text(text if text is not None else traceback.format_exc(), encoding="utf-8")
        return True
    return False


@dataclass(frozen=True)
class _Rank:
    number: int
    process: Process
    report: Path
    log: Path

    def last_words(self) -> str:
        for path in (self.report, self.log):
            text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
            if text:
                return "\n".join(text.split("\n")[-30:])
        return ""


def _started(processes: Processes, number: int, local: int, folder: Path, shared: dict[str, str]) -> Iterator[_Rank]:
    """A rank that begins; none where a signal came before."""
    report, log = folder / f"rank-{number}.report", folder / f"rank-{number}.log"
    own = {**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(local), REPORT: str(report)}
    command = [sys.executable, "-m", "anyflow", *sys.argv[1:]]
    with open(log, "wb") as file:
        streams = {} if number == 0 else {"stdout": subprocess.DEVNULL, "stderr": file}
        process = processes.start(command, env=own, stdin=subprocess.DEVNULL, **streams)
    if process is not None:
        yield _Rank(number, process, report, log)


_FOLDER = "anyflow-ranks-"


def _clear_dead_watchers() -> None:
    """Remove the reports of watchers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        watcher = folder.name.removeprefix(_FOLDER).partition("-")[0]
        if watcher.isdigit() and not Path(f"/proc/{watcher}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _note_end(folder: Path, code: int) -> None:
    """Say in the run's folder how it ended, where the rank that does so was ended before it could."""
    with suppress(OSError, ValueError):
        status = Path((folder / PLACE).read_text(encoding="utf-8")) / "status.json"
        known = json.loads(status.read_text(encoding="utf-8"))
        if known.get("state") == "running":
            state = {EXIT_PREEMPTED: "preempted", EXIT_INTERRUPTED: "interrupted"}.get(code, "failed")
            write_atomically(status, json.dumps({**known, "state": state}, indent=2) + "\n")


def _wait(ranks: list[_Rank], world_size: int, again: str, passed: Sequence[int] = ()) -> int:
    failed: _Rank | None = None
    deadline = float("inf")
    while any(rank.process.poll() is None for rank in ranks) and time.monotonic() < deadline:
        gone = [rank for rank in ranks if rank.process.poll()]
        if failed is None and gone:
            failed = min(gone, key=lambda rank: rank.process.returncode)  # a signal's code is negative: it came first
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.1)
    gone = [rank for rank in ranks if rank.process.poll()]
    if passed and (not ranks or any(_was_stopped(rank, passed) for rank in gone)):
        # the others may have failed for want of those that went, or hung in a collective with them
        return EXIT_INTERRUPTED if passed[0] == signal.SIGINT else EXIT_PREEMPTED
    failed = failed or min(gone, key=lambda rank: rank.process.returncode, default=None)
    if failed is None:
        return 0
    code = failed.process.returncode
    words = failed.last_words()
    if code == EXIT_USER and words:
        print(words if failed.number == 0 else f"{words} (rank {failed.number} of {world_size})", file=sys.stderr)
    elif code < 0 or code == 1:
        print(_report(failed, world_size, words, again), file=sys.stderr)
    return code if code > 0 else 128 - code


def _was_stopped(rank: _Rank, passed: Sequence[int]) -> bool:
    return rank.process.returncode in (EXIT_PREEMPTED, EXIT_INTERRUPTED, *(-number for number in passed))


def _report(failed: _Rank, world_size: int, words: str, again: str) -> str:
    code = failed.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
    hint = " (out of memory, or somebody's kill)" if code == -signal.SIGKILL else ""
    lines = [
        f"anyflow: rank {failed.number} of {world_size} on {socket.gethostname()} {how}{hint}; "
        f"the other ranks were stopped. {again[0].upper()}{again[1:]}"
    ]
    return "\n".join(lines + ([f"Its last words:\n{words}"] if words else []))


def _node(nodes: int) -> int:
    if nodes == 1:
        return 0
    for name in ("NODE_RANK", "GROUP_RANK", "SLURM_NODEID"):
        if name in os.environ and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            return int(os.environ[name])
    raise UserError(
        f"hardware.num_nodes={nodes}: this node's number and the first node's address are not set; start the command "
        "by torchrun or SLURM (recipes/hardware/slurm.sh), or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
