"""Commands that start together: a place has one owner, and whoever else wants it is given another or told."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml
from shell import command, environment
from test_resume import training, without_out

from anyflow.errors import EXIT_USER
from anyflow.tracking.runs import RunFolder


def together(*calls: list[str]) -> list[tuple[int, str]]:
    """Exit codes and words on stderr of commands that run at once."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command(*words), env=environment(), **pipes) for words in calls]  # type: ignore[call-overload]
    told = [process.communicate(timeout=300)[1] for process in running]
    return [(process.returncode, words) for process, words in zip(running, told, strict=True)]


def test_trainings_that_start_together_have_runs_of_their_own(small_model: Path, tmp_path: Path) -> None:
    """As a sweep starts them: both chose -001, and the second wrote its recipe over weights of the first."""

    def words(rate: float) -> list[str]:
        own = (f"run.out={tmp_path}/runs", f"optimizer.lr={rate}", "stage.steps=1")
        return without_out(training(small_model, tmp_path, *own))

    for code, told in together(words(1e-3), words(1e-5)):
        assert code == 0, told
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["finetune-driving-tiny-open-001", "finetune-driving-tiny-open-002"]
    assert {RunFolder(run).status["state"] for run in runs} == {"finished"}
    assert {yaml.safe_load((run / "recipe.yaml").read_text())["optimizer"]["lr"] for run in runs} == {1e-3, 1e-5}


def test_of_two_that_want_one_folder_one_has_it(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    calls = [training(small_model, out, f"run.seed={seed}") for seed in (1, 2)]
    ends = together(*calls)
    assert sorted(code for code, _ in ends) == [0, EXIT_USER], ends
    lost = next(told for code, told in ends if code)
    assert (
        "is being trained by another process" in lost or "was begun by another process" in lost or "not empty" in lost
    )
    winner = next(seed for seed, (code, _) in enumerate(ends, 1) if code == 0)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["run"]["seed"] == winner
    assert RunFolder(out).status["state"] == "finished"
