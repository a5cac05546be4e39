"""Ways of doing the same work, timed side by side in one run, with the memory that each takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def compare(ways: Mapping[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Per way ``seconds`` (median) and ``peak_bytes``; taken in turn, so that a slow spell of the machine hits all."""
    import torch

    peaks = {name: peak_bytes(step, device) for name, step in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, step in ways.items():
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: {"seconds": median(seconds[name]), "peak_bytes": peaks[name]} for name in ways}


def gains(ours: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """How many times as fast one way is as another, and into how many of its memories the other's goes."""
    return {
        "speedup": other["seconds"] / ours["seconds"],
        "memory_ratio": other["peak_bytes"] / ours["peak_bytes"],
    }


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Most bytes that a step holds at once beyond what it found."""
    return held_bytes(step, device)[0]


def held_bytes(step: Callable[[], Any], device: str) -> tuple[int, int]:
    """Most bytes that a step holds at once beyond what it found, and those that it leaves behind."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it narrates on stderr otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak, held
