"""Wan 2.2 by the commands: a whole chain from the published layout, and the refusals at every door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from shell import here, run

from anyflow.errors import UserError
from anyflow.recipe import load_recipe
from anyflow.training.assemble import load_model

MODEL, FAR = "wan2.2-ti2v-5b", "far-wan2.2-ti2v-5b"
SMALL = (
    *("data.global_batch=2", "data.batch_size=2", "data.num_workers=0", "data.fps=0"),
    *("data.frames=9", "data.height=64", "data.width=64", "stage.steps=1", "ema.start_step=0", "ema.decay=0.5"),
    *("hardware.accelerator=cpu", "hardware.devices=1", "hardware.strategy=auto", "hardware.precision=32-true"),
    *("model.network.chunk_partition=[1,1,1]", "model.network.full_chunk_limit=2", "run.tracking_uri="),
    *("sampling.prompts=1", "sampling.steps=[1,2]", "sampling.every_steps=0", "sampling.given_frames=1"),
    *("optimizer.warmup_steps=0", "optimizer.lr=1e-3", "model.lora.rank=4", "stage.onpolicy.budgets=[2]"),
)


@pytest.fixture
def card(project: Path, tmp_path: Path) -> Path:
    """The starter clips of driving, with a place of their own for what is encoded."""
    content = yaml.safe_load((project / "data" / "driving.yaml").read_text())
    content["splits"] = {name: str(project / "data" / place) for name, place in content["splits"].items()}
    path = tmp_path / "card" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content))
    return path


def done(*words: str) -> Any:
    finished = run(*words, timeout=1200)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.mark.slow
def test_the_whole_chain(small_wan22: Path, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded, taught, made any-step, corrected, fine-tuned from images, made causal, sampled, measured, exported."""
    monkeypatch.chdir(tmp_path)
    encodes = ("data.split=heldout", "data.heldout=train", "data.precompute=true")  # the smaller split, once
    own = (*SMALL, *encodes, f"data.card={card}", f"model.weights={small_wan22}")
    first = ("stage.i2v_prob=1.0",)

    size = ("--frames", "9", "--size", "64x64", "--precision", "32-true")
    encoded = done("data", "encode", str(card), "--model", str(small_wan22), "--splits", "heldout", *size, "--json")
    cache = Path(json.loads(encoded.stdout)["caches"]["heldout"])
    assert json.loads((cache / "cache.json").read_text())["latent_shapes"] == [[3, 48, 4, 4]]

    assert "latents [2, 3, 48, 4, 4]" in done("train", f"teacher/{MODEL}", *own, "--dry-run").stdout
    out = {name: str(Path("runs") / name) for name in (f"{MODEL}-teacher", f"{MODEL}-forward", f"{MODEL}-onpolicy")}
    done("train", f"teacher/{MODEL}", *own, *first, "--out", out[f"{MODEL}-teacher"])
    done("train", f"forward/{MODEL}", *own, *first, "--out", out[f"{MODEL}-forward"])
    done("train", f"onpolicy/{MODEL}", *own, *first, "--out", out[f"{MODEL}-onpolicy"])
    assert len(list((card.parent / "cache").iterdir())) == 1, "what was encoded by the command is what is trained on"
    done("train", f"forward/{FAR}", *own, "stage.long_context=1.0", "--out", "runs/far")
    base = f"model.weights={out[f'{MODEL}-forward']}/model"
    tuned = (*SMALL, f"data.card={card}", base, *first, "optimizer.name=adamw")
    done("train", "finetune/driving", "--model", MODEL, "--hardware", "cpu", *tuned, "--out", "runs/tuned")

    image = sorted(Path("runs/tuned/report").glob("*.png"))[0]
    for model in ("runs/tuned", "runs/far"):
        asked = ("--model", model, "--steps", "1,2", "--image", str(image), "--json")
        made = json.loads(done("sample", "A car.", *asked, "--out", f"{model}-samples").stdout)
        assert made["nfe"].keys() == {"1", "2"}
        exported = Path(f"{model}-exported")
        done("export", model, "--to", str(exported), "--precision", "float32")
        config = json.loads((exported / "transformer" / "config.json").read_text())
        assert (config["in_channels"], config["out_channels"]) == (48, 48) and (exported / "pipeline.py").is_file()
        assert load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors")
    asked = ("--prompts", "2", "--steps", "1", "--seed", "0", "--given-frames", "1", "--json")
    measured = json.loads(done("evaluate", "--model", "runs/tuned", "--data", str(card), *asked).stdout)
    assert measured


def test_recipes_and_commands_refuse_half_a_token(small_wan22: Path, card: Path, tmp_path: Path) -> None:
    """In one sentence, before any weight is read: of these there are none any more."""
    bare = tmp_path / "bare"
    shutil.copytree(small_wan22, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"data.height=48 is no multiple of 32 \(VAE x patch\): give 32 or 64"):
        load_recipe(f"forward/{MODEL}", overrides=["data.height=48"])
    with pytest.raises(UserError, match=r"data.width=80 is no multiple of 32 .*: give 64 or 96"):
        load_recipe("finetune/driving", overrides=[f"model.weights={bare}", "data.width=80"])
    with pytest.raises(UserError, match=r"too small for a causal network: .* at least 64 pixels"):
        load_recipe(f"forward/{FAR}", overrides=["data.height=32"])
    load_recipe("finetune/driving", overrides=["data.width=80"])
    size = ("--frames", "9", "--height", "64", "--width", "80")
    with pytest.raises(UserError, match="width is 80 pixels, but must be a multiple of 32: use 64 or 96"):
        here("sample", "A car.", "--model", str(bare), *size, "--out", str(tmp_path / "samples"))
    with pytest.raises(UserError, match="height is 80 pixels, but must be a multiple of 32: use 64 or 96"):
        here("data", "encode", str(card), "--model", str(bare), "--frames", "9", "--size", "64x80")


def test_network_and_codec_of_two_kinds_are_refused(small_wan22: Path, small_model: Path) -> None:
    with pytest.raises(UserError, match=r"takes latents of 48 channels, and the autoencoder of .* makes 16: name a"):
        load_recipe("finetune/driving", overrides=[f"model.weights={small_wan22}", f"model.codec={small_model}"])
    with pytest.raises(UserError, match=r"takes latents of 48 channels, and the autoencoder of 'Wan-AI/Wan2.1"):
        load_recipe(f"forward/{MODEL}", overrides=["model.codec=Wan-AI/Wan2.1-T2V-14B-Diffusers"])
    alone = ("model.lora.enabled=false", "model.lora.start=", f"stage.onpolicy.teacher={small_model}")
    with pytest.raises(UserError, match=r"stage.onpolicy.teacher=.* takes latents of 16 channels, .* makes 48: name a"):
        load_recipe(f"onpolicy/{MODEL}", overrides=alone)


@pytest.fixture
def two(small_wan22: Path, tmp_path: Path) -> Path:
    """A14B's layout, without a weight."""
    folder = tmp_path / "a14b"
    shutil.copytree(small_wan22, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    more = {"boundary_ratio": 0.875, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps({**index, **more}))
    return folder


@pytest.mark.parametrize("published", [False, True])
def test_two_networks_are_refused_at_every_door(published: bool, two: Path, card: Path, tmp_path: Path) -> None:
    model = "Wan-AI/Wan2.2-I2V-A14B-Diffusers" if published else str(two)
    own = (f"model.weights={model}", f"data.card={card}")
    doors = [
        ("plan", f"forward/{MODEL}", *own),
        ("train", f"forward/{MODEL}", *own, "--dry-run"),
        ("train", "finetune/driving", *own),
        (
            "train",
            f"onpolicy/{MODEL}",
            "model.lora.enabled=false",
            "model.lora.start=",
            f"stage.onpolicy.teacher={model}",
        ),
        ("sample", "A car.", "--model", model, "--out", str(tmp_path / "samples")),
        ("evaluate", "--model", model, "--data", str(card)),
        ("export", model, "--to", str(tmp_path / "exported")),
        ("data", "encode", str(card), "--model", model),
        ("vbench", "--model", model, "--out", str(tmp_path / "bench")),
        ("play", "--model", model),
    ]
    for door in doors:
        with pytest.raises(UserError, match=r"holds two transformers.*one network: take .*Wan2.2-TI2V-5B"):
            here(*door)
    assert not (tmp_path / "exported").exists() and not (tmp_path / "samples").exists()


def test_heads_of_a_hub_model_are_looked_up_before_its_weights(
    small_wan22: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a name that says nothing: the text encoder is large, and there is none here."""
    configs = tmp_path / "snapshot"
    shutil.copytree(small_wan22, configs, ignore=shutil.ignore_patterns("*.safetensors", "text_encoder"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(configs))
    shared = ["hardware.devices=8", "hardware.context=8", "data.global_batch=1"]
    recipe = load_recipe("finetune/driving", overrides=["model.weights=me/network", "model.codec=", *shared])
    with pytest.raises(UserError, match=r"hardware.context=8 does not divide the network's 6 attention heads"):
        load_model(recipe)
