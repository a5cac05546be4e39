"""Controls from a file: rows are frames in the card's units, and what cannot be is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anyflow.backbone.controls import ControlSettings
from anyflow.errors import UserError
from anyflow.evaluation.given_controls import given_controls

STEER = {"holds": "", "width": 2, "numbers": ["speed", "heading"], "low": [0.0, -1.0], "high": [20.0, 1.0]}
KEYS = {"holds": "", "width": 1, "kind": "multi-hot", "at": "transition"}
SETTINGS = ControlSettings({"steer": STEER, "keys": KEYS})
TABLE = np.array([[10, 0.5, 1], [11, 0.25, 0], [12, 0, 1], [13, -0.5, 0], [14, -1, 1.0]])
TOLD = [[10, 0.5, np.nan], [11, 0.25, 1], [12, 0, 0], [13, -0.5, 1], [14, -1, 0]]
"""The keys of a row lead to the next frame."""


def written(folder: Path, text: str) -> Path:
    (folder / "c.csv").write_text(text, encoding="utf-8")
    return folder / "c.csv"


def test_rows_are_frames_and_actions_lead_to_the_next(tmp_path: Path) -> None:
    lines = [",".join(map(str, row)) for row in TABLE]
    np.save(tmp_path / "c.npy", TABLE)
    short = [" speed;heading; keys", *(";".join(map(str, row)) for row in TABLE)]
    tabs = ["\t".join(map(str, row)) for row in TABLE]
    for number, text in enumerate((short, tabs, lines)):
        (tmp_path / f"{number}.csv").write_text("\n".join(text))
    swapped = ["keys, steer.heading,steer.speed", *(f"{keys},{heading},{speed}" for speed, heading, keys in TABLE)]
    paths = [tmp_path / name for name in ("c.npy", "0.csv", "1.csv", "2.csv")]
    for path in (*paths, written(tmp_path, "\n".join(swapped))):
        found, notes = given_controls(path, SETTINGS, 5)
        torch.testing.assert_close(found, torch.tensor([TOLD], dtype=torch.float32), equal_nan=True)
        assert not notes
    found, notes = given_controls(tmp_path / "c.npy", SETTINGS, 1)
    assert found.shape == (1, 1, 3) and "5 rows, the clip 1 frames: the rest is left out" in notes[0]
    found, _ = given_controls(written(tmp_path, "10,,1\n" + "\n".join(lines[1:])), SETTINGS, 5)
    assert found[0, 0].isnan().tolist() == [False, True, True]


def test_a_line_of_names_may_leave_out_the_controls_of_another_domain(tmp_path: Path) -> None:
    """Names cut at the front, as long as one number alone is meant; what is left out is not known, and that is told."""
    walk = {"holds": "", "width": 2, "numbers": ["turn", "speed"], "low": [0.0, 0.0], "high": [1.0, 1.0]}
    settings = ControlSettings({"driving.actions": STEER, "games.actions": walk})
    rows = "\n".join(f"{heading},{speed}" for speed, heading, _ in TABLE)
    table = torch.tensor([TOLD], dtype=torch.float32)[..., :2]
    for names in ("heading,driving.actions.speed", "driving.actions.heading,driving.actions.speed"):
        found, notes = given_controls(written(tmp_path, f"{names}\n{rows}"), settings, 5)
        torch.testing.assert_close(found[..., :2], table)
        assert found[..., 2:].isnan().all() and notes == [
            f"--controls {tmp_path}/c.csv does not give games.actions: not known"
        ]
    both = "speed may be driving.actions.speed or games.actions.speed: write one of them"
    twice = "its columns are heading, heading: give driving.actions.speed, driving.actions.heading"
    for names, sentence in (
        ("heading,speed", both),
        ("heading,actions.speed", f"actions.{both}"),
        ("heading,heading", twice),
    ):
        with pytest.raises(UserError, match=sentence):
            given_controls(written(tmp_path, f"{names}\n{rows}"), settings, 5)
    plain = ControlSettings({"actions": STEER, "driving.actions": STEER})
    every = "actions.speed,actions.heading,driving.actions.speed,driving.actions.heading"
    assert given_controls(written(tmp_path, f"{every}\n" + "1,0,2,0\n" * 5), plain, 5)[0][0, 0].tolist() == [1, 0, 2, 0]
    with pytest.raises(UserError, match=r"c.csv:1 is .*: give 4 numbers: .*; a CSV may begin with a line of names"):
        given_controls(written(tmp_path, rows), settings, 5)


def test_what_is_far_outside_is_told(tmp_path: Path) -> None:
    far = TABLE.copy()
    far[2:4, 0] = 900, -35
    np.save(tmp_path / "c.npy", far)
    assert given_controls(tmp_path / "c.npy", SETTINGS, 5)[1] == [
        "steer.speed=900 is far outside 0 to 20, where the model learnt it: 2 of 5 values are cut off"
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1,2\n", r"c.csv:1 is '1,2': give 3 numbers: steer.speed, steer.heading, keys"),
        ("1,2,3\n1,x,3\n" * 3, r"c.csv:2 is '1,x,3': give 3 numbers"),
        ("speed,course,keys\n1,2,3\n", "its columns are speed, course, keys: give steer.speed, steer.heading, keys"),
        ("1,2,0\n" * 3, "its steer have 3 entries, the clip 5 frames: give a row for each of the 5 frames"),
        ("speed,keys\n1,0\n", "its columns are speed, keys: give steer.speed, steer.heading, keys"),
        ("", "c.csv is empty: give a row for each frame, with 3 numbers"),
        ("1,2,nan\n" * 4 + "1,1e300,0", "hold a number that is not finite, or too large"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        given_controls(written(tmp_path, text), SETTINGS, 5)


def test_no_pickle_is_read_and_a_model_without_controls_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        given_controls(tmp_path / "c.npy", SETTINGS, 5)
    with pytest.raises(UserError, match="told none"):
        given_controls(tmp_path / "c.npy", None, 5)
