"""Runs side by side: what differs, and a mark only where the intervals allow it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anyflow.cli.main import app
from anyflow.errors import UserError
from anyflow.evaluation.statistics import Estimate
from anyflow.recipe import load_recipe, save_recipe
from anyflow.tracking.comparison import Side, best, differences, direction, figure_rows, read_side, unlike
from anyflow.tracking.runs import RunFolder


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


def test_guidance_differs_where_it_does_and_compares_all_the_same(tmp_path: Path) -> None:
    """A teacher at two calls a step beside what was made of it; a curve from before there was guidance had none."""
    old, teacher = make_run(tmp_path / "old", {1: 1.0}), make_run(tmp_path / "teacher", {1: 1.0})
    place = teacher / "evaluation" / "driving.json"
    curve = json.loads(place.read_text())["curve"]
    place.write_text(json.dumps({"curve": {**curve, "guidance_scale": 3.0}}))
    sides = [read_side(str(path), "") for path in (old, teacher)]
    assert dict(differences(sides)) == {"measured: guidance_scale": ["1.0", "3.0"]} and not unlike(sides)
    place.write_text(json.dumps({"curve": {**curve, "guidance_scale": 1.0}}))
    assert differences([sides[0], read_side(str(teacher), "")]) == []


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


def test_data_sets_of_one_domain_stay_apart_and_shares_count_the_clips_that_were_judged(tmp_path: Path) -> None:
    run = RunFolder(make_run(tmp_path / "arm-0", {4: 1.0}, accuracy=0.5))
    document = json.loads((run.path / "evaluation" / "driving.json").read_text())
    document["curve"]["rows"][0]["motion_clips"] = 10
    (run.path / "evaluation" / "driving-uncaptioned.json").write_text(json.dumps(document))
    figures = read_side(str(tmp_path / "arm"), "").figures
    assert {data for data, *_ in figures} == {"driving", "driving-uncaptioned"}
    all_judged, ten = (figures[data, "motion_accuracy", 4] for data in ("driving", "driving-uncaptioned"))
    assert (all_judged.count, ten.count) == (100, 10) and ten.low < all_judged.low  # type: ignore[operator]


def test_committed_results_and_evaluations_are_sides_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = {"domain": "driving", "clips": 4, "rows": [{"num_steps": 4, "sliced_w1": 0.5}]}
    measured = tmp_path / "experiments/results/study/measured"
    measured.mkdir(parents=True)
    for seed in (0, 1):
        document = {"recipe": {"optimizer.lr": 0.1}, "facts": {"data": "aa"}, "code": {"git.commit": "0123"}}
        document["curves"] = {"driving": {"curve": curve}}
        (measured / f"plain-{seed}.json").write_text(json.dumps(document))
    monkeypatch.chdir(tmp_path)
    for text in ("experiments/results/study/measured/plain", "runs/experiments/study/plain"):
        side = read_side(text, "")
        assert side.figures["driving", "sliced_w1", 4].count == 2 and side.recipe == {"optimizer.lr": "0.1"}
        assert side.stands_on == {"data (fingerprint)": "aa", "commit": "0123"}
    (tmp_path / "evaluated").mkdir()
    (tmp_path / "evaluated" / "curve.json").write_text(json.dumps({"after": curve, "before": None}))
    assert read_side("evaluated", "").figures["driving", "sliced_w1", 4].mean == 0.5
    about = {"model": "there", "data": "driving-full", "split": "heldout"}
    about |= {"data (fingerprint)": "bb", "git.commit": "1"}
    (tmp_path / "evaluated" / "curve.json").write_text(json.dumps({"after": curve, "before": None, "about": about}))
    side = read_side("evaluated", "")
    assert ("driving-full", "sliced_w1", 4) in side.figures
    assert side.stands_on == {"model": "there", "split": "heldout", "data (fingerprint)": "bb", "commit": "1"}


def test_nothing_is_better_where_sides_were_measured_otherwise() -> None:
    low, high = ({("driving", "sliced_w1", 4): Estimate(mean, mean, mean, 3)} for mean in (1.0, 2.0))
    one, two = Side("one", {}, {}, low, {"measured: clips": "16"}), Side("two", {}, {}, high, {"measured: clips": "20"})
    assert unlike([one, two]) == ["numbers of prompts"] and figure_rows([one, two])[0][2] is None
    assert figure_rows([one, replace(two, measured=one.measured)])[0][2] == 0


def test_figures_of_whole_clips_are_not_compared_where_one_was_given_more_of_them() -> None:
    def side(name: str, value: float, given: str) -> Side:
        figures = {("driving", metric, 4): Estimate(value, value, value, 3) for metric in ("path_error", "sliced_w1")}
        return Side(name, {}, {}, figures, {"measured: given_frames": given, "measured: left_out": "1"})

    alike = [side("one", 1.0, "0"), side("two", 2.0, "0")]
    assert [(key[1], found) for key, _, found in figure_rows(alike)] == [("path_error", 0), ("sliced_w1", 0)]
    apart = [side("one", 1.0, "1"), side("two", 2.0, "0")]
    assert [(key[1], found) for key, _, found in figure_rows(apart)] == [("path_error", None), ("sliced_w1", 0)]


def test_an_interval_keeps_to_what_a_figure_can_be(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.2, 0.9)):
        make_run(tmp_path / f"arm-{seed}", {1: 1.0 + seed}, accuracy=accuracy)
    figures = read_side(str(tmp_path / "arm"), "").figures
    share, distance = figures["driving", "motion_accuracy", 1], figures["driving", "sliced_w1", 1]
    assert (share.low, share.high, distance.low) == (0.0, 1.0, 0.0) and distance.high > 2


def test_recipes_are_compared_where_all_have_one() -> None:
    bare, trained = Side("bare", {}, {"data": "aa"}, {}), Side("run", {"optimizer.lr": "1"}, {"data": "bb"}, {})
    assert dict(differences([bare, trained])) == {"data": ["aa", "bb"]}


def test_metrics_know_which_way_is_better() -> None:
    lower = ("sliced_w1", "frame_frechet", "frame_kernel", "sampling_seconds", "probe_kernel")
    higher = ("motion_accuracy", "given_frame_psnr", "probe_distance_right")
    neither = ("motion_energy", "temporal_consistency", "spread", "nfe")
    for towards, names in ((-1, lower), (1, higher), (0, neither)):
        assert [direction(name) for name in names] == [towards] * len(names)


def test_an_mlflow_run_is_a_side_too(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    run = client.create_run(client.create_experiment("x"), run_name="there", tags={"data": "aa"})
    client.log_param(run.info.run_id, "optimizer.lr", "0.0002")
    client.log_param(run.info.run_id, "data.card", "['data/driving.yaml', 'games']")
    client.log_metric(run.info.run_id, "after/sliced_w1", 0.5, step=4)
    side = read_side(run.info.run_id, uri)
    assert side.figures["driving+games", "sliced_w1", 4].mean == 0.5 and side.recipe["optimizer.lr"] == "0.0002"
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
