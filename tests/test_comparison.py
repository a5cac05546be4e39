"""Runs side by side: what differs, and a mark only where the intervals allow it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.comparison import best, differences, direction, figure_rows, read_side
from anyflow.errors import UserError
from anyflow.evaluation.statistics import Estimate
from anyflow.recipe import load_recipe, save_recipe
from anyflow.runs import RunFolder


def make_run(folder: Path, values: dict[int, float], *overrides: str, accuracy: float = 0.5, **status: object) -> Path:
    """A run's folder with an evaluated curve."""
    run = RunFolder(folder)
    (folder / "evaluation").mkdir(parents=True)
    save_recipe(load_recipe("finetune/driving", overrides=overrides), run.recipe)
    run.note(**{"data": "aa", "code": {"git.commit": "0123456789abcdef", "git.dirty": "False"}, **status})
    rows = [
        {"num_steps": n, "sliced_w1": v, "motion_accuracy": accuracy, "motion_energy": v} for n, v in values.items()
    ]
    curve = {"domain": "driving", "clips": 100, "given_frames": 0, "rows": rows}
    (folder / "evaluation" / "driving.json").write_text(json.dumps({"curve": curve}))
    return folder


def test_what_differs_comes_first_and_names_do_not_count(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", {1: 1.0}, "optimizer.lr=1e-4", "run.name=one")
    two = make_run(tmp_path / "two", {1: 1.0}, "optimizer.lr=2e-4", "run.name=two", data="bb")
    sides = [read_side(str(path), "") for path in (one, two)]
    assert dict(differences(sides)) == {"optimizer.lr": ["0.0001", "0.0002"], "data (fingerprint)": ["aa", "bb"]}


def test_an_arm_is_its_seeds_together(tmp_path: Path) -> None:
    for arm, level in (("plain", 1.0), ("forward", 0.5), ("forward-opd", 0.1)):
        for seed in range(3):
            make_run(tmp_path / f"{arm}-{seed}", {1: level + 0.01 * seed, 4: 0.5 + 0.3 * seed}, f"run.seed={seed}")
    plain, forward = (read_side(str(tmp_path / arm), "") for arm in ("plain", "forward"))
    assert forward.recipe["run.seed"] == "0, 1, 2"
    value = forward.figures["driving", "sliced_w1", 1]
    assert (value.mean, value.count) == (pytest.approx(0.51), 3)
    rows = {key: better for key, _, better in figure_rows([plain, forward])}
    assert rows["driving", "sliced_w1", 1] == 1
    assert rows["driving", "sliced_w1", 4] is None and rows["driving", "motion_energy", 1] is None


def test_a_single_run_is_marked_by_the_intervals_that_it_has(tmp_path: Path) -> None:
    """A distance of one run has none; a share of 100 clips has the score interval."""
    one, two = make_run(tmp_path / "one", {1: 1.0}, accuracy=0.5), make_run(tmp_path / "two", {1: 0.1}, accuracy=0.9)
    rows = {key[1]: better for key, _, better in figure_rows([read_side(str(path), "") for path in (one, two)])}
    assert rows == {"sliced_w1": None, "motion_accuracy": 1, "motion_energy": None}


@pytest.mark.parametrize(
    ("values", "towards", "expected"),
    [
        ([Estimate(1, 0.9, 1.1, 3), Estimate(2, 1.8, 2.2, 3)], -1, 0),
        ([Estimate(1, 0.9, 1.1, 3), Estimate(2, 1.8, 2.2, 3)], 1, 1),
        ([Estimate(1, 0.5, 1.9, 3), Estimate(2, 1.8, 2.2, 3)], -1, None),
        ([Estimate(1, 0.9, 1.1, 3), Estimate(2, None, None, 1)], -1, None),
        ([Estimate(1, 0.9, 1.1, 3), None], -1, None),
        ([Estimate(1, 0.9, 1.1, 3), Estimate(2, 1.8, 2.2, 3), Estimate(1.05, 1, 1.1, 3)], -1, None),
    ],
)
def test_better_is_said_only_beyond_the_intervals(
    values: list[Estimate | None], towards: int, expected: int | None
) -> None:
    assert best(values, towards) == expected


def test_metrics_know_which_way_is_better() -> None:
    names = ("sliced_w1", "frame_frechet", "motion_accuracy", "motion_energy", "sampling_seconds")
    assert [direction(name) for name in names] == [-1, -1, 1, 0, -1]


def test_an_mlflow_run_is_a_side_too(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    run = client.create_run(client.create_experiment("x"), run_name="there", tags={"data": "aa"})
    client.log_param(run.info.run_id, "optimizer.lr", "0.0002")
    client.log_metric(run.info.run_id, "after/sliced_w1", 0.5, step=4)
    side = read_side(run.info.run_id, uri)
    assert side.figures["", "sliced_w1", 4].mean == 0.5 and side.recipe["optimizer.lr"] == "0.0002"
    with pytest.raises(UserError, match="there is no run"):
        read_side("0" * 32, uri)


def test_the_command_shows_both(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", {1: 1.0}, accuracy=0.5), make_run(tmp_path / "two", {1: 0.1}, accuracy=0.9)
    shown = CliRunner().invoke(app, ["compare", str(one), str(two)])
    assert shown.exit_code == 0 and "0.9 [0.826, 0.945] *" in shown.output
    told = json.loads(CliRunner().invoke(app, ["compare", str(one), str(two), "--json"]).stdout)
    assert told["sides"] == ["one", "two"] and len(told["figures"]) == 3
    for words in ([str(one)], [str(one)] * 4):
        with pytest.raises(UserError, match="two or three"):
            raise CliRunner().invoke(app, ["compare", *words]).exception  # type: ignore[misc]
    with pytest.raises(UserError, match="is no run"):
        read_side(str(tmp_path / "none"), "")
