"""An evaluation through the real command line: killed and gone on with, and dealt out to two processes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from shell import command, environment, run

from anyflow.errors import EXIT_PREEMPTED

pytestmark = pytest.mark.slow

COSTS = ("sampling_seconds", "decoding_seconds", "interval", "each")


def words(model: Path, *more: str) -> list[str]:
    settings = {"--data": "driving", "--steps": "1,2,4", "--prompts": "3", "--batch-size": "2", "--seeds": "0,1"}
    return ["evaluate", "--model", str(model), *(word for pair in settings.items() for word in pair), *more, "--json"]


def curve(stdout: str) -> dict[str, Any]:
    return json.loads(stdout)["curves"][0]


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in COSTS} for row in found["rows"]]


@pytest.fixture
def in_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(project))
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_evaluation_that_was_cut_goes_on(number: signal.Signals, small_model: Path, in_project: Path) -> None:
    samples = in_project / "runs" / "evaluations" / ".samples"
    process = subprocess.Popen(command(*words(small_model)), stderr=subprocess.PIPE, env=environment(), text=True)
    while len(list(samples.glob("*.safetensors"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    told = process.communicate()[1]
    if number == signal.SIGTERM:
        assert process.returncode == EXIT_PREEMPTED and "the same command goes on with it" in told
    assert 3 <= len(list(samples.glob("*.safetensors"))) < 12
    resumed = run(*words(small_model))
    assert resumed.returncode == 0, resumed.stderr
    assert not samples.exists(), "what is measured is no longer kept"
    whole = run(*words(small_model, "--out", "whole"))
    assert figures(curve(resumed.stdout)) == figures(curve(whole.stdout))


def test_two_processes_measure_what_one_measures(small_model: Path, in_project: Path) -> None:
    one, two = (run(*words(small_model, "--devices", count, "--out", f"of-{count}")) for count in ("1", "2"))
    assert one.returncode == two.returncode == 0, two.stderr
    for first, second in zip(figures(curve(one.stdout)), figures(curve(two.stdout)), strict=True):
        assert second["sliced_w1"] == pytest.approx(first["sliced_w1"], rel=1e-3)
        assert second["frame_frechet"] == pytest.approx(first["frame_frechet"], rel=1e-3)
        assert second["motion_energy"] == pytest.approx(first["motion_energy"], rel=1e-2)
    assert (in_project / "of-2" / "samples.mp4").is_file()
    assert not (in_project / "runs" / "evaluations" / ".samples").exists()
