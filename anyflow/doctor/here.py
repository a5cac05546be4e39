"""The device that a child examines, and how work on it is timed and weighed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

GIB = 2**30

WARMING = 20
"""Runs before timing, at most."""

OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
"""What a failed allocation says where it has no exception of its own."""


@dataclass(frozen=True)
class Here:
    """Attributes:
    is_gpu: whether the figures are a GPU's.
    device: where tensors go.
    """

    is_gpu: bool
    device: torch.device

    @classmethod
    def find(cls) -> Here:
        """The machine's first GPU, or its CPU."""
        is_gpu = torch.cuda.is_available()
        return cls(is_gpu, torch.device("cuda", 0) if is_gpu else torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """What large networks compute in here."""
        return torch.bfloat16 if self.is_gpu else torch.float32

    def seconds(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """The median of some runs, after a tenth of a second of them that is not counted: one alone leaves clocks,
        caches and threads cold.
        """
        began = time.perf_counter()
        for _ in range(WARMING):
            work()
            if time.perf_counter() - began > 0.1:
                break
        return median(self.seconds_once(work) for _ in range(repeats))

    def seconds_once(self, work: Callable[[], Any]) -> float:
        """One run, of a GPU by its own clock."""
        if not self.is_gpu:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def now(self) -> float:
        """Seconds of a clock, when all work so far is done."""
        if self.is_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def weighed(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of one run, and the most GiB that a GPU had allocated, what lay there before included (a CPU: 0)."""
        if not self.is_gpu:
            return self.seconds_once(work), 0.0
        torch.cuda.reset_peak_memory_stats()
        return self.seconds_once(work), torch.cuda.max_memory_allocated() / GIB

    def allocated_gib(self) -> float:
        """What lies on the GPU now; 0 on a CPU."""
        return torch.cuda.memory_allocated() / GIB if self.is_gpu else 0.0

    def free_gib(self) -> float:
        """What a GPU has left, with what PyTorch holds in reserve; endless on a CPU."""
        if not self.is_gpu:
            return float("inf")
        self.tidy()
        return torch.cuda.mem_get_info()[0] / GIB

    def tidy(self) -> None:
        """Give back what is cached."""
        if self.is_gpu:
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
