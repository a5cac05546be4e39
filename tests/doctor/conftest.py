"""PyTorch's questions about GPUs, answered by a stand-in; tensors stay on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctor_pretended import Event, Gpu

from anyflow.doctor.here import GIB, Here


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    """A stand-in for ``torch.cuda``; tensors stay on the CPU, and what it finds is not kept among the user's files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pretended = Gpu(iter(()))
    answers: dict[str, Any] = {
        "Event": Event,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: next(pretended.peaks) * GIB,
        "max_memory_reserved": lambda *_: 0.0,
        "memory_allocated": lambda *_: pretended.lying * GIB,
        "mem_get_info": lambda *_: (pretended.free * GIB, pretended.total * GIB),
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "Pretended GPU",
        "get_device_properties": lambda *_: SimpleNamespace(
            name="Pretended GPU", major=9, minor=0, multi_processor_count=132
        ),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return pretended


@pytest.fixture
def here(gpu: Gpu) -> Here:
    return Here(True, torch.device("cpu"))
