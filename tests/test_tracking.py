"""Local first: what a run records never waits for a server, is sent later, once, and survives every failure."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from anyflow.errors import UserError
from anyflow.system.addresses import how_to_open
from anyflow.tracking.mlflow import PARENT_TAG, close_tracking, log_curve, open_tracking, record_curves, record_report
from anyflow.tracking.runs import RunFolder
from anyflow.tracking.sync import DONE_TAG, LOCAL_TAG, sync

PROJECT = Path(__file__).resolve().parents[1]
ROWS = [{"num_steps": n, "sliced_w1": 1.0 / n, "nothing": None} for n in (1, 4, 32)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with a parent, a training and a finished model, recorded in a local store."""
    folder = tmp_path_factory.mktemp("local")
    before = Path.cwd()
    os.chdir(folder)
    try:
        record()
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def local(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store, and the working folder is its own."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{template}/runs/mlflow.db"


def record() -> None:
    run = RunFolder(Path("runs/experiments/study/plain-0"))
    run.path.mkdir(parents=True)
    logger = open_tracking(
        run, uri="http://127.0.0.1:9", experiment="study", parameters={"optimizer.lr": 0.1}, tags={"data": "aa"}
    )
    assert logger is not None
    logger.log_metrics({"loss": 2.0}, step=1)
    logger.log_metrics({"loss": 1.0}, step=2)
    log_curve(logger, "before", ROWS)
    close_tracking(logger, "FINISHED")
    uri = "sqlite:///runs/mlflow.db"
    record_curves(run, uri=uri, experiment="study", curves={"after": ROWS}, tags={"anyflow.arm": "plain"})
    base = RunFolder(Path("runs/experiments/study/base-0"))
    base.path.mkdir()
    for _ in range(2):  # what stands there already is not added again
        record_curves(base, uri=uri, experiment="study", curves={"after": ROWS}, tags={"anyflow.arm": "base"})
    report = Path("report")
    (report / "deep").mkdir(parents=True)
    (report / "report.html").write_text("<p>it holds</p>")
    (report / "deep" / "figures.json").write_text("{}")
    record_report(uri, "study", {"plain": ROWS}, report, "FINISHED")


def runs_of(uri: str) -> dict[str, Any]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("study")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_runs_of_an_experiment_stand_below_its_own(local: str) -> None:
    runs = runs_of(local)
    assert set(runs) == {"study", "plain-0", "base-0"}
    parent = runs["study"].info.run_id
    assert {runs[name].data.tags[PARENT_TAG] for name in ("plain-0", "base-0")} == {parent}
    history = MlflowClient(tracking_uri=local).get_metric_history(runs["base-0"].info.run_id, "after/sliced_w1")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (4, 0.25), (32, 1 / 32)]
    assert runs["plain-0"].data.metrics.keys() >= {"loss", "before/sliced_w1", "after/sliced_w1"}
    assert runs["study"].data.metrics.keys() == {"plain/sliced_w1"} and runs["study"].info.status == "FINISHED"


def test_a_servers_address_is_not_waited_for(template: Path) -> None:
    """The recorded run had a dead server's address: it is in the local store, and was told how to get there."""
    assert (template / "runs" / "mlflow.db").is_file()


def check_copy(local: str, to: str) -> None:
    """Everything is at the server once, however often it is sent."""
    sent = sync(local, to)
    assert (sent.runs, sent.unchanged, sent.files) == (3, 0, 2) and sent.figures == 2 + 4 * 3
    again = sync(local, to)
    assert (again.runs, again.unchanged, again.figures, again.files) == (0, 3, 0, 0)
    here, there = runs_of(local), runs_of(to)
    assert set(there) == set(here)
    server = MlflowClient(tracking_uri=to)
    for name, run in there.items():
        assert run.data.params == here[name].data.params and run.data.metrics == here[name].data.metrics
        assert run.info.status == here[name].info.status and run.info.end_time == here[name].info.end_time
        assert run.data.tags[LOCAL_TAG] == here[name].info.run_id
    assert there["plain-0"].data.tags[PARENT_TAG] == there["study"].info.run_id
    history = server.get_metric_history(there["plain-0"].info.run_id, "after/sliced_w1")
    assert [point.step for point in history] == [1, 4, 32]
    fetched = server.download_artifacts(there["study"].info.run_id, "report/report.html")
    assert Path(fetched).read_text() == "<p>it holds</p>"


def test_what_was_cut_in_the_middle_is_completed(local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that fails after the run is made and some figures are there: the next time nothing is doubled."""
    from anyflow.tracking import sync as module

    to = f"sqlite:///{tmp_path}/server.db"
    number = MlflowClient(tracking_uri=to).create_experiment("study", artifact_location=(tmp_path / "files").as_uri())
    assert number
    send_files = module._Copy.send_files

    def fails(self: Any, *_: Any, **__: Any) -> int:
        raise OSError("the line is cut")

    monkeypatch.setattr(module._Copy, "send_files", fails)
    with pytest.raises(UserError, match=r"the line is cut\); 0 of 3 are there, nothing here is lost"):
        sync(local, to)
    assert [DONE_TAG in run.data.tags for run in runs_of(to).values()] == [False]
    monkeypatch.setattr(module._Copy, "send_files", send_files)
    sent = sync(local, to)
    assert sent.runs == 3 and len(runs_of(to)) == 3
    assert sync(local, to).figures == 0
    check_rewritten(local, to)


def check_rewritten(local: str, to: str) -> None:
    """A report that is written again is sent again, though it has kept its size."""
    there = MlflowClient(tracking_uri=to)
    path = Path(runs_of(local)["study"].info.artifact_uri.removeprefix("file://")) / "report/report.html"
    written = path.read_text()
    try:
        path.write_text(written.replace("holds", "fails"))
        assert sync(local, to).files == 2
        sent = there.download_artifacts(runs_of(to)["study"].info.run_id, "report/report.html")
        assert Path(sent).read_text() == "<p>it fails</p>"
    finally:
        path.write_text(written)


@pytest.mark.parametrize("to", ["", " ", "127.0.0.1:5000", "file:/tmp/mlruns", "http://", "runs/mlflow.db", "ftp://a"])
def test_what_is_no_server_is_refused(to: str, local: str) -> None:
    """An empty address was a new database in the working folder; the others were tracebacks."""
    from anyflow.cli.sync import sync as command

    with pytest.raises(UserError, match="is no server's address: give one such as http"):
        command(to=to, uri=local)


@pytest.mark.parametrize(
    "uri", ["", "mlruns", "file:mlruns", "127.0.0.1:5000", "sqlite://", "sqlite:///", "mysql://a/b"]
)
def test_what_is_no_store_is_refused_by_every_command(uri: str, local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow takes an empty address for a new database in the working folder."""
    from anyflow.cli.compare import compare
    from anyflow.cli.sync import sync as command
    from anyflow.cli.tracking import mlflow
    from anyflow.recipe import load_recipe

    sentence = "is no store of runs: give sqlite:///PATH.db, or a server such as http"
    with pytest.raises(UserError, match=sentence):
        command(to="http://127.0.0.1:9", uri=uri)
    with pytest.raises(UserError, match=sentence):
        mlflow(uri=uri)
    with pytest.raises(UserError, match=sentence):
        compare(["0" * 32, "1" * 32], uri=uri)
    if uri:
        with pytest.raises(UserError, match=f"run.tracking_uri='{uri}' {sentence}"):
            load_recipe("finetune/driving", overrides=[f"run.tracking_uri={uri}"])
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "uri",
    [
        *("http://u:pw@127.0.0.1:1", "https://pw@h", "http://h/x?token=pw", "u:pw@h:5000"),
        *("postgresql://u:pw@h/db", "mysql+pymysql://u:pw@h/db", "http://h:1/a@pw"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(uri: str, local: str) -> None:
    """A recipe is printed, recorded and published with the model."""
    from anyflow.cli.compare import compare
    from anyflow.cli.sync import sync as command
    from anyflow.cli.tracking import mlflow
    from anyflow.recipe import load_recipe

    for call in (
        lambda: load_recipe("finetune/driving", overrides=[f"run.tracking_uri={uri}"]),
        lambda: command(to=uri, uri=local),
        lambda: mlflow(uri=uri),
        lambda: compare(["0" * 32, "1" * 32], uri=uri),
    ):
        with pytest.raises(UserError, match="holds a name, a password or a signature: leave them out") as error:
            call()
        assert "pw" not in str(error.value)


@pytest.mark.parametrize("key", ["data.card", "model.weights", "model.codec", "stage.onpolicy.teacher", "run.out"])
def test_no_field_of_a_recipe_takes_a_password(key: str) -> None:
    from anyflow.recipe import load_recipe

    for value in ("https://u:pw@h/x.tar", "a.tar::s3://u:pw@bucket/x.tar"):
        with pytest.raises(UserError, match=f"{key} holds a name or a password") as error:
            load_recipe("finetune/driving", overrides=[f"{key}={value}"])
        assert "pw" not in str(error.value)


def test_mlflows_own_variable_is_told_to_be_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:pw@h")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for uri, lines in (("sqlite:///m.db", ["MLFLOW_TRACKING_URI is not used: set run.tracking_uri"]), ("", [])):
        logger = open_tracking(run, uri=uri, experiment="", parameters={}, tags={})
        close_tracking(logger, "FINISHED")
        assert capsys.readouterr().err.splitlines() == lines


def test_a_store_is_opened_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make mlflow` opens that of its folder: it is no answer elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert how_to_open("sqlite:///runs/mlflow.db") == how_to_open(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert how_to_open("sqlite:///runs/mlflow.db") == "anyflow mlflow --serve"
    assert how_to_open("sqlite:////a b/m.db") == "anyflow mlflow --serve --uri 'sqlite:////a b/m.db'"
    assert how_to_open("http://h:5000") == "open http://h:5000 in a browser"


def test_what_is_no_database_is_told(local: str) -> None:
    from anyflow.cli.tracking import mlflow

    Path("notes.db").write_text("shopping list")
    with pytest.raises(UserError, match=r"notes\.db is no SQLite database"):
        mlflow(uri="sqlite:///notes.db")
    with pytest.raises(UserError, match="is a folder: name the database's file in it"):
        mlflow(uri="sqlite:///.")
    content = bytearray(Path(local.removeprefix("sqlite:///")).read_bytes())
    content[100:8000] = b"\xff" * 7900
    Path("broken.db").write_bytes(content)
    for call in (lambda: mlflow(uri="sqlite:///broken.db"), lambda: sync("sqlite:///broken.db", "http://127.0.0.1:9")):
        with pytest.raises(UserError, match=r"broken\.db cannot be read \(.*name another store by --uri") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_home_folder_in_an_address_is_meant(local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyflow.system.addresses import check_store
    from anyflow.tracking.mlflow import local_store

    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_store("sqlite:///~/deep/mlflow.db")[0] == f"sqlite:///{tmp_path}/deep/mlflow.db"
    assert check_store("sqlite:///~/new.db", "--uri", is_there=False) == f"sqlite:///{tmp_path}/new.db"


def test_long_parameters_are_recorded_whole_and_longer_ones_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of fifty cards was cut at 500 characters without a word."""
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    parameters = {"data.card": "a" * 6000, "model.negative_prompt": "b" * 6001}
    logger = open_tracking(run, uri="sqlite:///mlflow.db", experiment="", parameters=parameters, tags={})
    close_tracking(logger, "FINISHED")
    stored = MlflowClient(tracking_uri="sqlite:///mlflow.db").get_run(run.status["mlflow_run_id"]).data.params
    assert stored == {"data.card": "a" * 6000, "model.negative_prompt": "b" * 6000}
    assert (
        capsys.readouterr().err == "MLflow takes 6000 of model.negative_prompt's 6001 characters; recipe.yaml has all\n"
    )


STARTS = """
import sys, time
from pathlib import Path
from anyflow.tracking.mlflow import close_tracking, open_tracking
from anyflow.tracking.runs import RunFolder
import mlflow, sqlalchemy, alembic
run = RunFolder(Path(sys.argv[1]))
run.path.mkdir()
print("ready", flush=True)
sys.stdin.readline()
close_tracking(open_tracking(run, uri="sqlite:///mlflow.db", experiment="study", parameters={}, tags={}), "FINISHED")
"""


@pytest.mark.slow
def test_trainings_that_start_together_make_one_database(tmp_path: Path) -> None:
    """Each made tables of its own accord; none could use what came of it, then or later."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    others = [
        subprocess.Popen([sys.executable, "-c", STARTS, f"run-{n}"], cwd=tmp_path, env=environment, **pipes)  # type: ignore[call-overload]
        for n in range(2)
    ]
    assert [other.stdout.readline() for other in others] == ["ready\n"] * 2
    for other in others:
        other.stdin.write("go\n")
        other.stdin.flush()
    told = [other.communicate(timeout=120)[1] for other in others]
    assert not any("does not take" in text for text in told), told
    assert set(runs_of(f"sqlite:///{tmp_path}/mlflow.db")) == {"study", "run-0", "run-1"}
    assert not list(tmp_path.glob("*.partial"))


def test_an_experiment_that_was_deleted_at_the_server_is_one_sentence(local: str, tmp_path: Path) -> None:
    to = f"sqlite:///{tmp_path}/server.db"
    server = MlflowClient(tracking_uri=to)
    server.delete_experiment(server.create_experiment("study"))
    with pytest.raises(UserError, match=r"'study' was deleted at the server: restore it there \(mlflow experiments"):
        sync(local, to)


def test_what_cannot_be_served_is_one_sentence(local: str) -> None:
    from anyflow.cli.tracking import mlflow

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} cannot be served on .*: give another one"):
            mlflow(uri=local, serve=True, port=port)
    with pytest.raises(UserError, match="is a server already: open it in a browser"):
        mlflow(uri="http://127.0.0.1:9", serve=True)


def test_runs_are_sent_by_one_process_at_a_time(local: str) -> None:
    """Two at once would each make the runs that the server lacks."""
    from anyflow.cli.sync import sync as command
    from anyflow.tracking.sync import sending_alone

    with sending_alone(local), pytest.raises(UserError, match="another process is sending the runs of sqlite"):
        command(to="http://127.0.0.1:9", uri=local)
    with pytest.raises(UserError, match="nothing listens there"):
        command(to="http://127.0.0.1:9", uri=local)


def test_a_dead_server_is_one_sentence(local: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="nothing listens there") as caught:
        sync(local, f"http://127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers_is_one_sentence(local: str) -> None:
    with socket.socket() as stalls:
        stalls.bind(("127.0.0.1", 0))
        stalls.listen()
        with pytest.raises(UserError, match="does not answer in time"):
            sync(local, f"http://127.0.0.1:{stalls.getsockname()[1]}", timeout=1)


@pytest.fixture
def server(tmp_path: Path, serve: Any) -> Iterator[str]:
    """A real MLflow server on this machine."""
    place = tmp_path / "server"
    place.mkdir()
    stores = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", str(place / "files")]
    with serve("-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1", *stores, cwd=place) as address:
        yield address


@pytest.mark.slow
def test_a_real_server_gets_everything_once(local: str, server: str) -> None:
    check_copy(local, server)


@pytest.mark.slow
def test_the_command_says_what_it_did(local: str, server: str, anyflow: Any) -> None:
    done = anyflow("sync", "--to", server, "--uri", local, timeout=300)
    assert done.returncode == 0 and "3 runs sent" in done.stdout, done.stderr
    dead = anyflow("sync", "--to", "http://127.0.0.1:9", "--uri", local, timeout=300)
    assert dead.returncode == 2 and dead.stderr.startswith("anyflow: --to http://127.0.0.1:9") and dead.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_server_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    """Whatever it started ends with it, and nothing is told but by it."""
    child = tmp_path / "child"
    server = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'part')!r}).write_text(str(child.pid))\n"
        f"pathlib.Path({str(tmp_path / 'part')!r}).rename({str(child)!r})\n"
        "time.sleep(60)\n"
    )
    call = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from anyflow.cli.tracking import serve_until_stopped\n"
        f"sys.exit(serve_until_stopped([sys.executable, '-c', {server!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not child.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0 and told == b""
    deadline = time.monotonic() + 60
    while is_alive(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_adapters_file_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    """A run that starts from another adapter under the same name is another run."""
    from anyflow.tracking.fingerprints import model_fingerprint

    (tmp_path / "style.safetensors").write_bytes(b"one")
    before = model_fingerprint(str(tmp_path / "style.safetensors"))
    (tmp_path / "style.safetensors").write_bytes(b"two")
    assert before and before != model_fingerprint(str(tmp_path / "style.safetensors"))
