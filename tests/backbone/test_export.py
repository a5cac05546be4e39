"""What is exported loads into diffusers' pipeline, and samples what we sample."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AnyFlowPipeline, DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from anyflow.backbone.bidirectional import BidirectionalBackbone
from anyflow.backbone.codec import Codec
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.export import export_lora, export_pipeline
from anyflow.backbone.files import WEIGHTS_NAME
from anyflow.backbone.load import load_backbone, read_shift
from anyflow.backbone.lora import LoraSettings, add_lora
from anyflow.backbone.model_card import ModelCard
from anyflow.errors import UserError
from anyflow.flowmap.sampling import sample
from anyflow.system.files import UMASK

SHIFT, STEPS = 3.0, 4
CARD = ModelCard("Tiny", licence="apache-2.0", base_model="owner/base", size=(5, 32, 48))


@torch.no_grad()
def decoded_pixels(codec: Codec, latents: Tensor) -> Tensor:
    """Float32 ``[B, 3, F, H, W]`` in [-1, 1], before it becomes bytes."""
    return torch.cat(list(codec._decoded(latents, None)))


@pytest.fixture
def backbone(stock) -> BidirectionalBackbone:
    return BidirectionalBackbone(stock)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 2, 16, 4, 6)


def ours(backbone: BidirectionalBackbone, codec: Codec, captions: list[str], noise: Tensor) -> Tensor:
    told = Conditions(codec.encode_text(captions))
    return sample(lambda z, t, r: backbone(z, t, r, told), noise, STEPS, SHIFT)


def theirs(pipeline: AnyFlowPipeline, captions: list[str], noise: Tensor, output: str = "latent") -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "num_frames": 5}
    video = pipeline(
        captions, **size, num_inference_steps=STEPS, latents=noise.transpose(1, 2), output_type=output
    ).frames
    return video.transpose(1, 2) if output == "latent" else video


def test_the_pipeline_samples_what_we_sample(backbone, codec, captions, noise, tmp_path) -> None:
    folder = export_pipeline(tmp_path / "model", backbone.transformer, codec, SHIFT, CARD, dtype=torch.float32)
    pipeline = AnyFlowPipeline.from_pretrained(folder, local_files_only=True)
    latents = ours(backbone, codec, captions, noise)
    torch.testing.assert_close(theirs(pipeline, captions, noise), latents, atol=1e-4, rtol=1e-4)
    video = theirs(pipeline, captions, noise, "pt")  # [B, F, 3, H, W] in [0, 1]
    ours_again = decoded_pixels(codec, latents).transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(video, ours_again, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_trained_from_first_frames_ships_the_pipeline_that_takes_them(
    backbone, codec, captions, noise, tmp_path
) -> None:
    """Others do not: diffusers' own is right for them, and asks for no trust in code."""
    form = {"shift": SHIFT, "dtype": torch.float32}
    plain = export_pipeline(tmp_path / "plain", backbone.transformer, codec, card=CARD, **form)
    assert not list(plain.glob("*.py")) and "custom_pipeline" not in (plain / "README.md").read_text()
    card = dataclasses.replace(CARD, given=True)
    folder = export_pipeline(tmp_path / "given", backbone.transformer, codec, card=card, **form)
    assert "custom_pipeline" in (folder / "README.md").read_text()
    trusted = {"custom_pipeline": str(folder), "trust_remote_code": True, "local_files_only": True}
    pipeline = DiffusionPipeline.from_pretrained(folder, **trusted)
    pipeline.set_progress_bar_config(disable=True)
    known = torch.randn(2, 1, 16, 4, 6)
    asked = {"latents": noise.transpose(1, 2), "video_latents": known.clone(), "num_inference_steps": STEPS}
    found = pipeline(captions, height=32, width=48, num_frames=5, output_type="latent", **asked).frames
    expected = backbone.sample(Conditions(codec.encode_text(captions), known), noise, STEPS, SHIFT)
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-4, rtol=1e-4)


def test_an_export_comes_back_through_our_own_door(backbone, codec, tmp_path) -> None:
    folder = export_pipeline(tmp_path / "model", backbone.transformer, codec, SHIFT, CARD, dtype=torch.float32)
    loaded = load_backbone(folder)
    for name, weight in backbone.transformer.state_dict().items():
        assert torch.equal(weight, loaded.transformer.state_dict()[name]), name
    assert read_shift(folder) == SHIFT
    again = Codec.from_folder(folder)
    assert again.source == folder
    text, expected = again.encode_text(["a car"]), codec.encode_text(["a car"])
    torch.testing.assert_close(text.embeddings, expected.embeddings, atol=1e-6, rtol=1e-6)
    assert torch.equal(again.vae.decoder.conv_out.weight, codec.vae.decoder.conv_out.weight)
    assert Codec.from_folder(folder, text=False).text_encoder is None


def test_adapters_load_on_top_and_equal_the_merged_export(backbone, codec, captions, noise, tmp_path) -> None:
    base = export_pipeline(tmp_path / "base", backbone.transformer, codec, SHIFT, CARD, dtype=torch.float32)
    add_lora(backbone, LoraSettings(rank=4, alpha=8))
    for name, parameter in backbone.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    export_lora(tmp_path / "lora", backbone, CARD)
    merged = export_pipeline(tmp_path / "merged", backbone.transformer, codec, SHIFT, CARD, dtype=torch.float32)
    expected = ours(backbone, codec, captions, noise)

    pipeline = AnyFlowPipeline.from_pretrained(base, local_files_only=True)
    assert (theirs(pipeline, captions, noise) - expected).abs().max() > 1e-2
    pipeline.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(theirs(pipeline, captions, noise), expected, atol=1e-4, rtol=1e-4)
    pipeline = AnyFlowPipeline.from_pretrained(merged, local_files_only=True)
    torch.testing.assert_close(theirs(pipeline, captions, noise), expected, atol=1e-4, rtol=1e-4)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
    ]


def test_others_may_read_what_is_exported(backbone, codec, tmp_path) -> None:
    """safetensors writes files that only their owner can read: a colleague, or another container, loads nothing."""
    export_pipeline(tmp_path / "whole", backbone.transformer, codec, SHIFT, CARD, dtype=torch.float32)
    add_lora(backbone, LoraSettings(rank=2, alpha=2.0, targets=("attn1.to_q",), full=("proj_out",)))
    export_lora(tmp_path / "adapter", backbone, None)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in written)
    assert not [path for path in written if path.stat().st_mode & 0o044 != 0o044 & ~UMASK]


def test_precision_is_chosen_for_each_part(backbone, codec, captions, noise, tmp_path) -> None:
    half = Codec(copy.deepcopy(codec.vae).half(), codec.tokenizer, copy.deepcopy(codec.text_encoder).half())
    folder = export_pipeline(tmp_path / "model", backbone.transformer, half, SHIFT, CARD)
    for part, file, dtype in (
        ("transformer", WEIGHTS_NAME, torch.bfloat16),
        ("vae", WEIGHTS_NAME, torch.float16),
        ("text_encoder", "model.safetensors", torch.float16),
    ):
        assert {weight.dtype for weight in load_file(folder / part / file).values()} == {dtype}, part
    pipeline = AnyFlowPipeline.from_pretrained(folder, local_files_only=True)  # in float32, whatever is stored
    expected = ours(backbone, codec, captions, noise)
    assert (theirs(pipeline, captions, noise) - expected).norm() / expected.norm() < 0.02


def test_unchanged_parts_are_linked_from_their_source(backbone, codec, tmp_path) -> None:
    first = export_pipeline(tmp_path / "first", backbone.transformer, codec, SHIFT, CARD)
    second = export_pipeline(tmp_path / "second", backbone.transformer, Codec.from_folder(first), SHIFT, CARD)
    for part in ("vae", "text_encoder", "tokenizer"):
        for path in (first / part).iterdir():
            assert os.path.samefile(path, second / part / path.name)
    assert Codec.from_folder(second).encode_text(["a"]).lengths.item() > 0


def test_given_weights_replace_the_networks_own(backbone, codec, tmp_path) -> None:
    averaged = {name: torch.zeros_like(weight) for name, weight in backbone.transformer.state_dict().items()}
    folder = export_pipeline(tmp_path / "model", backbone.transformer, codec, SHIFT, CARD, weights=averaged)
    assert not any(weight.any() for weight in load_file(folder / "transformer" / WEIGHTS_NAME).values())


def test_a_failed_export_leaves_the_old_one_alone(backbone, codec, tmp_path, monkeypatch) -> None:
    folder = export_pipeline(tmp_path / "model", backbone.transformer, codec, SHIFT, CARD)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def full_disk(self: ModelCard, lora: bool = False) -> str:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(ModelCard, "render", full_disk)
        export_pipeline(folder, backbone.transformer, codec, 5.0, CARD)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert os.listdir(tmp_path) == ["model"]
    export_pipeline(folder, backbone.transformer, codec, 5.0, CARD)
    assert read_shift(folder) == 5.0 and os.listdir(tmp_path) == ["model"]


def test_what_is_not_ours_is_not_overwritten(backbone, codec, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no exported model: choose another folder"):
        export_pipeline(tmp_path, backbone.transformer, codec, SHIFT, CARD)
    with pytest.raises(UserError, match="needs its text encoder"):
        export_pipeline(tmp_path / "model", backbone.transformer, Codec(codec.vae), SHIFT, CARD)


def test_incomplete_folders_are_named(backbone, codec, tmp_path) -> None:
    folder = export_pipeline(tmp_path / "model", backbone.transformer, codec, SHIFT, CARD)
    vae = folder / "vae" / WEIGHTS_NAME
    content = vae.read_bytes()
    vae.write_bytes(content[:1000])
    with pytest.raises(UserError, match="vae cannot be read as AutoencoderKLWan"):
        Codec.from_folder(folder)
    vae.write_bytes(content)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_res_blocks": 2}))
    with pytest.raises(UserError, match="vae"):
        Codec.from_folder(folder)
    vae.parent.rename(folder / "other")
    with pytest.raises(UserError, match="has no vae folder"):
        Codec.from_folder(folder)


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    card = ModelCard(
        "Driving, any step",
        licence="apache-2.0",
        base_model="owner/base",
        summary="Drives.",
        data={"driving": "MIT, rendered"},
        recipe="stage: forward\n",
        figures={"1 step": {"distance": 0.123456, "motion": "25 %"}, "4 steps": {"distance": 0.1}},
        size=(17, 64, 96),
        fps=8,
    )
    text = card.render()
    assert text.startswith("---\nlicense: apache-2.0\nlibrary_name: diffusers\n")
    assert "base_model: owner/base" in text and 'from_pretrained(".")' in text
    assert "num_frames=17, height=64, width=96" in text and "fps=8" in text
    assert "| | distance | motion |" in text and "| 1 step | 0.1235 | 25 % |" in text and "| 4 steps | 0.1 |  |" in text
    assert "- **driving**: MIT, rendered" in text and "```yaml\nstage: forward\n```" in text
    assert 'from_pretrained("owner/base")\npipe.load_lora_weights(".")' in card.render(lora=True)
