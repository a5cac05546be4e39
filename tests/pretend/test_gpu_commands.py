"""The commands that take the GPU if there is one: what they sample, encode and decode, they do there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from findings import Findings
from typer.testing import CliRunner
from watching import BEFORE, devices, precisions, watched

from anyflow.cli.main import app
from anyflow.evaluation.report.picture import write_mp4

TINY = "data/models/tiny"


@pytest.fixture(autouse=True)
def in_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def call(*words: object) -> None:
    """A command, in this process."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None:
        raise done.exception


def check(findings: Findings) -> None:
    """All work of networks is on the device, in the precision that the model's recipe asks for there."""
    assert not findings.mismatches
    found = {who: where for (phase, who), where in devices(findings).items() if phase == BEFORE and who != "other"}
    assert found == {"network": {"cuda"}, "vae": {"cuda"}, "text encoder": {"cuda"}}
    assert precisions(findings)[BEFORE, "network"] == "float32"  # 32-true, as the tiny models' recipes say


@pytest.mark.parametrize("model", [TINY, pytest.param("data/models/tiny-causal", marks=pytest.mark.slow)])
def test_sample(model: str, tmp_path: Path) -> None:
    """From noise, and on from given frames, which are encoded."""
    video = tmp_path / "start.mp4"
    write_mp4(video, list(torch.zeros(9, 64, 96, 3, dtype=torch.uint8).numpy()), 8.0)
    words = ["sample", "A green car.", "--model", model, "--frames", 9, "--height", 64, "--width", 96]
    with watched() as gpu:
        call(*words, "--steps", "1,2", "--out", tmp_path / "noise")
        call(*words, "--steps", 1, "--video", video, "--given", 5, "--out", tmp_path / "given")
    check(gpu.findings)


@pytest.mark.slow
def test_evaluate(tmp_path: Path) -> None:
    with watched() as gpu:
        words = ["--steps", "1,2", "--prompts", 2, "--seeds", 0, "--devices", 1, "--out", tmp_path / "curve"]
        call("evaluate", "--model", TINY, "--data", "driving", *words)
    check(gpu.findings)


@pytest.mark.slow
def test_vbench(tmp_path: Path) -> None:
    info = tmp_path / "info.json"
    info.write_text(json.dumps([{"prompt_en": "A green car.", "dimension": ["motion_smoothness"]}]))
    with watched() as gpu:
        words = ["--steps", 1, "--info", info, "--dimensions", "motion_smoothness", "--samples", 1]
        call("vbench", "--model", TINY, "--out", tmp_path / "videos", *words)
    check(gpu.findings)
