"""The children: one an item, with a limit of time; whatever becomes of one, its line says so and the others run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.doctor.child import FOUND
from anyflow.doctor.findings import read_findings
from anyflow.doctor.items import MACHINE, TINY, Item
from anyflow.system.places import PROJECT
from anyflow.system.processes import begin, end

LAST_WORDS = 15
"""Lines of a failed child that are shown."""


def examine(items: Sequence[Item], minutes: float) -> Iterator[dict[str, Any]]:
    """Run the items one after another and yield what each found, the machine first.

    Args:
        items: what to examine, besides the machine.
        minutes: the time for all; an item that does not fit any more is left out.

    Yields:
        ``item``, ``ok`` (None: left out), ``seconds``, ``machine`` (all but the first), figures, and ``wrong``,
        ``advice`` and ``left_out`` where there is any.
    """
    ends = time.monotonic() + 60 * minutes
    machine = _examined(MACHINE, False, ends)
    yield machine
    gpus = int(machine.get("gpus") or 0)
    label = {name: machine[name] for name in ("device", "torch", "anyflow") if name in machine}
    for item in items:
        yield {**_examined(item, gpus > 0, ends, gpus), "machine": label}


def _examined(item: Item, is_gpu: bool, ends: float, gpus: int = 0) -> dict[str, Any]:
    left = ends - time.monotonic()
    if gpus < item.gpus:
        return _left_out(item, f"needs {item.gpus} GPUs, and here {'is' if gpus == 1 else 'are'} {gpus}")
    if left < item.expected(is_gpu) and item is not MACHINE:
        words = f"takes about {item.expected(is_gpu):.0f} s, and {max(left, 0):.0f} s are left: give more --minutes"
        return _left_out(item, words)
    limit = item.limit(is_gpu)
    is_cut_short = left < limit and item is not MACHINE
    print(f"{item.name} ...", file=sys.stderr, flush=True)
    ended = _run(item, min(limit, left) if is_cut_short else limit)
    line = {"item": item.name, "ok": not ended.found.get("wrong"), "seconds": round(ended.seconds, 1), **ended.found}
    if ended.code is None and is_cut_short:
        out = {"the rest": f"the time was over after {ended.seconds:.0f} s: give more --minutes"}
        ok = False if ended.found.get("wrong") else None
        return {**line, "ok": ok, "left_out": {**line.get("left_out", {}), **out}}
    sentence = _what_became(ended, limit, item)
    if sentence is not None:
        line = {**line, "ok": False, "wrong": [*line.get("wrong", []), sentence]}
    if ended.code != 0 and ended.last_words:
        print(ended.last_words, file=sys.stderr, flush=True)
    return line


def _left_out(item: Item, why: str) -> dict[str, Any]:
    return {"item": item.name, "ok": None, "seconds": 0.0, "left_out": {item.name: why}}


@dataclass(frozen=True)
class _Ended:
    """How a child ended: its exit code, None if it was ended from here; what it found; its output's end."""

    code: int | None
    seconds: float
    found: dict[str, Any]
    last_words: str


def _what_became(ended: _Ended, limit: float, item: Item) -> str | None:
    """What went wrong with the process itself, and what to do about it; None if nothing did."""
    again = f"try it alone by anyflow doctor --only {item.name}"
    if ended.code is None:
        return f"did not end within {limit:.0f} s and was stopped: {again}, on a machine that does nothing else"
    if ended.code == -signal.SIGKILL:
        return f"was killed, most likely because the machine's memory ran out: free some, and {again}"
    if ended.code < 0:
        return f"crashed by {signal.Signals(-ended.code).name}: {again}, and see whether torch and the driver agree"
    if ended.code and not ended.found.get("wrong"):
        return f"ended with exit code {ended.code}: {again} and read its last words"
    return None


def _run(item: Item, limit: float) -> _Ended:
    """Run a child to its end, or to the limit; nothing of it is left, in memory or on disk."""
    folder = Path(tempfile.mkdtemp(prefix=f"anyflow-doctor-{item.name}-"))
    began = time.monotonic()
    try:
        with open(folder / "log", "wb") as log:
            process = begin(
                [sys.executable, "-m", "anyflow.doctor.child", item.work, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=home(),
                env={**os.environ, "ANYFLOW_WATCHER": str(os.getpid()), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"},
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        words = (folder / "log").read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")[-LAST_WORDS:]
        return _Ended(code, time.monotonic() - began, read_findings(folder / FOUND), "\n".join(words))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def home() -> Path:
    """Where the embedded models and the starter clips are: the working folder or the project's; else the first."""
    places = (Path.cwd(), PROJECT)
    return next((place for place in places if (place / TINY).is_dir()), Path.cwd())
