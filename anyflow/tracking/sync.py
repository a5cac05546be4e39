"""Local runs copied to a tracking server: parameters, figures, tags, files, and which run stands below which.

Nothing is lost and nothing doubled: a run at the server carries the local run's id, only what it lacks is sent, and
what was sent whole is left alone. A server that dies in the middle leaves the rest for the next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from anyflow.errors import UserError, first_line
from anyflow.system.addresses import database_file
from anyflow.system.files import file_sha256, partial_folder
from anyflow.system.locks import NoLocks, locked
from anyflow.tracking.mlflow import PARENT_TAG, readable_store

LOCAL_TAG = "anyflow.local_run"
"""At the server: the id of the local run."""
DONE_TAG = "anyflow.synced"
"""At the server: digest of the local run as it was sent whole."""
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000
"""MLflow's limits of a batch."""


@dataclass
class Sent:
    """What a synchronisation did."""

    runs: int = 0
    unchanged: int = 0
    figures: int = 0
    files: int = 0


def sync(
    store: str, to: str, *, timeout: float = 10.0, on_progress: Callable[[int, int, str], None] | None = None
) -> Sent:
    """Copy every run of a local store to a server, as far as it is not there.

    Args:
        store: the local store's address.
        to: the server's.
        timeout: seconds that one request may take; it is tried three times.
        on_progress: called after each run.

    Raises:
        UserError: the server does not answer, refuses, or is too slow; what was sent stays sent.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    for name in ("mlflow", "urllib3", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with readable_store(store):
        local = MlflowClient(tracking_uri=store)
        local.search_experiments(max_results=1)
    server, home = MlflowClient(tracking_uri=to), (database_file(store) or Path("sync")).parent
    sent, total = Sent(), 0
    try:
        with _patience(timeout, retries=0):
            server.search_experiments(max_results=1)
        with _patience(timeout, retries=2):
            pairs = [(e, run) for e in local.search_experiments() for run in _runs(local, e.experiment_id)]
            total = len(pairs)
            remote_of: dict[str, str] = {}
            known: dict[str, tuple[str, dict[str, Any]]] = {}
            for done, (experiment, run) in enumerate(sorted(pairs, key=lambda pair: PARENT_TAG in pair[1].data.tags)):
                if experiment.name not in known:
                    known[experiment.name] = _remote_experiment(server, experiment.name)
                number, there = known[experiment.name]
                # never into the system's folder for temporary files, which may be small
                with nullcontext() if _folder_of(run) else partial_folder(home / "sync") as scratch:
                    copy = _Copy(local, server, run, remote_of, scratch)
                    remote_of[run.info.run_id] = copy.send(number, there.get(run.info.run_id), sent)
                if on_progress is not None:
                    on_progress(done + 1, total, run.info.run_name)
    except (MlflowException, RequestException, OSError) as error:
        whole = sent.runs + sent.unchanged
        raise UserError(
            f"--to {to}: the server does not take the runs ({_reason(error)}); {whole} of {total or 'all'} are there, "
            "nothing here is lost: start it again when the server answers"
        ) from error
    return sent


@contextmanager
def sending_alone(store: str) -> Iterator[None]:
    """Within the block no other process sends a store's runs: two at once would each make them at the server.

    Raises:
        UserError: another one does.
    """
    with ExitStack() as stack:
        try:
            place = (database_file(store) or Path("sync")).with_name(".sync.lock")
            stack.enter_context(locked(place, 0, passing=True))
        except BlockingIOError as error:
            raise UserError(f"another process is sending the runs of {store}: wait for its end") from error
        except (NoLocks, OSError):  # a disk without locks, or a read-only one
            pass
        yield


class _patience:
    """Within the block MLflow's requests time out and are tried again as given."""

    def __init__(self, timeout: float, retries: int) -> None:
        self.wanted = {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(timeout))),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        }

    def __enter__(self) -> None:
        self.before = {key: os.environ.get(key) for key in self.wanted}
        os.environ.update(self.wanted)

    def __exit__(self, *_: Any) -> None:
        for key, value in self.before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@dataclass
class _Copy:
    """One run on its way.

    Attributes:
        local, server: the stores. run: the local one.
        remote_of: maps local ids to the server's, of parents that were sent before.
        scratch: where copies of artifacts lie that are in no folder here.
    """

    local: Any
    server: Any
    run: Any
    remote_of: Mapping[str, str]
    scratch: Path | None

    @cached_property
    def histories(self) -> dict[str, list[Any]]:
        """Every point of every figure."""
        return {key: self.local.get_metric_history(self.run.info.run_id, key) for key in self.run.data.metrics}

    def send(self, experiment: str, there: Any, sent: Sent) -> str:
        """Send what the server lacks; returns the server's id of the run."""
        files = list(_files(self.local, self.run.info.run_id))
        digest = self.digest(files)
        if there is not None and there.data.tags.get(DONE_TAG) == digest:
            sent.unchanged += 1
            return there.info.run_id
        info, tags = self.run.info, self.tags()
        if there is None:
            there = self.server.create_run(experiment, info.start_time, {**tags, LOCAL_TAG: info.run_id}, info.run_name)
        run_id = there.info.run_id
        self.send_params(there)
        sent.figures += self.send_metrics(there)
        for key, value in tags.items():
            if there.data.tags.get(key) != value:
                self.server.set_tag(run_id, key, value)
        sent.files += self.send_files(run_id, files, was_whole=DONE_TAG in there.data.tags)
        if info.end_time is not None:
            self.server.set_terminated(run_id, info.status, info.end_time)
        self.server.set_tag(run_id, DONE_TAG, digest)
        sent.runs += 1
        return run_id

    def tags(self) -> dict[str, str]:
        """The run's tags, its parent's id being the server's."""
        tags = dict(self.run.data.tags)
        if PARENT_TAG in tags:
            tags[PARENT_TAG] = self.remote_of.get(tags[PARENT_TAG], tags[PARENT_TAG])
        return tags

    def digest(self, files: Sequence[tuple[Any, ...]]) -> str:
        """Of everything that a run has: it changes when something is added, or a file is written again."""
        files = [(path, size, file_sha256(self.place(path))) for path, size in files]
        points = {key: [_point(metric) for metric in history] for key, history in self.histories.items()}
        facts = [self.run.info.status, self.run.info.end_time, self.run.data.params, self.run.data.tags, points, files]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def place(self, path: str) -> str:
        """The local file of an artifact: where it lies, or, if the local store has its files elsewhere, a copy."""
        folder = _folder_of(self.run) or self.scratch
        assert folder is not None
        if folder == self.scratch and not (folder / path).exists():
            self.local.download_artifacts(self.run.info.run_id, path, str(folder))
        return str(folder / path)

    def send_params(self, there: Any) -> None:
        """Parameters that the server does not have."""
        from mlflow.entities import Param

        missing = [Param(k, v) for k, v in self.run.data.params.items() if k not in there.data.params]
        for start in range(0, len(missing), PARAMS_AT_ONCE):
            self.server.log_batch(there.info.run_id, params=missing[start : start + PARAMS_AT_ONCE])

    def send_metrics(self, there: Any) -> int:
        """Points of every figure that the server does not have; returns how many."""
        missing = []
        for key, history in self.histories.items():
            known = key in there.data.metrics
            has = {_point(m) for m in self.server.get_metric_history(there.info.run_id, key)} if known else set()
            missing += [metric for metric in history if _point(metric) not in has]
        for start in range(0, len(missing), METRICS_AT_ONCE):
            self.server.log_batch(there.info.run_id, metrics=missing[start : start + METRICS_AT_ONCE])
        return len(missing)

    def send_files(self, run_id: str, files: list[tuple[str, int]], was_whole: bool) -> int:
        """Files that the server does not have in this size; returns how many.

        All of them if the run ``was_whole`` there and has changed: a file that is written again may have kept its size.
        """
        has = set(_files(self.server, run_id)) if files and not was_whole else set()
        missing = [path for path, size in files if (path, size) not in has]
        for path in missing:
            self.server.log_artifact(run_id, self.place(path), str(Path(path).parent) if "/" in path else None)
        return len(missing)


def _folder_of(run: Any) -> Path | None:
    """Where a run's artifacts lie on this machine; None if they lie elsewhere."""
    address = urlparse(run.info.artifact_uri)
    return Path(url2pathname(address.path)) if address.scheme in ("", "file") else None


def _remote_experiment(server: Any, name: str) -> tuple[str, dict[str, Any]]:
    """The server's experiment of a name, made if need be, and its runs that came from here by their local id.

    Raises:
        UserError: somebody deleted it there.
    """
    found = server.get_experiment_by_name(name)
    if found is None:
        return server.create_experiment(name), {}
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"the experiment {name!r} was deleted at the server: restore it there (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}), and start this again"
        )
    runs = {run.data.tags.get(LOCAL_TAG): run for run in _runs(server, found.experiment_id)}
    return found.experiment_id, {local: run for local, run in runs.items() if local}


def _runs(client: Any, experiment: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1000, order_by=["attributes.start_time"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _files(client: Any, run_id: str, folder: str | None = None) -> Iterator[tuple[str, int]]:
    """``(path, bytes)`` of a run's artifacts."""
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir:
            yield from _files(client, run_id, entry.path)
        else:
            yield entry.path, int(entry.file_size or 0)


def _point(metric: Any) -> tuple[int, int, str]:
    return metric.step, metric.timestamp, repr(float(metric.value))


def _reason(error: BaseException) -> str:
    """The cause of a long error in a few words."""
    text = str(error)
    for mark, words in (("timed out", "it does not answer in time"), ("refused", "nothing listens there")):
        if mark in text:
            return words
    return first_line(error)[:200]
