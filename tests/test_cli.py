"""The command line in processes of its own: fast help, one sentence and exit code 2 for mistakes, JSON for machines."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anyflow.cli import main as cli
from anyflow.errors import EXIT_INTERRUPTED, EXIT_USER, UserError, explain

PROJECT = Path(__file__).resolve().parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = {
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "peft",
    "mlflow",
    "numpy",
    "omegaconf",
    "yaml",
    "av",
    "rich",
}
COMMANDS = ("train", "sample", "evaluate", "export", "data", "recipes", "mlflow")


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The sentence of a refused call: one line on stderr, nothing on stdout, exit code 2."""
    assert done.returncode == EXIT_USER, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("anyflow: "), done.stderr
    return lines[0]


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "anyflow", "--help"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in loaded
    assert not loaded & HEAVY
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "words", [("recipes",), ("plan", "--help"), ("data", "show", "driving"), ("train", "finetune/nothing")]
)
def test_what_needs_no_network_imports_no_torch(words: tuple[str, ...]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "anyflow", *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in loaded and not loaded & {"torch", "lightning", "diffusers", "mlflow"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples(anyflow: Run, command: str) -> None:
    words = {"recipes": ["recipes", "show"], "data": ["data", "show"]}.get(command, [command])
    done = anyflow(*words, "--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout and f"anyflow {' '.join(words)}" in done.stdout
    assert "--json" in done.stdout


def test_version(anyflow: Run) -> None:
    assert anyflow("--version").stdout.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "finetune/driving", "optimizer.lrr=1"], "did you mean 'optimizer.lr'?"),
        (["train", "finetune/driving", "data.frames=16"], "give 13 or 17"),
        (["train", "finetune/driving", "data.card=nothing"], "data.card='nothing'"),
        (["train", "finetune/driving", "data.card=driving", "model.weights=data/nothing"], "model.weights"),
        (["train", "finetune/driving", "--model", "tinny"], "did you mean tiny?"),
        (["train", "forward/wan2.1-t2v-1.3b"], "data.card is empty"),
        (["sample", "a car", "--steps", "0,4"], "--steps '0,4'"),
        (["sample", "  "], "PROMPT is empty"),
        (["sample", "a car", "--out", "recipes"], "--out recipes is not empty"),
        (["sample", "a car", "--model", "./nothing"], "--model ./nothing: there is no such folder"),
        (["evaluate", "--model", "data/models/tiny", "--data", "nothing"], "nothing"),
        (["evaluate", "--model", "m", "--data", "driving", "--steps", "one"], "--steps 'one'"),
        (["export", "recipes", "--to", "recipes"], "--to recipes is not empty"),
        (
            ["train", "finetune/driving", "--out", "/proc/x/y", "--dry-run"],
            "--out /proc/x/y: nothing can be written there",
        ),
        (["train", "finetune/driving", "run.out=LICENSE/x"], "run.out LICENSE/x: "),
        (["train", "finetune/driving", "model.lora.full=[proj_out]"], "model.lora.full=['proj_out'] needs"),
        (["vbench", "--model", "m/m", "--out", "LICENSE"], "--out LICENSE: it is a file"),
        (["doctor", "--out", "/proc/x.jsonl"], "--out in /proc: nothing can be written there"),
        (["export", "recipes", "--to", "build/x", "--precision", "int8"], "--precision 'int8'"),
        (["export", "recipes", "--to", "build/x", "--lora"], "is not a run"),
        (["export", "recipes", "--to", "build/x", "--lora", "--layout", "kohya"], "--layout 'kohya' is not known"),
        (["export", "recipes", "--to", "build/x", "--layout", "comfyui"], "--layout comfyui is for adapters"),
        (["data", "show", "nothing"], "nothing"),
        (["data", "make", "cooking"], "cooking"),
        (["mlflow", "--uri", "sqlite:///no/such.db"], "there is no such database"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(anyflow: Run, arguments: list[str], sentence: str) -> None:
    assert sentence in refused(anyflow(*arguments))


def test_unknown_options_and_missing_arguments_exit_with_2(anyflow: Run) -> None:
    for arguments in (["train", "finetune/driving", "--nope"], ["export", "x"]):
        done = anyflow(*arguments)
        assert done.returncode == EXIT_USER and "Traceback" not in done.stderr


def test_recipes_for_machines(anyflow: Run) -> None:
    listed = json.loads(anyflow("recipes", "list", "--json").stdout)
    assert {"driving", "robotics", "games"} <= set(listed["finetune"])
    shown = json.loads(anyflow("recipes", "show", "finetune/driving", "stage.steps=7", "--json").stdout)
    assert shown["recipe"]["stage"]["steps"] == 7
    fields = {row["key"]: row for row in shown["fields"]}
    assert fields["stage.steps"]["source"] == "command line" and fields["stage.steps"]["meaning"]
    assert set(json.loads(anyflow("recipes", "check", "--json").stdout).values()) == {None}


def test_a_wrong_recipe_fails_the_check(anyflow: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stage: {stepz: 3}\n")
    done = anyflow("recipes", "check", str(tmp_path / "mine.yaml"))
    assert done.returncode == EXIT_USER and "did you mean 'stage.steps'?" in done.stdout


def test_recipes_show_for_people(anyflow: Run) -> None:
    out = anyflow("recipes", "show", "finetune/driving").stdout
    assert "optimizer.lr" in out and "recipes/models/tiny-open.yaml" in out and "learning rate" in out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("data.card='x' is\n  wrong: mend it"), EXIT_USER, "data.card='x' is wrong: mend it"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/file"), EXIT_USER, "the disk is full (/full/file)"),
        (RuntimeError("write failed: No space left on device (os error 28)"), EXIT_USER, "the disk is full"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, ""),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    out = capsys.readouterr().err
    assert words in out and out.count("\n") <= 1


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_full_disk_is_seen_behind_another_error() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert "the disk is full" in str(explain(error))
    assert explain(RuntimeError("other")) is None
