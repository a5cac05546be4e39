"""What an item finds: figures by dotted names, and sentences. Kept in a file as they come, so that a child that is
ended in the middle has not measured in vain."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyflow.system.files import write_atomically


class Findings:
    """Figures and sentences of one item.

    Attributes:
        figures: plain values by dotted names.
        wrong: what is wrong, with its remedy, a sentence each.
        advice: what would be better, but is not wrong.
        left_out: why, by what was not measured.
    """

    def __init__(self, place: Path | None = None) -> None:
        self._place = place
        self.figures: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.advice: list[str] = []
        self.left_out: dict[str, str] = {}

    def note(self, figures: Mapping[str, Any], prefix: str = "") -> None:
        """Add figures, their names behind ``prefix`` and a dot if one is given."""
        for name, value in figures.items():
            self.figures[f"{prefix}.{name}" if prefix else name] = _plain(value)
        self._save()

    def is_wrong(self, sentence: str) -> None:
        """Say what is wrong, and what to do."""
        self.wrong.append(sentence)
        self._save()

    def advise(self, sentence: str) -> None:
        """Say what would be better."""
        self.advice.append(sentence)
        self._save()

    def leave_out(self, what: str, why: str) -> None:
        """Say what was not measured, and why."""
        self.left_out[what] = why
        self._save()

    def to_json(self) -> dict[str, Any]:
        """Plain values; sentences only where there are any."""
        told = {"wrong": self.wrong, "advice": self.advice, "left_out": self.left_out}
        return {**self.figures, **{name: what for name, what in told.items() if what}}

    def _save(self) -> None:
        if self._place is not None:
            write_atomically(self._place, json.dumps(self.to_json()))


def read_findings(place: Path) -> dict[str, Any]:
    """What a child has found so far; empty if nothing."""
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _plain(value: Any) -> Any:
    """Numbers to four places that count, and none that JSON has no word for."""
    if isinstance(value, bool) or not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None
