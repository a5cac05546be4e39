"""Guidance of an experiment's samples: none unless its file asks for it, and of arms without any in their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from study import TEXT, write_study

from anyflow.backbone.guidance import Guidance
from anyflow.backbone.load import GUIDANCE_KEYS
from anyflow.evaluation import heldout
from anyflow.experiment import curves
from anyflow.experiment.pieces import curve_settings

PROJECT = Path(__file__).resolve().parents[2]


class Asked(Exception):
    """What a curve was asked for."""


@pytest.fixture
def teacher(small_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    shutil.copytree(small_model, folder)
    place = folder / "scheduler" / "scheduler_config.json"
    own = {"anyflow_sampler": "euler", **dict(zip(GUIDANCE_KEYS, (1.5, "still"), strict=True))}
    place.write_text(json.dumps({**json.loads(place.read_text()), **own}))
    return folder


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", Guidance(1.0, "still")),
        (", guidance_scale: 0", Guidance(1.5, "still")),
        (", guidance_scale: 4", Guidance(4.0, "still")),
    ],
)
def test_an_arm_is_guided_if_the_file_says_so_and_its_weights_are_not(
    setting: str,
    expected: Guidance,
    small_model: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a default that would change what was measured, and flow maps that are guided twice."""

    def curve_of(backbone: Any, codec: Any, prompts: Any, asked: Any, **options: Any) -> None:
        raise Asked(asked.sampler, asked.guidance)

    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(heldout, "curve_of", curve_of)
    arms = f"base: {{folder: {teacher}}}\n  map: {{folder: {small_model}}}"
    text = TEXT.replace("base: {folder: data/models/tiny}", arms)
    text = text.replace("evaluation: {prompts: 4", f"evaluation: {{prompts: 4{setting}")
    experiment, pieces = write_study(tmp_path / "study", text)
    found = {}
    for piece in pieces[:2]:
        with pytest.raises(Asked) as asked:
            curves.measure_piece(experiment, piece, "driving")
        found[piece.arm] = asked.value.args
    assert found == {"base": ("euler", expected), "map": ("flowmap", Guidance())}
    assert capsys.readouterr().err == ""


def test_what_was_measured_without_guidance_stays_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default stands in no settings, as none stood there before; any other one makes another curve."""
    monkeypatch.chdir(PROJECT)
    settings = []
    for number, setting in enumerate(("", ", guidance_scale: 1", ", guidance_scale: 0")):
        text = TEXT.replace("evaluation: {prompts: 4", f"evaluation: {{prompts: 4{setting}")
        experiment, pieces = write_study(tmp_path / str(number), text)
        settings.append(curve_settings(experiment, pieces[0]))
    assert "guidance_scale" not in settings[0] and settings[1] == settings[0] != settings[2]
