"""``anyflow play`` as it is typed: what it refuses, what it serves, and how it ends."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

PROJECT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("anyflow: ") and not done.stdout
    return line


def test_models_that_cannot_be_steered(
    anyflow: Run, small_model: Path, small_causal_model: Path, tmp_path: Path
) -> None:
    assert "makes all frames at once" in refused(anyflow("play", "--model", str(small_model)))
    assert "is told no controls" in refused(anyflow("play", "--model", str(small_causal_model)))
    assert "there is no such folder" in refused(anyflow("play", "--model", "./nothing"))
    assert "config.json" in refused(anyflow("play", "--model", str(tmp_path)))


def test_states_alone_are_refused(anyflow: Run, steered_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(steered_model, tmp_path / "placed")
    place = folder / "transformer" / "config.json"
    config = json.loads(place.read_text())
    facts = {"holds": "x, y", "width": 2, "unit": ["pixel"] * 2, "low": [0.0, 0.0], "high": [9.0, 9.0]}
    config["anyflow_controls"]["controls"] = {"trajectory": facts}
    place.write_text(json.dumps(config))
    assert "keys cannot steer" in refused(anyflow("play", "--model", str(folder)))


def test_a_usual_model_that_is_missing_says_what_to_do(anyflow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if (PROJECT / "data/models/tiny-world").is_dir():
        pytest.skip("data/models/tiny-world is here")
    assert "make finetune RECIPE=driving-control" in refused(anyflow("play"))


def test_beginnings_that_cannot_be(anyflow: Run, steered_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "film").write_text("")
    model = ["play", "--model", str(steered_model)]
    for words, sentence in (
        (["--image", str(tmp_path / "none.png")], "there is no such file"),
        (["--image", str(tmp_path / "bad.png")], "give a picture"),
        (["--image", str(tmp_path / "bad.png"), "--data", "driving"], "give a picture"),
        (["--data", "no-such-card"], "no-such-card"),
        (["--steps", "3"], "--steps 3 is not on the page"),
        (["--out", str(tmp_path / "film")], "it is a file"),
    ):
        assert sentence in refused(anyflow(*model, *words))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port} cannot be served on" in refused(anyflow(*model, "--port", port))


@pytest.fixture
def playing(tmp_path: Path, steered_model: Path) -> Any:
    """``playing("--steps", "1")`` is the process and the address that it printed."""
    processes: list[subprocess.Popen[str]] = []

    def start(*words: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "anyflow", "play", "--model", str(steered_model), "--no-browser", *words]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        assert processes[-1].stdout is not None
        return processes[-1], processes[-1].stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> str:
    """What was said on stderr, of a command that ended as it should."""
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "Traceback" not in said and "Error" not in said, said
    return said


def test_damaged_weights_are_told_when_they_are_read(anyflow: Run, steered_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(steered_model, tmp_path / "damaged")
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    done = anyflow("play", "--model", str(folder), "--no-browser")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "missing or damaged" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_while_the_model_is_loaded(playing: Any, number: signal.Signals) -> None:
    process, address = playing()
    page = urllib.request.urlopen(address).read().decode()
    assert "anyflow play" in page
    process.send_signal(number)
    ended(process)


def test_it_plays_from_held_out_frames_and_ends_with_its_film(playing: Any, tmp_path: Path) -> None:
    """The cards are those that the model's README names."""
    process, address = playing("--steps", "1")
    with urllib.request.urlopen(address + "stream", timeout=60) as stream:
        facts = json.loads(stream.readline())
        assert len(facts["starts"]) == 12 and facts["starts"][0]["label"].startswith("driving-heldout")
        assert facts["fps"] == 8 and facts["size"] == [96, 64] and facts["steps"] == 1
        for number, line in enumerate(stream, start=1):
            told = json.loads(line)
            if told["kind"] == "film":
                break
            wish = {"seat": facts["seat"], "number": number, "keys": ["ArrowUp"], "sticks": [0, 0], "sliders": {}}
            further = {
                "steps": 1,
                "paused": False,
                "shown": told["number"],
                "run": 0,
                "start": 0,
                "film": int(number > 2),
            }
            urllib.request.urlopen(urllib.request.Request(address + "wish", json.dumps({**wish, **further}).encode()))
        assert json.loads(next(stream))["kind"] == "chunk"  # in the film
        process.send_signal(signal.SIGINT)
        assert json.loads(list(stream)[-1])["kind"] == "over"
    said = ended(process)
    assert "recorded" in said and (tmp_path / "runs" / "play" / "steered.mp4").stat().st_size > 500


def test_a_picture_is_the_only_start(playing: Any, tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), (10, 200, 10)).save(tmp_path / "start.png")
    process, address = playing("--image", "start.png", "--fps", "12")
    with urllib.request.urlopen(address + "stream", timeout=60) as stream:
        facts = json.loads(stream.readline())
        assert [start["label"] for start in facts["starts"]] == ["start.png"] and facts["fps"] == 12
        process.send_signal(signal.SIGINT)
        stream.read()
    ended(process)


WORLD = PROJECT / "data" / "models" / "tiny-world"


@pytest.mark.slow
@pytest.mark.parametrize(("key", "direction"), [("ArrowLeft", -1), ("ArrowRight", 1)])
def test_the_shipped_world_obeys(playing: Any, key: str, direction: int) -> None:
    """The road's lanes lie side by side in the picture, up is left: the green car goes where the key says."""
    if not WORLD.is_dir():
        pytest.skip("data/models/tiny-world is not here")
    _, address = playing("--model", str(WORLD), "--data", "driving-uncaptioned")
    ways = []
    with urllib.request.urlopen(address + "stream", timeout=120) as stream:
        facts, rows, run = json.loads(stream.readline()), [], 0
        for number, line in enumerate(stream, start=1):
            told = json.loads(line)
            if told["run"] == run:
                rows += [green_row(picture) for picture in told["frames"]]
            if len(rows) > 16:
                ways.append(np.nanmean(rows[-4:]) - rows[0])
                rows, run = [], run + 1
            if run == 6:
                break
            wish = {"seat": facts["seat"], "number": number, "keys": [key], "sticks": [0, 0], "sliders": {}, "film": 0}
            further = {"steps": 2, "paused": False, "shown": told["number"], "run": run, "start": run}
            urllib.request.urlopen(urllib.request.Request(address + "wish", json.dumps({**wish, **further}).encode()))
    assert direction * np.nanmedian(ways) > 3, ways


def green_row(jpeg: str) -> float:
    """The middle row of what is green in a picture; NaN if nothing is."""
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg)))).astype(int)
    rows, _ = np.nonzero((picture[..., 1] > 140) & (picture[..., 0] < 120) & (picture[..., 2] < 120))
    return float(rows.mean()) if len(rows) else float("nan")
