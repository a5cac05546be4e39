"""Whatever becomes of one item, its line says it, the others run, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyflow.cli.main import app
from anyflow.doctor import running
from anyflow.doctor.findings import Findings, read_findings
from anyflow.doctor.items import ITEMS, MACHINE, Item, items_named
from anyflow.doctor.telling import Written, as_text, table, verdict
from anyflow.errors import EXIT_PREEMPTED, UserError

Run = Callable[..., subprocess.CompletedProcess[str]]

FAULTS = Path(__file__).parent


class Quick(Item):
    """Taken to hang after a few seconds."""

    def limit(self, is_gpu: bool) -> float:
        return 8.0


def item(name: str, seconds: float = 0.0, gpus: int = 0, kind: type[Item] = Item) -> Item:
    return kind(name, f"doctor_faults:{name}", (seconds, seconds), gpus)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    """Children find the faults of this folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(project), str(FAULTS)]))


def examined(*items: Item, minutes: float = 5.0) -> dict[str, dict[str, Any]]:
    lines = {line["item"]: line for line in running.examine(items, minutes)}
    for line in lines.values():
        json.loads(as_text(line))
    return lines


def is_gone(number: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_every_fault_of_an_item_is_told_and_the_others_run(faults: None) -> None:
    """Caught: a fault that ends the doctor, a lost figure, a process or a folder left behind."""
    names = ["raises", "crashes", "runs_out_of_memory", "well"]
    lines = examined(item("hangs", kind=Quick), *(item(name) for name in names))
    assert list(lines) == ["machine", "hangs", *names]
    assert lines["machine"]["ok"] is True and lines["machine"]["torch"]
    assert {name: line["ok"] for name, line in lines.items() if name != "machine"} == {
        **dict.fromkeys(["hangs", "raises", "crashes", "runs_out_of_memory"], False),
        "well": True,
    }
    said = {name: " ".join(line.get("wrong", [])) for name, line in lines.items()}
    assert said["raises"] == "failed: ValueError: two words"
    assert lines["raises"]["before"] == 1
    assert "SIGSEGV" in said["crashes"] and "--only crashes" in said["crashes"]
    assert "memory ran out" in said["runs_out_of_memory"]
    assert "did not end within 8 s" in said["hangs"] and lines["hangs"]["so_far"] == 3
    assert lines["hangs"]["seconds"] < 60
    assert is_gone(lines["hangs"]["grandchild"])
    assert lines["well"]["deep.answer"] == 42.12
    assert not Path(lines["well"]["folder"]).exists()
    assert lines["well"]["machine"] == {key: lines["machine"][key] for key in ("device", "torch", "anyflow")}
    told = verdict(list(lines.values()))
    assert told["ok"] is False and len(told["wrong"]) == 4
    assert "hangs: did not end" in told["verdict"] and "remedy" not in told


def fake(code: int | None, found: dict[str, Any] | None = None) -> Callable[..., Any]:
    """A child that ends so, at once."""

    def run(item: Item, limit: float) -> Any:
        is_machine = item is MACHINE
        return running._Ended(0 if is_machine else code, 1.0, {"gpus": 1} if is_machine else found or {}, "")

    return run


@pytest.mark.parametrize(
    ("code", "found", "words"),
    [
        (-9, {}, "was killed, most likely because the machine's memory ran out"),
        (-6, {}, "crashed by SIGABRT"),
        (7, {}, "ended with exit code 7"),
        (1, {"wrong": ["it is so"]}, "it is so"),
        (0, {"wrong": ["bad"]}, "bad"),
    ],
)
def test_how_a_child_ended(code: int, found: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: an ending without a sentence, or a finding counted twice."""
    monkeypatch.setattr(running, "_run", fake(code, found))
    line = list(running.examine([item("any")], 5.0))[1]
    assert line["ok"] is False and len(line["wrong"]) == 1 and words in line["wrong"][0]


def test_what_does_not_fit_the_minutes_is_left_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: an item that is begun though it cannot end, or one that is silently dropped."""
    monkeypatch.setattr(running, "_run", fake(0))
    lines = list(running.examine([item("long", seconds=100), item("short", seconds=10)], 1.0))
    assert [line["ok"] for line in lines] == [True, None, True]
    assert "give more --minutes" in lines[1]["left_out"]["long"]
    told = verdict(lines)
    assert told["ok"] is True and told["skipped"] == ["long"] and told["verdict"] == "ok: machine, short"


def test_an_item_that_the_minutes_cut_is_no_fault_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a small budget told as a hang; and a hang told as a small budget."""
    monkeypatch.setattr(running, "_run", fake(None, {"so_far": 1}))
    cut, hung = (list(running.examine([item("slow", seconds=1)], minutes))[1] for minutes in (0.5, 5.0))
    assert cut["ok"] is None and "give more --minutes" in cut["left_out"]["the rest"] and cut["so_far"] == 1
    assert hung["ok"] is False and "did not end" in hung["wrong"][0]


def test_an_item_for_several_gpus_is_left_out_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: NCCL among one GPU."""
    monkeypatch.setattr(running, "_run", fake(0))
    line = list(running.examine([item("ranks", gpus=2)], 5.0))[1]
    assert line["ok"] is None and line["left_out"] == {"ranks": "needs 2 GPUs, and here is 1"}


def test_the_file_holds_whole_lines_after_every_one(tmp_path: Path) -> None:
    """Caught: a file that is written at the end alone, or of which half can be read."""
    written = Written(tmp_path / "out.jsonl")
    for number in range(3):
        written.add({"item": str(number), "ok": True})
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        assert [json.loads(line)["item"] for line in lines] == [str(n) for n in range(number + 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_findings_are_plain_and_kept_as_they_come(tmp_path: Path) -> None:
    """Caught: a NaN that no reader of JSON takes, and figures that are kept only at the end."""
    found = Findings(tmp_path / "found.json")
    found.note({"rate": 123.456789, "none": float("nan"), "count": 7, "yes": True}, "a.b")
    assert read_findings(tmp_path / "found.json") == {
        "a.b.rate": 123.5,
        "a.b.none": None,
        "a.b.count": 7,
        "a.b.yes": True,
    }
    found.leave_out("x", "no room")
    found.advise("do y")
    assert read_findings(tmp_path / "found.json")["left_out"] == {"x": "no room"}
    assert "wrong" not in found.to_json()
    assert read_findings(tmp_path / "not there") == {}


def test_names_are_checked() -> None:
    """Caught: a typing error that examines nothing and says ok."""
    assert [one.name for one in items_named("vae, attention")] == ["attention", "vae"]
    assert items_named("") == list(ITEMS)
    with pytest.raises(UserError, match="attention"):
        items_named("atention")


def test_the_help_and_the_page_name_every_item(project: Path) -> None:
    """Caught: an item that nobody is told of."""
    import typer

    command: Any = typer.main.get_command(app)
    text = command.commands["doctor"].params[0].help
    page = (project / "docs" / "doctor.md").read_text(encoding="utf-8")
    for one in (MACHINE, *ITEMS):
        assert one.name in text and f"| `{one.name}` |" in page


def test_the_command(anyflow: Run, tmp_path: Path) -> None:
    """As a user types it: a line an item on stdout and in the file, the verdict last, words for people on stderr."""
    out = tmp_path / "doctor.jsonl"
    done = anyflow("doctor", "--only", "attention", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout == out.read_text()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["item"] for line in lines] == ["machine", "attention", "verdict"]
    assert all(line["ok"] is True and line["seconds"] >= 0 for line in lines)
    attention = lines[1]
    assert attention["tiny.self.project"] in ("flash", "math")
    assert attention["1.3b.short.flash.both_tflops"] > 0 and "whole clips" in attention["left_out"]
    assert "attention" in done.stderr and "ok: machine, attention" in done.stderr


def test_mistakes_of_the_users(anyflow: Run, tmp_path: Path) -> None:
    """Caught: minutes of examination before a mistake is told."""
    for words in (("--only", "brain"), ("--out", str(tmp_path)), ("--out", str(tmp_path / "no" / "x.jsonl"))):
        done = anyflow("doctor", *words)
        assert done.returncode == 2 and not done.stdout and words[1] in done.stderr


def started_in(folder: Path) -> list[str]:
    """Command lines of running processes that name a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(place.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if str(folder) in line]


@pytest.mark.slow
def test_a_stopped_doctor_leaves_nothing_behind(project: Path, tmp_path: Path) -> None:
    """Caught: trainings that run on, or folders that stay, when a scheduler or a user has had enough."""
    environment = {**os.environ, "PYTHONPATH": str(project), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "anyflow", "doctor", "--only", "resume"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=project)
    deadline = time.monotonic() + 120
    while len(started_in(tmp_path)) < 3:  # the item, and its two trainings
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED
    assert not list(tmp_path.iterdir()) and not started_in(tmp_path)


def test_the_table_is_made_of_the_committed_lines(project: Path) -> None:
    """Caught: a page whose figures are of another run than the file beside it."""
    text = (project / "experiments" / "results" / "doctor" / "cpu.jsonl").read_text(encoding="utf-8")
    rows = table([json.loads(line) for line in text.splitlines()])
    assert len(rows) == 2 + 1 + len(ITEMS)
    assert "\n".join(rows) in (project / "docs" / "doctor.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_whole_examination(anyflow: Run) -> None:
    """Every item on this machine; none may fail, hang, or find that a resumed run is another one."""
    done = anyflow("doctor", "--minutes", "20", timeout=1200)
    lines = {line["item"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == ["machine", *(one.name for one in ITEMS), "verdict"]
    for line in lines.values():
        assert not any("failed:" in sentence or "stopped" in sentence for sentence in line.get("wrong", [])), line
    assert lines["resume"]["bitwise"] is True
    assert lines["derivative"]["tiny.mixed.relative"] < 1
    assert lines["compile"]["forward_lora.graphs"] > 0
    assert lines["devices"]["exit_code"] == 0
    assert done.returncode == (0 if lines["verdict"]["ok"] else 1)
