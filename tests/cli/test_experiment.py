"""An experiment through the real command line: run, killed in the middle of a training, resumed, reported."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from shell import command, environment, run

from anyflow.errors import EXIT_PREEMPTED
from anyflow.tracking.checkpoints import latest_checkpoint
from anyflow.tracking.runs import RunFolder

TEXT = """
question: Does it run?
cards: [driving]
recipe: finetune/driving
arms:
  base: {{folder: {model}}}
  tuned: {{overrides: [stage.steps=6]}}
  more: {{start_from: tuned, steps: 2, overrides: [stage.steps=2]}}
overrides:
  - model.weights={model}
  - data.global_batch=2
  - data.precompute=false
  - data.num_workers=0
  - checkpoint.every_steps=1
  - run.tracking_uri=sqlite:///{home}/mlflow.db
seeds: [0]
budget: {{steps: 6, batch: 2}}
evaluation: {{prompts: 2, steps: [1, 2]}}
few: 1
metrics: [sliced_w1]
claims: [{{say: Tuning helps., arm: tuned, than: base, steps: [1, 2]}}]
"""


def write(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT.format(model=model, home=tmp_path), encoding="utf-8")
    return path


def test_the_list_and_a_dry_run_write_nothing(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from anyflow.cli.main import app

    monkeypatch.chdir(tmp_path)
    listed = json.loads(CliRunner().invoke(app, ["experiment", "--json"]).stdout)
    assert "retention" in listed
    words = ["experiment", str(write(tmp_path, small_model)), "--dry-run", "--json"]
    told = json.loads(CliRunner().invoke(app, words).stdout)
    assert [(job["arm"], job["evaluates"], job["state"]) for job in told["jobs"]] == [
        ("base", "driving", "missing"),
        ("tuned", None, "missing"),
        ("tuned", "driving", "missing"),
        ("more", None, "missing"),
        ("more", "driving", "missing"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_experiment_that_was_cut_goes_on(
    number: signal.Signals, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    """Killed during a training: the training too, by SIGTERM; by SIGKILL it is left, and holds the lock to its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(project))
    path = write(tmp_path, small_model)
    tuned = RunFolder(tmp_path / "runs" / "experiments" / "small" / "tuned-0")
    process = subprocess.Popen(command("experiment", str(path)), stderr=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + 500
    while latest_checkpoint(tuned.checkpoints) is None:
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=300)
    assert process.returncode == (EXIT_PREEMPTED if number == signal.SIGTERM else -signal.SIGKILL)
    done = run("experiment", str(path), "--json", timeout=500)
    while done.returncode == 2 and "still runs: wait for its end" in done.stderr:
        time.sleep(2)
        done = run("experiment", str(path), "--json", timeout=500)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["missing"] == 0 and told["answers"][0]["verdict"] == "not decided"
    assert tuned.status["state"] == "finished"
    if number == signal.SIGTERM:  # by SIGKILL nobody was left to take the time
        assert tuned.status["train_seconds"] > 0
    assert (tmp_path / "results" / "small" / "report.html").is_file()
    again = run("experiment", str(path), timeout=500)
    assert again.returncode == 0 and "nothing to do" in again.stderr
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("small").experiment_id])  # type: ignore[union-attr]
    below = {run.info.run_name for run in found if "mlflow.parentRunId" in run.data.tags}
    assert below == {"base-0", "tuned-0", "more-0"} and len(found) == 4


def test_a_report_of_committed_curves_needs_no_clips() -> None:
    """As in a clone where nothing was rendered: 3,000 clips of open driving are not shipped."""
    done = run("experiment", "any-step", "--dry-run")
    assert done.returncode == 0 and "nothing to do" in done.stdout
