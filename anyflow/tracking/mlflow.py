"""MLflow: where runs are compared. A run is logged with its recipe, code, machine, curves, pictures and files.

Local first: runs are recorded in a database on this machine, whatever the recipe names; :mod:`anyflow.tracking.sync`
sends them to a server when one asks for it. Tracking must never cost a training: see :mod:`anyflow.tracking.run_log`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from anyflow.errors import UserError, first_line
from anyflow.system.addresses import DATABASE, LOCAL_DATABASE, database_file, tell_unused_variable
from anyflow.system.files import replacing
from anyflow.system.locks import locked
from anyflow.tracking.run_log import RunLogger, check_database
from anyflow.tracking.runs import RunFolder

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # no word on making its tables

EXPERIMENT = "anyflow"
"""MLflow's experiment of runs that belong to none."""
PARENT_TAG = "mlflow.parentRunId"
TREE = ("--", ":(top)", ":(top,exclude)experiments/results")
"""The part of the repository that results depend on, for git."""
ROLE_TAG = "anyflow.role"
MAX_PARAM = 6000
"""Characters of a parameter's value; MLflow refuses longer ones."""
MAKING = 60.0
"""Seconds to wait for another process that makes the database."""


def local_store(uri: str) -> tuple[str, str]:
    """``(database, folder of artifacts)`` that runs are recorded in: the database of a ``sqlite:///`` address.

    A server's address gives the usual database of this machine, and a line that says how the runs get there.
    """
    file = database_file(uri)
    if file is None:
        print(f"runs are recorded in {LOCAL_DATABASE}; send them by: anyflow sync --to {uri}", file=sys.stderr)
    store = (file or Path(LOCAL_DATABASE.removeprefix(DATABASE))).resolve()
    store.parent.mkdir(parents=True, exist_ok=True)
    return f"{DATABASE}{store}", (store.parent / "mlflow-artifacts").as_uri()


@contextmanager
def _alone_with(store: str) -> Iterator[None]:
    """Within the block nobody else makes the database or an experiment in it; the database is there, and whole.

    MLflow makes its tables one by one, and two that do so at once leave a database that neither can use. One that is
    killed meanwhile leaves one, too: so it is made beside its place.
    """
    database = _database(store)
    with locked(database.with_name(f".{database.name}.lock"), MAKING):
        if not database.exists():
            from mlflow import MlflowClient

            with replacing(database) as partial:
                partial.unlink(missing_ok=True)
                MlflowClient(tracking_uri=f"{DATABASE}{partial}").search_experiments(max_results=1)
        yield


def open_tracking(
    run: RunFolder, *, uri: str, experiment: str, parameters: Mapping[str, Any], tags: Mapping[str, str]
) -> RunLogger | None:
    """A logger on a new MLflow run, or on the resumed run's own; None if tracking is off.

    A run of an ``experiment`` stands below that experiment's own run.
    """
    if not uri:
        return None
    tell_unused_variable("run.tracking_uri")
    try:
        store, artifacts = local_store(uri)
    except OSError as error:
        print(f"MLflow at {uri} cannot be used ({first_line(error)}); the run goes on without it", file=sys.stderr)
        return None

    def connect() -> tuple[Any, str, bool]:
        with _alone_with(store):
            parent = {PARENT_TAG: experiment_run(store, artifacts, experiment)[1]} if experiment else {}
            client, number = _experiment(store, artifacts, experiment or EXPERIMENT)
        run_id = _known_run(client, run.status.get("mlflow_run_id"))
        if run_id is not None:
            client.set_terminated(run_id, status="RUNNING")  # a resumed run would otherwise stay FINISHED
            return client, run_id, False
        made = client.create_run(number, run_name=run.name, tags={**tags, **parent, **code_version(), **machine()})
        _log_params(client, made.info.run_id, parameters)
        return client, made.info.run_id, True

    logger = RunLogger(run, _database(store), connect)
    logger.deliver()
    return logger


def _database(store: str) -> Path:
    return Path(store.removeprefix(DATABASE))


def _experiment(store: str, artifacts: str, name: str) -> tuple[Any, str]:
    """MLflow's client and an experiment's id: made if there is none, and taken back if somebody has deleted it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    known = client.get_experiment_by_name(name)
    if known is None:
        return client, client.create_experiment(name, artifact_location=artifacts)
    if known.lifecycle_stage == "deleted":
        client.restore_experiment(known.experiment_id)
        print(f"MLflow's experiment {name!r} was deleted: it is restored", file=sys.stderr)
    return client, known.experiment_id


def _known_run(client: Any, run_id: str | None) -> str | None:
    """The id of a run that MLflow still has, else None."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return run_id if client.get_run(run_id).info.lifecycle_stage == "active" else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def experiment_run(store: str, artifacts: str, name: str) -> tuple[Any, str]:
    """MLflow's client and the id of an experiment's own run, below which its runs stand; made if there is none."""
    client, number = _experiment(store, artifacts, name)
    found = client.search_runs([number], filter_string=f"tags.`{ROLE_TAG}` = 'experiment'", max_results=1)
    if found:
        return client, found[0].info.run_id
    made = client.create_run(number, run_name=name, tags={ROLE_TAG: "experiment", **code_version(), **machine()})
    return client, made.info.run_id


def record_curves(
    run: RunFolder,
    *,
    uri: str,
    experiment: str,
    curves: Mapping[str, Iterable[Mapping[str, Any]]],
    tags: dict[str, str],
) -> None:
    """Add curves to the run of one arm and seed, which a finished model does not have yet.

    Args:
        run: the arm's folder.
        uri: the recipe's or the usual database; empty: tracking is off.
        experiment: name of the experiment.
        curves: name of the curve (``after``, ``after/driving``): its rows.
        tags: added to the run.
    """

    def record(client: Any, parent: str) -> None:
        run_id = _known_run(client, run.status.get("mlflow_run_id"))
        if run_id is None:
            number = client.get_run(parent).info.experiment_id
            made = client.create_run(
                number, run_name=run.name, tags={PARENT_TAG: parent, **code_version(), **machine()}
            )
            run_id = made.info.run_id
            run.note(mlflow_run_id=run_id)
            client.set_terminated(run_id)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        for name, rows in curves.items():
            _log_rows(client, run_id, name, rows)

    _with_experiment(uri, experiment, record)


def record_report(
    uri: str, experiment: str, curves: Mapping[str, Iterable[Mapping[str, Any]]], folder: Path, state: str
) -> None:
    """Give an experiment's own run its arms' mean curves and its report as artifacts."""

    def record(client: Any, run_id: str) -> None:
        for name, rows in curves.items():
            _log_rows(client, run_id, name, rows)
        client.log_artifacts(run_id, str(folder), "report")
        client.set_terminated(run_id, status=state)

    _with_experiment(uri, experiment, record)


def _with_experiment(uri: str, experiment: str, action: Any) -> None:
    if not uri:
        return
    try:
        store, artifacts = local_store(uri)
        check_database(_database(store))
        with _alone_with(store):
            found = experiment_run(store, artifacts, experiment)
        action(*found)
    except Exception as error:
        print(f"MLflow did not take this: {first_line(error)}", file=sys.stderr)


def log_artifacts(logger: RunLogger | None, folder: Path, name: str) -> None:
    """Copy a folder's files into the run's artifacts."""
    if logger is not None:
        logger.later(lambda client, run_id: client.log_artifacts(run_id, str(folder), name))


def log_artifact(logger: RunLogger | None, path: Path) -> None:
    """Copy one file into the run's artifacts."""
    if logger is not None:
        logger.later(lambda client, run_id: client.log_artifact(run_id, str(path)))


def log_curve(logger: RunLogger | None, when: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Log a curve's figures, with the number of steps as MLflow's step: ``before/motion_accuracy`` over 1, 2, 4 ..."""
    if logger is not None:
        for row in rows:
            logger.log_metrics({f"{when}/{key}": value for key, value in _numbers(row)}, int(row["num_steps"]))


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures of a curve's row."""
    for key, value in row.items():
        if key != "num_steps" and isinstance(value, int | float) and value == value:
            yield key, float(value)


def _log_rows(client: Any, run_id: str, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Log a curve's numbers, but those that stand there already: a report that is written again adds nothing.

    Of several points of a step count the newest stands.
    """
    from mlflow.entities import Metric

    known = [key for key in client.get_run(run_id).data.metrics if key.startswith(f"{name}/")]
    points = [(key, point) for key in known for point in client.get_metric_history(run_id, key)]
    points.sort(key=lambda pair: pair[1].timestamp)
    there = {(key, point.step): point.value for key, point in points}

    now = int(time.time() * 1000)
    figures = [
        Metric(f"{name}/{key}", value, now, int(row["num_steps"]))
        for row in rows
        for key, value in _numbers(row)
        if there.get((f"{name}/{key}", int(row["num_steps"]))) != value
    ]
    for start in range(0, len(figures), 500):
        client.log_batch(run_id, metrics=figures[start : start + 500])


def _log_params(client: Any, run_id: str, parameters: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    texts = {key: str(value) for key, value in parameters.items()}
    for key, text in texts.items():
        if len(text) > MAX_PARAM:
            print(f"MLflow takes {MAX_PARAM} of {key}'s {len(text)} characters; recipe.yaml has all", file=sys.stderr)
    params = [Param(key, text[:MAX_PARAM]) for key, text in texts.items()]
    for start in range(0, len(params), 50):
        client.log_batch(run_id, params=params[start : start + 50])


def close_tracking(logger: RunLogger | None, status: str) -> None:
    """End the MLflow run as FINISHED, KILLED or FAILED."""
    if logger is not None:
        logger.close(status)


def code_version() -> dict[str, str]:
    """The commit that runs, and whether the tree differs from it; reports of experiments do not count."""

    def git(*words: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain", *TREE)))}
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
    for name in ("torch", "lightning", "diffusers", "anyflow"):
        with suppress(PackageNotFoundError):  # run from its folder, without installation
            facts[f"version.{name}"] = version(name)
    return facts


def newest_runs(uri: str, count: int) -> list[dict[str, Any]]:
    """Name, state, start, figures and id of the newest runs of all experiments.

    Raises:
        UserError: the store cannot be read.
    """
    from datetime import datetime

    from mlflow import MlflowClient

    with readable_store(uri):
        client = MlflowClient(tracking_uri=uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, max_results=count, order_by=["attributes.start_time DESC"])
    return [
        {
            "name": run.info.run_name,
            "status": run.info.status,
            "started": datetime.fromtimestamp(run.info.start_time / 1000).isoformat(" ", "seconds"),
            "run_id": run.info.run_id,
            "metrics": dict(run.data.metrics),
        }
        for run in found
    ]


@contextmanager
def readable_store(uri: str) -> Iterator[None]:
    """Within the block a store is read; whatever is wrong with it becomes one sentence.

    Raises:
        UserError: see above.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow's own, the database's, the network's
        raise UserError(f"{uri} cannot be read ({first_line(error)[:200]}): name another store by --uri") from error
