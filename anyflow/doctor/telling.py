"""What is printed and written: a line of JSON an item, and the verdict over all of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyflow.system.files import write_atomically
from anyflow.system.tables import markdown_table

VERDICT = "verdict"

STATES = {True: "ok", False: "wrong", None: "left out"}

CHIEF = {
    "machine": r"device|torch|cores|threads|load|gpu_memory_gib|driver",
    "attention": r".*self\.(fastest|project|project_both_ms)",
    "step": r".*(seconds_a_clip|of_plan|of_matmul)",
    "vae": r".*(seconds_1|peak_gib_1|clips_at_once)",
    "devices": r".*\.network\..*",
    "compile": r".*\.(graphs|again|breaks|limits|speedup)",
    "resume": r"killed_at_step|bitwise|largest_difference",
    "derivative": r".*(signal|relative)",
    "ranks": r"gpus|.*gb_a_second",
}
"""The figures of each item that a table shows."""


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
    words = [f"{line['item']:<12}{STATES[line['ok']]}, {line['seconds']:.0f} s"]
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
            write_atomically(self._place, "".join(f"{as_text(one)}\n" for one in self.lines))
        return as_text(line)


def as_text(line: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(line, ensure_ascii=False, allow_nan=False, default=str)


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table: each item with its chief figures, what is wrong, or why it was left out."""
    rows = []
    for line in lines:
        if line["item"] == VERDICT:
            continue
        shown = [f"{name} {line[name]}" for name in line if re.fullmatch(CHIEF.get(line["item"], ""), name)]
        shown += [f"**{sentence}**" for sentence in line.get("wrong", [])]
        shown += list(line.get("left_out", {}).values()) if line["ok"] is None else []
        rows.append((f"`{line['item']}`", STATES[line["ok"]], f"{line['seconds']:.0f}", "; ".join(shown)))
    return markdown_table(("item", "", "seconds", "figures"), rows, "llrl")


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").split("\n")
    print("\n".join(table([json.loads(text) for text in lines if text])))
