"""What is printed and written: a line of JSON an item, and the verdict over all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyflow.doctor.findings import write_whole

VERDICT = "verdict"


def verdict(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last line: whether all that ran is well; else each thing that is wrong, with its remedy."""
    wrong = [f"{line['item']}: {sentence}" for line in lines for sentence in line.get("wrong", [])]
    advice = [f"{line['item']}: {sentence}" for line in lines for sentence in line.get("advice", [])]
    skipped = [line["item"] for line in lines if line["ok"] is None]
    told: dict[str, Any] = {
        "item": VERDICT,
        "ok": not wrong,
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "verdict": "; ".join(wrong) if wrong else f"ok: {', '.join(line['item'] for line in lines if line['ok'])}",
    }
    more = {"wrong": wrong, "advice": advice, "skipped": skipped}
    return {**told, **{name: what for name, what in more.items() if what}}


def for_people(line: dict[str, Any]) -> list[str]:
    """A few words on stderr beside each line of JSON."""
    state = {True: "ok", False: "wrong", None: "left out"}[line["ok"]]
    words = [f"{line['item']:<12}{state}, {line['seconds']:.0f} s"]
    words += [f"  wrong: {sentence}" for sentence in line.get("wrong", [])]
    words += [f"  better: {sentence}" for sentence in line.get("advice", [])]
    words += [f"  without {what}: {why}" for what, why in line.get("left_out", {}).items()]
    return words


class Written:
    """The lines in a file, whole after every one of them."""

    def __init__(self, place: Path | None) -> None:
        self._place = place
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> str:
        """Keep a line; returns it as it is printed."""
        self.lines.append(line)
        if self._place is not None:
            write_whole(self._place, "".join(f"{as_text(one)}\n" for one in self.lines))
        return as_text(line)


def as_text(line: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(line, ensure_ascii=False, allow_nan=False, default=str)
