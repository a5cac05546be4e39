"""The commands that look at a model or at data, run in this process on a small untrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.errors import UserError
from anyflow.recipe import load_recipe, save_recipe


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def call(*words: str) -> str:
    """What the command prints on stdout; its own exceptions come through."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_sample_shows_step_counts_side_by_side(small_model: Path, tmp_path: Path) -> None:
    prompts = ["A green car drives slowly.", "A blue car is ahead."]
    out = tmp_path / "out"
    shown = json.loads(
        call("sample", *prompts, "--model", str(small_model), "--steps", "2,1", "--out", str(out), "--json")
    )
    assert shown["prompts"] == prompts and list(shown["seconds"]) == ["1", "2"]
    videos = {f"prompt-{i}-steps-{count:02d}.mp4" for i in (1, 2) for count in (1, 2)}
    assert {path.name for path in out.iterdir()} == videos | {"samples.png", "samples.mp4"}
    with pytest.raises(UserError, match="is not empty"):
        call("sample", "again", "--model", str(small_model), "--out", str(out))


def test_sample_refuses_a_size_that_the_model_cannot_take(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="4n"):
        call("sample", "a car", "--model", str(small_model), "--frames", "16", "--out", str(out))
    assert not out.exists()


def test_an_unknown_size_must_be_given(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="give --frames, --height and --width"):
        call("sample", "a car", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"))


def test_export_rewrites_a_model(small_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    told = json.loads(call("export", str(small_model), "--to", str(target), "--precision", "float32", "--json"))
    assert told["kind"] == "pipeline" and (target / "model_index.json").is_file()
    assert "num_frames=17, height=64, width=96" in (target / "README.md").read_text()


def test_export_copies_a_finished_run(small_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_recipe(load_recipe("finetune/driving"), run / "recipe.yaml")
    with pytest.raises(UserError, match="neither a finished model nor a checkpoint"):
        call("export", str(run), "--to", str(tmp_path / "none"))
    (run / "model").symlink_to(small_model)
    call("export", str(run), "--to", str(tmp_path / "copy"))
    names = {path.relative_to(small_model) for path in small_model.rglob("*")}
    assert {path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*")} == names
    with pytest.raises(UserError, match=r"trained every weight"):
        call("export", str(run), "--to", str(tmp_path / "lora"), "--lora")


def test_data_show_and_check(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    shown = json.loads(call("data", "show", "driving", "--count", "2", "--sheet", str(sheet), "--json"))
    assert shown["splits"]["train"]["clips"] >= 128 and shown["splits"]["heldout"]["clips"] >= 32
    assert sheet.is_file()
    assert "captions" in call("data", "show", "driving", "--count", "0")
    assert json.loads(call("data", "check", "driving", "--json"))["problems"] == []
    with pytest.raises(UserError, match="is not in the card"):
        call("data", "show", "driving", "--split", "nothing")


def test_data_check_names_what_is_broken(project: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(project / "data" / "starter" / "driving", tmp_path / "starter" / "driving")
    shutil.copy(project / "data" / "driving.yaml", tmp_path / "driving.yaml")
    shard = next((tmp_path / "starter" / "driving" / "heldout").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="problems"):
        call("data", "check", str(tmp_path / "driving.yaml"))


def test_mlflow_lists_the_newest_runs(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("anyflow")
    run = client.create_run(experiment, run_name="mine")
    client.log_metric(run.info.run_id, "loss", 0.5)
    listed: dict[str, Any] = json.loads(call("mlflow", "--uri", uri, "--json"))
    assert [(row["name"], row["metrics"]["loss"]) for row in listed["runs"]] == [("mine", 0.5)]
    assert "mine" in call("mlflow", "--uri", uri) and "make mlflow" in call("mlflow", "--uri", uri)


def test_a_dry_run_builds_everything_and_writes_no_run(small_model: Path, tmp_path: Path) -> None:
    told = json.loads(
        call(
            "train",
            "finetune/driving",
            f"model.weights={small_model}",
            f"run.out={tmp_path}/runs",
            "data.precompute=false",
            "data.num_workers=0",
            "--dry-run",
            "--json",
        )
    )
    assert told["exit_code"] == 0 and told["recipe"]["stage"]["name"] == "finetune"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_evaluate_measures_a_curve(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--data", "driving", "--steps", "1,2", "--prompts", "2", "--out", str(out), "--json"]
    told = json.loads(call("evaluate", "--model", str(small_model), "--against", str(small_model), *words))
    before, after = told["curves"]
    assert [row["num_steps"] for row in after["rows"]] == [1, 2]
    assert [row["sliced_w1"] for row in before["rows"]] == [row["sliced_w1"] for row in after["rows"]]
    assert any(out.iterdir())


@pytest.mark.slow
def test_the_step_benchmark_agrees_with_the_plain_order() -> None:
    from anyflow.benchmark.step import step_benchmark

    result = step_benchmark(batch_size=4, repeats=1)
    assert result["loss_difference"] < 1e-5
    assert result["memory_ratio"] > 1


def test_two_processes_that_want_one_folder_lose_nothing(tmp_path: Path) -> None:
    from anyflow.commands.common import whole_folder

    wanted = tmp_path / "games"
    with pytest.raises(UserError, match="taken by another process") as caught, whole_folder(wanted) as partial:
        (partial / "mine").touch()
        wanted.mkdir()
        (wanted / "theirs").touch()
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert (kept / "mine").exists() and [path.name for path in wanted.iterdir()] == ["theirs"]
    assert len(list(tmp_path.iterdir())) == 2
