"""The commands that look at a model or at data, run in this process on a small untrained model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shell import call

from anyflow.errors import UserError
from anyflow.recipe import load_recipe, save_recipe


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


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


@pytest.fixture
def beginning(tmp_path: Path) -> dict[str, Path]:
    """A picture and a short clip of another size and rate than the model's."""
    from PIL import Image

    from anyflow.evaluation.report.picture import write_mp4

    frames = np.random.default_rng(0).integers(0, 255, (24, 100, 120, 3), dtype=np.uint8)
    frames[:] = np.linspace(0, 255, 120, dtype=np.uint8)[None, None, :, None]
    write_mp4(tmp_path / "start.mp4", list(frames), 16.0)
    Image.fromarray(frames[0]).save(tmp_path / "start.png")
    return {"--image": tmp_path / "start.png", "--video": tmp_path / "start.mp4"}


@pytest.mark.parametrize("option", ["--image", "--video"])
@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
def test_sample_goes_on_from_a_picture_or_a_clip(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    beginning: dict[str, Path],
    tmp_path: Path,
    architecture: str,
    option: str,
) -> None:
    """The result begins with the given frames, as the VAE shows them."""
    from anyflow.backbone import stream
    from anyflow.backbone.codec import Codec
    from anyflow.data.decode import ClipShape, decode_clip

    parts: list[torch.Tensor] = []
    original = stream.stream_video

    def spy(*arguments: Any, **way: Any) -> Any:
        for part in original(*arguments, **way):
            parts.append(part)
            yield part

    monkeypatch.setattr(stream, "stream_video", spy)
    model = request.getfixturevalue("small_model" if architecture == "bidirectional" else "small_causal_model")
    size = ["--frames", "9", "--height", "32", "--width", "48", "--steps", "1", "--out", str(tmp_path / "out")]
    call("sample", "a car", "--model", str(model), option, str(beginning[option]), *size)
    assert len(parts) == (1 if architecture == "bidirectional" else 3 if option == "--video" else 2)
    given = 5 if option == "--video" else 1
    known = decode_clip(beginning[option].read_bytes(), ClipShape(given, 32, 48, 8.0 if given > 1 else None))
    codec = Codec.from_folder(model)
    expected = codec.decode(codec.encode_video(torch.from_numpy(known)[None]))
    made = torch.cat(parts, dim=1)
    assert made.shape == (1, 9, 32, 48, 3)
    assert (made[:, :given].int() - expected.int()).abs().max() <= 1  # the last bit of a rounding


def test_sample_refuses_a_beginning_that_cannot_be_one(
    small_model: Path, beginning: dict[str, Path], tmp_path: Path
) -> None:
    words = ["sample", "a car", "--model", str(small_model), "--out", str(tmp_path / "out")]
    image, video = (str(beginning[option]) for option in ("--image", "--video"))
    for options, message in (
        (["--image", image, "--video", video], "give one of them"),
        (["--image", str(tmp_path / "none.png")], "no such file"),
        (["--video", video, "--given", "4"], r"4n\+1, as the VAE needs: give 1"),
        (["--video", video, "--given", "17"], "leaves nothing to sample"),
        (["--image", __file__], "cannot be decoded"),
        (["--video", video, "--given", "13", "--fps", "1"], "too few frames"),
    ):
        with pytest.raises(UserError, match=message):
            call(*words, *options)


def test_a_causal_model_samples_more_frames_than_it_was_trained_on(small_causal_model: Path, tmp_path: Path) -> None:
    size = ["--frames", "33", "--height", "32", "--width", "48", "--steps", "1"]
    told = json.loads(
        call("sample", "a car", "--model", str(small_causal_model), *size, "--out", str(tmp_path / "o"), "--json")
    )
    assert told["seconds"]["1"] > 0 and (tmp_path / "o" / "prompt-1-steps-01.mp4").is_file()


def test_sample_refuses_a_size_that_the_model_cannot_take(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="4n"):
        call("sample", "a car", "--model", str(small_model), "--frames", "16", "--out", str(out))
    assert not out.exists()


def test_an_unknown_size_must_be_given(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").touch()
    with pytest.raises(UserError, match="give --frames, --height and --width"):
        call("sample", "a car", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"))


def test_export_rewrites_a_model(small_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    told = json.loads(call("export", str(small_model), "--to", str(target), "--precision", "float32", "--json"))
    assert told["kind"] == "pipeline" and (target / "model_index.json").is_file()
    assert "num_frames=17, height=64, width=96" in (target / "README.md").read_text()


def test_a_model_remembers_how_it_is_sampled(small_model: Path, tmp_path: Path) -> None:
    """Through training's export and a rewritten one, and what its README says of its size."""
    from anyflow.backbone.export import export_pipeline
    from anyflow.backbone.load import read_sampler
    from anyflow.backbone.model_card import ModelCard
    from anyflow.evaluation.models import trained_shape
    from anyflow.training.assemble import assemble

    recipe = load_recipe("dmd/tiny", overrides=[f"model.weights={small_model}", "data.precompute=false"])
    assert (recipe.sampler, read_sampler(small_model)) == ("renoise", "flowmap")
    parts = assemble(replace(recipe, data=replace(recipe.data, card=["driving"], batch_size=1)))
    card = ModelCard("small", size=(17, 64, 96), fps=8.0, sampler="renoise")
    made = export_pipeline(tmp_path / "made", parts.backbone.transformer, parts.codec, 3.0, card)
    call("export", str(made), "--to", str(tmp_path / "again"))
    for folder in (made, tmp_path / "again"):
        assert read_sampler(folder) == "renoise" and trained_shape(str(folder)) == (17, 64, 96, 8.0)
        assert "anyflow sample" in (folder / "README.md").read_text()
    call("sample", "A car.", "--model", str(made), "--steps", "1,2", "--out", str(tmp_path / "re-noised"))
    with pytest.raises(UserError, match="'heun' is not known"):
        call("sample", "A car.", "--model", str(made), "--sampler", "heun")
    scheduler = made / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("renoise", "heun"))
    with pytest.raises(UserError, match="asks for the sampler 'heun'"):
        read_sampler(made)


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


def test_export_writes_an_adapter_for_comfyui(small_model: Path, tmp_path: Path) -> None:
    """One file of the folder's name, which a training takes as its start again."""
    from anyflow.backbone.export import export_lora
    from anyflow.backbone.load import load_backbone
    from anyflow.backbone.lora import LoraSettings, add_lora, load_lora, lora_state
    from anyflow.backbone.model_card import ModelCard

    run, to = tmp_path / "run", tmp_path / "mine"
    backbone = load_backbone(small_model)
    add_lora(backbone, LoraSettings(rank=4, alpha=2))
    export_lora(run / "lora", backbone, ModelCard("an adapter"))
    save_recipe(load_recipe("finetune/driving", overrides=["model.lora.enabled=true"]), run / "recipe.yaml")
    told = json.loads(call("export", str(run), "--to", str(to), "--lora", "--layout", "comfyui", "--json"))
    assert told["layout"] == "comfyui" and {path.name for path in to.iterdir()} == {"README.md", "mine.safetensors"}
    again = load_backbone(small_model)
    load_lora(again, to / "mine.safetensors")
    ours, theirs = lora_state(backbone), lora_state(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (run / "lora" / "full_weights.safetensors").touch()
    with pytest.raises(UserError, match="ComfyUI has no causal network: leave --layout out"):
        call("export", str(run), "--to", str(tmp_path / "causal"), "--lora", "--layout", "comfyui")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"], "nothing half-written is left"


def test_a_training_starts_from_an_adapter_of_another_tool(small_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name, file = "lora_unet_blocks_1_self_attn_q", tmp_path / "style.safetensors"
    halves = {f"{name}.lora_down.weight": torch.randn(4, 192), f"{name}.lora_up.weight": torch.randn(192, 4)}
    save_file({**halves, f"{name}.alpha": torch.tensor(2.0)}, file)
    options = ["data.card=driving", "data.precompute=false", "data.num_workers=0", f"model.weights={small_model}"]
    options += ["model.lora.enabled=true", f"model.lora.start={file}", "optimizer.name=adamw", "--dry-run"]
    assert f"{2 * 4 * 192:,} trained" in call("train", "finetune/driving", *options)
    save_file({**halves, f"{name}.lora_down.weight": torch.randn(4, 5120)}, file)
    with pytest.raises(UserError, match=r"does not fit this network: blocks\.1\.attn1\.to_q has 5120 inputs"):
        call("train", "finetune/driving", *options)


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
    told = call("mlflow", "--uri", uri)
    assert "mine" in told and f"open them with: anyflow mlflow --serve --uri {uri}" in told


@pytest.mark.parametrize(
    ("stage", "model"),
    [("finetune", "tiny"), ("finetune", "tiny-causal"), ("consistency", "tiny"), ("dmd", "tiny")],
)
def test_a_dry_run_builds_everything_and_writes_no_run(
    small_model: Path, tmp_path: Path, stage: str, model: str
) -> None:
    told = json.loads(
        call(
            "train",
            "finetune/driving" if stage == "finetune" else f"{stage}/tiny",
            "--model",
            model,
            "data.card=driving",
            f"model.weights={small_model}",
            f"run.out={tmp_path}/runs",
            "data.precompute=false",
            "data.num_workers=0",
            "--dry-run",
            "--json",
        )
    )
    assert told["exit_code"] == 0 and told["recipe"]["stage"]["name"] == stage
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompts", "32"], r"32 prompts need 64 clips of the heldout split.* driving has 40: ask for 20 prompts"),
        (["--given-frames", "5"], r"5 are 17 frames, and clips have 17"),
        (["--probe", "--split", "train"], r"a probe has seen these clips"),
        (
            ["--encoder", "efficientnet"],
            r"--encoder efficientnet: there is nothing: give probe, controls, efficientnet-lite",
        ),
        (["--model", "data"], r"--model data is no model: it has no model_index.json"),
        (["--out", "README.md/curves"], r"--out README.md/curves: .*README.md is a file"),
        (["--encoder", ""], r"--encoder is empty: there is nothing: give"),
        (["--data", "nowhere"], r"--data 'nowhere' is neither a file nor a card in data/"),
    ],
)
def test_evaluate_refuses_what_it_cannot_judge_before_it_loads_the_model(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        call("evaluate", "--model", "data/models/tiny", "--data", "driving", *words)


@pytest.mark.slow
def test_evaluate_measures_a_curve(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--data", "driving", "--steps", "1,2", "--prompts", "2", "--out", str(out), "--json"]
    words += ["--encoder", "efficientnet-lite"]
    told = json.loads(call("evaluate", "--model", str(small_model), "--against", str(small_model), *words))
    before, after = told["curves"]
    assert [row["num_steps"] for row in after["rows"]] == [1, 2]
    assert [row["sliced_w1"] for row in before["rows"]] == [row["sliced_w1"] for row in after["rows"]]
    assert all(row["efficientnet_frechet"] > 0 for row in (*after["rows"], after["real"]))
    assert "efficientnet-lite0-57934424.pth" in " ".join(after["notes"])
    assert any(out.iterdir())


def test_a_recipe_names_an_encoder_that_is_there() -> None:
    with pytest.raises(UserError, match=r"sampling\.encoders nowhere/i3d\.pt: there is nothing"):
        call("train", "finetune/driving", "sampling.encoders=[nowhere/i3d.pt]", "--dry-run")


@pytest.mark.slow
def test_the_step_benchmark_agrees_with_the_plain_order() -> None:
    from experiments.bench.step import step_benchmark

    result = step_benchmark(batch_size=4, repeats=1)
    assert result["loss_difference"] < 1e-5
    assert result["memory_ratio"] > 1


@pytest.mark.slow
def test_every_stage_does_less_for_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a seam that the plain order goes through no longer, so that both ways are one."""
    from experiments.bench import order

    monkeypatch.setattr(order, "STAGES", {name: (*terms[:2], 2) for name, terms in order.STAGES.items()})
    for result in order.order_benchmark(repeats=1).values():
        assert result["loss_difference"] < 1e-5
        assert result["flop_ratio"] > 1.5 and result["memory_ratio"] > 1
        assert result["ways"]["plain"]["passes"] > result["ways"]["anyflow"]["passes"]


@pytest.mark.slow
def test_a_stream_costs_no_more_when_it_is_long(small_causal_model: Path, tmp_path: Path) -> None:
    """Memory is exact: the same for every chunk once the window is full; looking back at everything takes more."""
    from anyflow.evaluation.models import load_model
    from experiments.bench.stream import plot_stream, stream_benchmark

    codec, backbone, shift = load_model(str(small_causal_model))
    chunks = backbone.chunks_of(5)
    result = stream_benchmark(codec, backbone, shift, height=32, width=48, chunks=12, num_steps=1, repeats=1)
    assert backbone.chunks_of(5) == chunks
    moving, whole = result["ways"].values()
    assert moving["frames"] == whole["frames"] == [1] + [8] * 11
    assert max(moving["bytes"][3:]) <= 1.001 * min(moving["bytes"][3:])
    assert result["growth"]["whole past"]["bytes"] > 1.002
    assert all(seconds > 0 for way in (moving, whole) for seconds in way["seconds"])
    plot_stream(result, tmp_path / "stream.png")
    assert (tmp_path / "stream.png").stat().st_size > 10_000


def test_two_processes_that_want_one_folder_lose_nothing(tmp_path: Path) -> None:
    from anyflow.cli.common import whole_folder

    wanted = tmp_path / "games"
    with pytest.raises(UserError, match="taken by another process") as caught, whole_folder(wanted) as partial:
        (partial / "mine").touch()
        wanted.mkdir()
        (wanted / "theirs").touch()
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert (kept / "mine").exists() and [path.name for path in wanted.iterdir()] == ["theirs"]
    assert len(list(tmp_path.iterdir())) == 2
