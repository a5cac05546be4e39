"""MLflow: where runs are compared. A run is logged with its recipe, code, machine, curves, pictures and files.

Tracking must never cost a training: a store that fails is reported once and the run goes on, its files being on disk.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import MLFlowLogger

from anyflow.runs import RunFolder

EXPERIMENT = "anyflow"


def open_tracking(
    run: RunFolder, *, uri: str, experiment: str, parameters: Mapping[str, Any], tags: Mapping[str, str]
) -> MLFlowLogger | None:
    """A logger on a new MLflow run, or on the resumed run's own; None if tracking is off or out of reach."""
    if not uri:
        return None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        artifacts = None
        if uri.startswith("sqlite:///"):
            store = Path(uri.removeprefix("sqlite:///")).resolve()
            store.parent.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{store}", (store.parent / "mlflow-artifacts").as_uri()
        logger = MLFlowLogger(
            experiment_name=experiment,
            run_name=run.name,
            tracking_uri=uri,
            artifact_location=artifacts,
            run_id=run.status.get("mlflow_run_id"),
            tags={**tags, **code_version(), **machine()},
        )
        client, run_id = logger.experiment, logger.run_id
        if run.status.get("mlflow_run_id") is None:
            for start in range(0, len(parameters), 50):
                part = dict(list(parameters.items())[start : start + 50])
                logger.log_hyperparams({key: str(value)[:500] for key, value in part.items()})
        client.set_terminated(run_id, status="RUNNING")  # a resumed run would otherwise stay FINISHED
        run.note(mlflow_run_id=run_id)
        return logger
    except Exception as error:  # any store, any failure: training matters more
        print(f"MLflow at {uri} cannot be used ({error}); the run goes on without it", file=sys.stderr)
        return None


def log_artifacts(logger: MLFlowLogger | None, folder: Path, name: str) -> None:
    """Copy a folder's files into the run's artifacts."""
    _quietly(logger, lambda client, run_id: client.log_artifacts(run_id, str(folder), name))


def log_artifact(logger: MLFlowLogger | None, path: Path) -> None:
    """Copy one file into the run's artifacts."""
    _quietly(logger, lambda client, run_id: client.log_artifact(run_id, str(path)))


def log_curve(logger: MLFlowLogger | None, when: str, rows: list[Mapping[str, Any]]) -> None:
    """Log a curve's figures, with the number of steps as MLflow's step: ``before/motion_accuracy`` over 1, 2, 4 ..."""

    def send(client: Any, run_id: str) -> None:
        for row in rows:
            for name, value in row.items():
                if name != "num_steps" and isinstance(value, int | float) and value == value:
                    client.log_metric(run_id, f"{when}/{name}", float(value), step=int(row["num_steps"]))

    _quietly(logger, send)


def close_tracking(logger: MLFlowLogger | None, status: str) -> None:
    """End the MLflow run as FINISHED, KILLED or FAILED."""
    _quietly(logger, lambda client, run_id: client.set_terminated(run_id, status=status))


def code_version() -> dict[str, str]:
    """The commit that runs, and whether the tree differs from it."""

    def git(*words: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain")))}
    except (OSError, subprocess.CalledProcessError):
        return {"git.commit": "unknown"}


def machine() -> dict[str, str]:
    """What the run stands on."""
    facts = {
        "machine.cpus": str(os.cpu_count()),
        "machine.platform": platform.platform(),
        "machine.python": platform.python_version(),
        "machine.devices": "cpu",
    }
    if torch.cuda.is_available():
        facts["machine.devices"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return facts | {f"version.{name}": version(name) for name in ("torch", "lightning", "diffusers", "anyflow")}


def _quietly(logger: MLFlowLogger | None, action: Any) -> None:
    if logger is None:
        return
    try:
        action(logger.experiment, logger.run_id)
    except Exception as error:
        print(f"MLflow did not take this: {error}", file=sys.stderr)
