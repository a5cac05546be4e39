"""A run's figures are in its own folder first; MLflow gets what it lacks, whatever has happened to its database."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from anyflow.tracking import run_log
from anyflow.tracking.mlflow import close_tracking, log_artifact, log_curve, open_tracking
from anyflow.tracking.run_log import UNSENT, RunLogger, recorded_id
from anyflow.tracking.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_log, "PATIENCE", 0.05)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


def opened(run: RunFolder, name: str = "mlflow.db") -> RunLogger:
    logger = open_tracking(
        run, uri=f"sqlite:///{name}", experiment="", parameters={"optimizer.lr": 0.1}, tags={"data": "aa"}
    )
    assert logger is not None
    return logger


def history(run: RunFolder, key: str, name: str = "mlflow.db") -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{Path(name).resolve()}")
    return [(point.step, point.value) for point in client.get_metric_history(run.status["mlflow_run_id"], key)]


def test_a_locked_database_is_told_once_and_gets_everything_later(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow would wait 20 s a call, and log a traceback each time."""
    logger = opened(run)
    logger.log_metrics({"loss": 3.0}, 1)
    calls: list[Any] = []
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other, monkeypatch.context() as patch:
        other.execute("BEGIN EXCLUSIVE")
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: calls.append(1))
        logger.log_metrics({"loss": 2.0}, 2)
        logger.log_metrics({"loss": 1.0}, 3)
        log_curve(logger, "after", [{"num_steps": 4, "sliced_w1": 0.5, "nothing": None, "bad": float("nan")}])
        log_artifact(logger, run.path / "status.json")
        assert not calls and run.status[UNSENT] > 0
        other.execute("ROLLBACK")
    told = capsys.readouterr().err
    assert told.count("database is locked") == 1 and told.count("\n") == 1 and "Traceback" not in told
    close_tracking(logger, "FINISHED")
    assert history(run, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert history(run, "after/sliced_w1") == [(4, 0.5)]
    client = MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}")
    assert [entry.path for entry in client.list_artifacts(run.status["mlflow_run_id"])] == ["status.json"]
    assert client.get_run(run.status["mlflow_run_id"]).info.status == "FINISHED"
    lines = [json.loads(line) for line in run.figures.read_text().splitlines()]
    assert [line["figures"] for line in lines][:2] == [{"loss": 3.0}, {"loss": 2.0}]


def test_a_resumed_run_sends_what_was_left_once(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    first = opened(run)
    first.log_metrics({"loss": 3.0}, 1)
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        first.log_metrics({"loss": 2.0}, 2)
        with open(run.figures, "a") as file:
            file.write('{"step": 9, "ti')  # a kill in the middle of a line
        again = opened(run)  # locked still
        again.log_metrics({"loss": 1.0}, 3)
        other.execute("ROLLBACK")
    third = opened(run)
    third.log_metrics({"loss": 0.5}, 4)
    assert history(run, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
    assert third.version == first.version
    close_tracking(opened(run), "FINISHED")
    assert history(run, "loss")[-1] == (4, 0.5) and len(history(run, "loss")) == 4


def test_a_deleted_database_is_made_anew_with_all_figures(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """It was never recorded to again, and the summary named the run that was gone."""
    first = opened(run)
    first.log_metrics({"loss": 3.0}, 1)
    gone = first.version
    assert recorded_id(run) == gone
    Path("mlflow.db").rename("gone.db")
    first.log_metrics({"loss": 2.0}, 2)
    assert "was deleted" in capsys.readouterr().err or not Path("mlflow.db").exists()
    assert recorded_id(run) is None, "no summary names a run that is not there"
    second = opened(run, "new.db")  # another name: this process has the first one open
    second.log_metrics({"loss": 1.0}, 3)
    assert second.version != gone and recorded_id(run) == second.version
    assert history(run, "loss", "new.db") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    client = MlflowClient(tracking_uri=f"sqlite:///{Path('new.db').resolve()}")
    assert client.get_run(second.version).data.params == {"optimizer.lr": "0.1"}


def test_a_deleted_experiment_is_taken_back(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    opened(run)
    client = MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("anyflow")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    other = RunFolder(run.path.with_name("other"))
    other.path.mkdir()
    logger = opened(other)
    logger.log_metrics({"loss": 1.0}, 1)
    assert history(other, "loss") == [(1, 1.0)]
    assert "it is restored" in capsys.readouterr().err


def test_a_file_that_is_no_database_stops_nothing(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mlflow.db").write_text("this is no database, but a file that somebody has put there" * 20)
    logger = opened(run)
    logger.log_metrics({"loss": 1.0}, 1)
    close_tracking(logger, "FINISHED")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "not a database" in told and str(run.figures) in told
    assert recorded_id(run) is None
