"""What a person at the keyboard waits for: the first picture, and then frames; and what a long play costs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

from anyflow.play.options import STEPS, PlayOptions

WARM_UP = 2


def play_benchmark(model: str, chunks: int = 200, timed: int = 12) -> dict[str, Any]:
    """Play a model as the command does, without a browser.

    Args:
        model: a causal one that is told controls.
        chunks: of the long play.
        timed: chunks that are timed at each number of steps.

    Returns:
        ``start``: seconds from the command to its page, to the first picture, to the first chunk that keys steer;
        ``frames_per_second`` and ``cpu_seconds_per_chunk`` by steps (medians; pictures are encoded too); ``memory``:
        MiB of the process after the first chunks and after all of a long play.
    """
    from anyflow.evaluation.loaded import LoadedModel
    from anyflow.evaluation.options import WayOptions
    from anyflow.play.hands import Hands
    from anyflow.play.player import Task
    from anyflow.play.serve import playable, player_of

    start = _start(model)
    found = playable(model)
    player, facts = player_of(found, PlayOptions())
    player.load(LoadedModel.of(model, WayOptions(), found.shape))
    rates, cpu = {}, {}
    for steps in STEPS:
        player.make(Task(Hands(), steps, 0))
        times = [_timed(player, Task(Hands(), steps)) for _ in range(WARM_UP + timed)][WARM_UP:]
        rates[steps] = median(frames / seconds for frames, seconds, _ in times)
        cpu[steps] = median(used for _, _, used in times)
    sizes = []
    for number in range(chunks):
        player.make(Task(Hands({"ArrowLeft": 1.0}), 1, 0 if number == 0 else None))
        sizes.append(_resident())
    return {
        "start": start,
        "frames_per_second": rates,
        "cpu_seconds_per_chunk": cpu,
        "footage": facts.fps,
        "memory": {"early": sizes[min(20, chunks - 1)], "late": sizes[-1], "chunks": chunks},
    }


def told(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    start, memory = result["start"], result["memory"]
    lines = [
        f"play: page after {start['page']:.1f} s, first picture after {start['picture']:.1f} s, "
        f"first steered chunk after {start['chunk']:.1f} s from the command"
    ]
    for steps, rate in result["frames_per_second"].items():
        used = result["cpu_seconds_per_chunk"][steps]
        lines.append(f"  {steps} steps  {rate:6.1f} frames/s (footage {result['footage']:g}), {used:.2f} CPU s a chunk")
    lines.append(f"  memory {memory['early']:.0f} MiB early, {memory['late']:.0f} MiB after {memory['chunks']} chunks")
    return lines


def _start(model: str) -> dict[str, float]:
    """Seconds from the command until there is something to see, as a page that opens at once has it."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "anyflow", "play", "--model", model, "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address, found = process.stdout.readline().strip(), {}
        with urllib.request.urlopen(address + "stream", timeout=300) as stream:
            facts = json.loads(stream.readline())
            found["page"] = time.perf_counter() - began
            for name in ("picture", "chunk"):
                line = json.loads(stream.readline())
                found[name] = time.perf_counter() - began
                wish = {"seat": facts["seat"], "number": line["number"], "shown": line["number"], "steps": 2}
                usual = {"keys": [], "sticks": [0, 0], "sliders": {}, "paused": False, "run": 0, "start": 0, "film": 0}
                urllib.request.urlopen(urllib.request.Request(address + "wish", json.dumps({**usual, **wish}).encode()))
            process.send_signal(signal.SIGINT)
            stream.read()
        return found
    finally:
        process.terminate()
        process.wait()


def _timed(player: Any, task: Any) -> tuple[int, float, float]:
    """Frames of a chunk, its seconds, and those of all cores together."""
    used = time.process_time()
    made = player.make(task)
    return len(made.frames), made.seconds, time.process_time() - used


def _resident() -> float:
    """MiB of memory that this process occupies."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20
