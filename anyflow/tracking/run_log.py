"""What a run records, local first: a line in its own folder, then MLflow, which may be locked, full, deleted or broken.

MLflow gets what it lacks when it can be had. It costs a training a second at most, is complained about once, and asked
again now and then; a run that goes on sends what was left, or all of it to a database that was made anew.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from anyflow.errors import first_line
from anyflow.tracking.runs import RunFolder

PATIENCE = 1.0
"""Seconds to wait for a database that somebody else is writing to."""

PAUSE = 60.0
"""Seconds before a database that failed is asked again."""

POINTS_AT_ONCE = 1000
"""MLflow's limit of a batch."""

UNSENT = "mlflow_unsent"
"""In a run's status: where in its figures what MLflow lacks begins."""

Task = Callable[[Any, str], None]
"""``(client, run_id)``: something for MLflow."""


class RunLogger(Logger):
    """Records a run's figures in its folder and in MLflow.

    Args:
        run: its folder.
        database: MLflow's.
        connect: makes MLflow's run, or finds it: the client, the run's id and whether it is a new one.
    """

    def __init__(self, run: RunFolder, database: Path, connect: Callable[[], tuple[Any, str, bool]]) -> None:
        super().__init__()
        self.run, self.database = run, database
        self._connect = connect
        self._connected: tuple[Any, str] | None = None
        self._file: tuple[int, int] | None = None  # the database that was connected to
        known = self.run.status  # of a resumed run: MLflow has all figures, or those before a position
        self._sent = known.get(UNSENT, _end_line(run.figures) if known.get("mlflow_run_id") else 0)
        self._tasks: list[Task] = []
        self._has_complained = False
        self._again = 0.0  # when the database is asked again

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.name

    @property
    def version(self) -> str:
        """MLflow's id of the run, as far as it is known."""
        return str(self.run.status.get("mlflow_run_id") or "")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the recipe's fields are MLflow's parameters from the start."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record figures of a step."""
        figures = {name: float(value) for name, value in metrics.items()}
        line = json.dumps({"step": step or 0, "time": int(time.time() * 1000), "figures": figures})
        try:
            with open(self.run.figures, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self._complain(f"{self.run.figures} cannot be written ({first_line(error)}): figures are lost")
        self.deliver()

    def later(self, task: Task) -> None:
        """Have something done with MLflow's run, now if it can be had."""
        self._tasks.append(task)
        self.deliver()

    def finalize(self, status: str = "success") -> None:
        """Send what is left; the run may have more to record, so it is closed elsewhere."""
        self.deliver()

    def close(self, state: str) -> None:
        """End MLflow's run as FINISHED, KILLED or FAILED; the last try to send what is left."""
        self._again = 0.0
        self.later(lambda client, run_id: client.set_terminated(run_id, status=state))

    def deliver(self) -> None:
        """Give MLflow what it lacks, unless it failed a moment ago."""
        if time.monotonic() < self._again:
            return
        try:
            client, run_id = self._mlflow()
            self._send_figures(client, run_id)
            while self._tasks:
                self._tasks[0](client, run_id)
                self._tasks.pop(0)
        except Exception as error:  # any store, any failure: training matters more
            self._again = time.monotonic() + PAUSE
            with suppress(OSError):
                self.run.note(**{UNSENT: self._sent})
            self._complain(
                f"MLflow ({self.database}) does not take this run's figures ({first_line(error)}); the run goes on, "
                f"they are in {self.run.figures}, and MLflow is asked again now and then"
            )

    def _complain(self, sentence: str) -> None:
        """Print it, once a run."""
        if not self._has_complained:
            self._has_complained = True
            print(sentence, file=sys.stderr)

    def _mlflow(self) -> tuple[Any, str]:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is reported here, once
        check_database(self.database)
        if self._connected is None:
            client, run_id, is_new = self._connect()
            self._connected, self._file = (client, run_id), _identity(self.database)
            self._sent = 0 if is_new else self._sent
            self.run.note(mlflow_run_id=run_id, mlflow_database=str(self.database))
        elif _identity(self.database) != self._file:
            raise OSError("the database was deleted; a resumed run makes a new one")
        return self._connected

    def _send_figures(self, client: Any, run_id: str) -> None:
        from mlflow.entities import Metric

        points, end = _figures(self.run.figures, self._sent)
        if end == self._sent:
            return
        metrics = [Metric(name, value, moment, step) for name, value, moment, step in points]
        for start in range(0, len(metrics), POINTS_AT_ONCE):
            client.log_batch(run_id, metrics=metrics[start : start + POINTS_AT_ONCE])
        self._sent = end
        if UNSENT in self.run.status:
            self.run.note(**{UNSENT: end})


def check_database(path: Path) -> None:
    """That an SQLite database can be written to, or is yet to be made; MLflow itself would wait 20 s a call.

    Raises:
        sqlite3.Error: it is locked, read-only, or none.
    """
    if path.exists():
        with closing(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")


def recorded_id(run: RunFolder) -> str | None:
    """MLflow's id of a run, if its database is there and has it."""
    run_id, database = run.status.get("mlflow_run_id"), run.status.get("mlflow_database")
    if not run_id or not database or not Path(database).exists():
        return None
    try:
        with closing(sqlite3.connect(database, timeout=PATIENCE)) as connection:
            found = connection.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
    except sqlite3.Error:
        return None
    return run_id if found else None


def _end_line(path: Path) -> int:
    """The size of a file of lines, the last of which is ended first if a kill has cut it."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        size = file.seek(0, 2)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                return size + file.write(b"\n")
    return size


def _figures(path: Path, start: int) -> tuple[list[tuple[str, float, int, int]], int]:
    """``(name, value, milliseconds, step)`` of whole lines from a position on, and where they end."""
    if not path.exists():
        return [], start
    with open(path, "rb") as file:
        file.seek(start)
        whole, _, _ = file.read().rpartition(b"\n")
    end = start + len(whole) + 1 if whole else start
    return [point for line in whole.split(b"\n") for point in _points(line)], end


def _points(line: bytes) -> Iterator[tuple[str, float, int, int]]:
    try:
        entry = json.loads(line)
        yield from ((name, value, entry["time"], entry["step"]) for name, value in entry["figures"].items())
    except (ValueError, KeyError, TypeError, AttributeError):  # a line that a kill has cut
        return


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
