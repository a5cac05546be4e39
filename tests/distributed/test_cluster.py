"""Two Ray nodes on one machine make the bytes that one process makes; nodes and drivers are killed in the middle."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))
from footage_files import put, video

ray = pytest.importorskip("ray", reason="the cluster is an extra of its own: pip install .[cluster]")
pytestmark = pytest.mark.slow

KILLS = 10
SETTINGS = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Sums keep their order, and workers are not starved by what else runs on this machine."""
IMPORT = ["--frames", "4", "--stride", "0.125", "--default-caption", "x", "--heldout", "0.2", "--keep-duplicates"]
IMPORT += ["--clips", "40", "--scene-cuts", "0", "--json"]


def free_port() -> int:
    """One that neither the system nor Ray gives away by itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as door, suppress(OSError):
            door.bind(("", port))
            return port


class Cluster:
    """A head and further nodes of one CPU each, every one in a process group of its own."""

    def __init__(self, token: str = "") -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.token = token
        self.folder = tempfile.TemporaryDirectory(prefix="anyflow-ray-")  # short: sockets lie in it
        self.nodes: list[subprocess.Popen[bytes]] = []
        place = ["--temp-dir", self.folder.name]
        self.start("--head", "--port", self.address.rpartition(":")[2], "--include-dashboard", "false", *place)

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever belongs to it."""
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} if self.token else {"RAY_AUTH_MODE": "disabled"}
        return {**os.environ, **auth, **SETTINGS}

    def start(self, *words: str) -> None:
        """Start a node, and wait until it is there."""
        log = Path(self.folder.name) / f"node-{len(self.nodes)}.log"
        script = "from ray.scripts.scripts import main; main()"
        command = [sys.executable, "-c", script, "start", "--block", "--num-cpus", "1"]
        with log.open("wb") as file:
            node = subprocess.Popen(
                [*command, "--object-store-memory", "100000000", *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.nodes.append(node)
        limit = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text(errors="replace"):
            assert node.poll() is None and time.monotonic() < limit, log.read_text(errors="replace")
            time.sleep(0.2)

    def add(self) -> None:
        """One more node."""
        self.start("--address", self.address)

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As when a machine loses its power."""
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def close(self) -> None:
        """End all of it."""
        for node in reversed(self.nodes):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    node.wait(timeout=20)
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
        self.folder.cleanup()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(secrets.token_hex(32))
    try:
        made.add()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Footage for 12 jobs."""
    return make_films(tmp_path_factory.mktemp("films"), 24)


def make_films(folder: Path, count: int) -> Path:
    """Two of them make a job."""
    for number in range(count):
        put(folder / f"v{number:03d}.mp4", video(number, 47, 8))
    return folder


def start(cluster: Cluster | None, project: Path, *words: str) -> subprocess.Popen[str]:
    """The command line, on the cluster or in processes of this machine."""
    engine = ["--engine", "ray", "--address", cluster.address] if cluster else []
    environment = cluster.environment if cluster else {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "anyflow", *words, *engine],
        cwd=project,
        env={**environment, "PYTHONPATH": str(project)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(cluster: Cluster | None, project: Path, *words: str) -> tuple[dict[str, Any], str]:
    """What a command prints, and what it says on stderr; it succeeds."""
    process = start(cluster, project, *words)
    printed, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    return json.loads(printed), told


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, without the name of the folder, which a card's command has."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data.replace(str(folder).encode(), b"OUT") for name, data in found.items()}


def kill_in_the_middle(cluster: Cluster, process: subprocess.Popen[str], place: Path, pattern: str) -> str:
    """Kill the second node once there is a first piece; what the driver says on stderr. It succeeds."""
    limit = time.monotonic() + 300
    while not any(place.rglob(pattern)):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    cluster.kill(cluster.nodes[1])
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    return told


def test_an_import_whose_node_is_killed(cluster: Cluster, films: Path, project: Path, tmp_path: Path) -> None:
    words = ["data", "import", str(films), *IMPORT, "--to"]
    run(None, project, *words, str(tmp_path / "here/out"), "--workers", "0")
    process = start(cluster, project, *words, str(tmp_path / "ray/out"))
    kill_in_the_middle(cluster, process, tmp_path / "ray", "*.json")
    assert contents(tmp_path / "ray/out") == contents(tmp_path / "here/out")
    assert [path.name for path in (tmp_path / "ray").iterdir()] == ["out"], "nothing else is left"


def test_a_node_that_comes_later_gets_work(project: Path, tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", 120)
    made = Cluster(secrets.token_hex(32))
    try:
        process = start(made, project, "data", "import", str(films), *IMPORT, "--to", str(tmp_path / "out"))
        made.add()
        started = False
        while not started and process.poll() is None:
            command = ["ps", "-eo", "pid,ppid,pgid,args"]
            rows = [row.split(None, 3) for row in subprocess.check_output(command, text=True).splitlines()]
            node = {pid for pid, _, group, _ in rows if group == str(made.nodes[1].pid)}
            started = any(parent in node and "ray::_Worker.do" in name for _, parent, _, name in rows)
        _, told = process.communicate(timeout=600)
        assert started and process.returncode == 0, told
    finally:
        made.close()


def test_an_encoding_whose_node_is_killed(cluster: Cluster, small_model: Path, project: Path, tmp_path: Path) -> None:
    words = ["data", "encode", "driving", "--model", str(small_model), "--frames", "5", "--size", "32x32", "--json"]
    here, _ = run(None, project, *words, "--out", str(tmp_path / "here"))
    process = start(cluster, project, *words, "--out", str(tmp_path / "ray"))
    kill_in_the_middle(cluster, process, tmp_path / "ray", "*.done")
    made = tmp_path / "ray" / Path(here["caches"]["train"]).name
    assert contents(made) == contents(Path(here["caches"]["train"]))
    assert list((tmp_path / "ray").iterdir()) == [made], "nothing else is left"


def test_a_driver_that_is_killed_again_and_again(cluster: Cluster, films: Path, project: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments: the next one goes on, and at the end nothing is lost and nothing is there twice."""
    words, draw = ["data", "import", str(films), *IMPORT, "--to"], random.Random(0)
    run(None, project, *words, str(tmp_path / "here/out"), "--workers", "0")
    out, work = tmp_path / "ray/out", tmp_path / "ray/.out.import"
    pieces: list[int] = []
    for _ in range(KILLS):
        process = start(cluster, project, *words, str(out))
        time.sleep(draw.uniform(0.5, 8))
        process.kill()
        process.communicate()
        pieces.append(len(list(work.glob("*.json"))))
        assert out.exists() or pieces == sorted(pieces), "what was done is gone"
    if not out.exists():
        run(cluster, project, *words, str(out))
    assert contents(out) == contents(tmp_path / "here/out")


def without_seconds(document: Any) -> Any:
    """A curve, less what it cost this time."""
    if isinstance(document, dict):
        return {name: without_seconds(value) for name, value in document.items() if "seconds" not in name}
    return [without_seconds(item) for item in document] if isinstance(document, list) else document


def test_curves_and_samples_are_the_same(cluster: Cluster, small_model: Path, project: Path, tmp_path: Path) -> None:
    common = ["--model", str(small_model), "--steps", "1,2", "--json", "--out"]
    curve = ["evaluate", "--data", "driving", "--prompts", "3", "--seeds", "0,1", "--batch-size", "2", *common]
    sample = ["sample", "A green car drives.", "A blue car is ahead.", *common]
    curves, samples = [], []
    for name, engine in (("here", None), ("ray", cluster)):
        found, _ = run(engine, project, *curve, str(tmp_path / name / "curve"))
        curves.append(without_seconds(found["curves"]))
        found, _ = run(engine, project, *sample, str(tmp_path / name / "samples"))
        samples.append((found["nfe"], Path(found["files"]["all"][0]).read_bytes()))
    assert curves[0] == curves[1] and samples[0] == samples[1]
    assert (tmp_path / "here/curve/samples.png").read_bytes() == (tmp_path / "ray/curve/samples.png").read_bytes()


def test_no_cluster_without_a_token(films: Path, project: Path, tmp_path: Path) -> None:
    """A process without the token is refused, and so is a cluster that asks for none."""
    words = ["data", "import", str(films), *IMPORT, "--to", str(tmp_path / "out")]
    for token, told in ((secrets.token_hex(32), "is not the cluster's"), ("", "asks for no token")):
        made = Cluster(token)
        try:
            own = Cluster.environment.fget(made)  # type: ignore[attr-defined]
            other = {**own, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            command = [sys.executable, "-m", "anyflow", *words, "--engine", "ray", "--address", made.address]
            done = subprocess.run(command, cwd=project, env=other, capture_output=True, text=True, timeout=300)
        finally:
            made.close()
        said = [line for line in done.stderr.splitlines() if not re.match(r"\[.* gcs_client.cc", line)]
        assert done.returncode == 2 and told in done.stderr and len(said) == 1, done.stderr
    assert not (tmp_path / "out").exists()
