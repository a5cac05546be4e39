"""What is seen on a pretended GPU, and where in the code it happens."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import anyflow

PACKAGE = str(Path(anyflow.__file__).parent) + "/"


@dataclass
class Findings:
    """What was seen. ``phase`` and ``who`` are set from outside, and name what is seen from then on."""

    phase: str = ""
    who: list[str] = field(default_factory=list)
    mismatches: Counter[str] = field(default_factory=Counter)
    syncs: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    uploads: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    work: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    """``(phase, who, device, dtype)`` to multiplications."""

    def sync(self, what: str) -> None:
        """The host waits for the device, here."""
        self.syncs[self.phase][f"{where()}: {what}"] += 1

    def upload(self) -> None:
        """Something is copied to the device, here."""
        self.uploads[self.phase][where()] += 1

    def mismatch(self, what: str) -> None:
        """What a GPU would refuse."""
        self.mismatches[f"{where()}: {what}"] += 1


def where() -> str:
    """The innermost line of ours (``stages/batch.py:71 on_path``) or of Lightning's on the stack."""
    frame: FrameType | None = sys._getframe(1)
    line = 0
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        _, found, package = path.partition("/site-packages/")
        if path.startswith(PACKAGE) or (found and package.startswith(("lightning/", "torchmetrics/"))):
            line = line or frame.f_lineno
            if not function.startswith("<"):  # a comprehension or a lambda is of the function that it stands in
                return f"{path.removeprefix(PACKAGE) if path.startswith(PACKAGE) else package}:{line} {function}"
        frame = frame.f_back
    return "elsewhere"
