"""A causal export samples in diffusers what we sample; the stock attention would not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, DiffusionPipeline
from torch import Tensor

from anyflow.backbone.causal import CausalBackbone
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.export import export_lora, export_pipeline
from anyflow.backbone.far_pipeline import correct_attention
from anyflow.backbone.files import resolve_folder
from anyflow.backbone.load import load_backbone
from anyflow.backbone.lora import LoraSettings, add_lora
from anyflow.backbone.model_card import ModelCard
from anyflow.errors import UserError

SHIFT, STEPS = 3.0, 2
CARD = ModelCard("Tiny, causal", base_model="owner/base", size=(13, 32, 48))


@pytest.fixture
def backbone(tiny_config) -> CausalBackbone:
    """Four chunks, the oldest compressed, of 6 tokens a frame: most of a padded block would be padding."""
    torch.manual_seed(1)
    return CausalBackbone(AnyFlowFARTransformer3DModel(**tiny_config, chunk_partition=[1, 1, 1, 1], full_chunk_limit=3))


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 4, 16, 4, 6)


@pytest.fixture
def folder(backbone, codec, tmp_path) -> Path:
    return export_pipeline(tmp_path / "model", backbone.transformer, codec, SHIFT, CARD, dtype=torch.float32)


def theirs(pipeline: Any, captions: list[str], noise: Tensor, **given: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "num_frames": 13, "num_inference_steps": STEPS}
    latents = noise.transpose(1, 2)
    return pipeline(captions, **size, latents=latents, output_type="latent", **given).frames.transpose(1, 2)


def test_the_shipped_pipeline_samples_what_we_sample(backbone, codec, captions, noise, folder) -> None:
    expected = backbone.sample(Conditions(codec.encode_text(captions)), noise, STEPS, SHIFT)
    trusted = {"custom_pipeline": str(folder), "trust_remote_code": True, "local_files_only": True}
    pipeline = DiffusionPipeline.from_pretrained(folder, **trusted)
    assert isinstance(pipeline, AnyFlowFARPipeline)
    torch.testing.assert_close(theirs(pipeline, captions, noise), expected, atol=1e-4, rtol=1e-4)
    known = torch.randn(2, 2, 16, 4, 6)
    given = backbone.sample(Conditions(codec.encode_text(captions), known), noise, STEPS, SHIFT)
    torch.testing.assert_close(theirs(pipeline, captions, noise, video_latents=known), given, atol=1e-4, rtol=1e-4)


def test_the_stock_pipeline_loads_and_is_right_once_corrected(backbone, codec, captions, noise, folder) -> None:
    expected = backbone.sample(Conditions(codec.encode_text(captions)), noise, STEPS, SHIFT)
    pipeline = AnyFlowFARPipeline.from_pretrained(folder, local_files_only=True)
    wrong = theirs(pipeline, captions, noise)
    if (wrong - expected).abs().max() < 1e-4:
        pytest.fail("diffusers attends to no padding any more: docs/far-attention-padding.md has served its time")
    correct_attention(pipeline.transformer)
    torch.testing.assert_close(theirs(pipeline, captions, noise), expected, atol=1e-4, rtol=1e-4)


def test_our_own_wrapper_serves_their_pipeline(backbone, codec, captions, noise, folder) -> None:
    loaded = load_backbone(folder)
    assert isinstance(loaded, CausalBackbone)
    for name, weight in backbone.transformer.state_dict().items():
        assert torch.equal(weight, loaded.transformer.state_dict()[name]), name
    parts = AnyFlowFARPipeline.from_pretrained(folder, transformer=loaded.transformer, local_files_only=True)
    expected = backbone.sample(Conditions(codec.encode_text(captions)), noise, STEPS, SHIFT)
    torch.testing.assert_close(theirs(parts, captions, noise), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("full", [(), ("far_patch_embedding",)])
def test_adapters_load_on_the_corrected_pipeline(
    backbone, codec, captions, noise, folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: tuple[str, ...]
) -> None:
    """By the lines of their card; what was trained in full beside them comes from the second file."""
    add_lora(backbone, LoraSettings(rank=4, alpha=8, full=full))
    for name, parameter in backbone.named_parameters():
        if ".lora_B." in name or ".lora_full." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    export_lora(tmp_path / "lora", backbone, CARD)
    with pytest.raises(UserError, match="holds a LoRA adapter and no network"):
        resolve_folder(tmp_path / "lora")
    expected = backbone.sample(Conditions(codec.encode_text(captions)), noise, STEPS, SHIFT)
    pipeline = AnyFlowFARPipeline.from_pretrained(folder, local_files_only=True)
    correct_attention(pipeline.transformer)
    monkeypatch.chdir(tmp_path / "lora")
    lines = Path("README.md").read_text().splitlines()
    imports = [line for line in lines if line == "from safetensors.torch import load_file"]
    load = [line for line in lines if line.startswith(("pipe.load_lora_weights(", "pipe.transformer."))]
    assert len(load) == 1 + len(full) and len(imports) == len(full)
    exec("\n".join([*imports, *load]), {"pipe": pipeline})  # our own card
    if full:
        alone = AnyFlowFARPipeline.from_pretrained(folder, local_files_only=True)
        correct_attention(alone.transformer)
        alone.load_lora_weights(tmp_path / "lora")  # the adapter's file loads by itself, too
        assert (theirs(alone, captions, noise) - expected).abs().max() > 1e-3
    torch.testing.assert_close(theirs(pipeline, captions, noise), expected, atol=1e-4, rtol=1e-4)


def test_the_card_says_how_to_load_it(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained(".", custom_pipeline=".", trust_remote_code=True)' in text
    assert "correct_attention(pipe.transformer)" in text
    assert (folder / "pipeline.py").is_file()
    assert "custom_pipeline" not in CARD.render() and "AnyFlowPipeline" in CARD.render()


def test_the_documented_reproduction_reproduces() -> None:
    """The script of docs/far-attention-padding.md: the stock attention is off, the corrected one is not."""
    page = Path(__file__).parents[2] / "docs" / "far-attention-padding.md"
    [script] = re.findall(r"```python\n# reproduction\n(.*?)```", page.read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(script, found)  # our own page
    assert found["stock_error"] > 1e-2
    assert found["corrected_error"] < 1e-6
