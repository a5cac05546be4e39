"""Wan 2.2's TI2V-5B: 48 channels at 1/16 of the sides, the first frame among the latents at time 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, DiffusionPipeline, WanTransformer3DModel
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.export import export_pipeline
from anyflow.backbone.far_pipeline import correct_attention
from anyflow.backbone.layout import PUBLISHED, Layout, check_network, layout_of
from anyflow.backbone.load import load_backbone
from anyflow.backbone.model_card import ModelCard
from anyflow.errors import UserError

SHIFT, STEPS, SIZE = 5.0, 3, {"num_frames": 13, "height": 64, "width": 128}
CHUNKS = {"chunk_partition": [1, 1, 1, 1], "full_chunk_limit": 3}
ARCHITECTURES = ["bidirectional", "causal"]


@pytest.fixture
def wan(tiny_config, tmp_path) -> WanTransformer3DModel:
    """diffusers' own network, as published but for its size, and saved."""
    network = WanTransformer3DModel(**tiny_config, in_channels=48, out_channels=48).eval()
    network.save_pretrained(tmp_path / "wan" / "transformer")
    return network


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_converted_network_is_that_wan_where_both_times_agree(wan, tmp_path, make_text, architecture) -> None:
    """One time a clip, and one a frame (a token, for diffusers), of which the first is given."""
    backbone = load_backbone(tmp_path / "wan", architecture=architecture)
    told, full = make_text([3, 20])
    latents, t = torch.randn(2, 3, 48, 8, 12), torch.tensor([981.0, 40.0])
    expected = wan(latents.transpose(1, 2), t, full, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(backbone(latents, t, t, told), expected, atol=1e-5, rtol=1e-5)
    each = torch.tensor([[0.0, 981.0, 300.0], [0.0, 40.0, 40.0]])
    by_token = each.repeat_interleave(4 * 6, dim=1)
    expected = wan(latents.transpose(1, 2), by_token, full, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(backbone(latents, each, each, told), expected, atol=1e-5, rtol=1e-5)
    assert (backbone(latents, t, t, told) - expected).abs().max() > 1e-3


def test_the_layout_is_known_by_folder_and_by_name(small_wan22: Path) -> None:
    layout = Layout(channels=48, spatial=16)
    names = ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan-ai/wan2.2-ti2v-5b-diffusers@main", "runs/wan2.2-ti2v-5b-forward")
    assert {layout_of(name) for name in (str(small_wan22), *names)} == {layout}
    assert layout_of("Wan-AI/Wan2.1-T2V-14B-Diffusers") == layout_of("data/models/tiny") == Layout()
    assert (layout.multiple, layout.latents(121, 704, 1280), layout.tokens(121, 704, 1280)) == (
        32,
        (31, 48, 44, 80),
        27_280,
    )
    assert Layout().tokens(81, 480, 832) == 32_760


def test_sides_of_half_a_token_are_refused(small_wan22: Path) -> None:
    codec = Codec.from_folder(small_wan22, text=False)
    assert codec.latent_shape(13, 64, 96) == (4, 48, 4, 6)
    for size, words in (((13, 48, 96), "height is 48"), ((13, 64, 80), "width is 80")):
        with pytest.raises(UserError, match=f"{words} pixels, but must be a multiple of 32: use "):
            codec.latent_shape(*size)


def changed(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


TWO = r"holds two transformers .* a flow map, which jumps from any time to any other, .*: take .*Wan-AI/Wan2.2-TI2V-5B"


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, TWO),
        ("model_index.json", {"boundary_ratio": 0.875}, TWO),
        ("transformer/config.json", {"in_channels": 36, "out_channels": 16}, "has in_channels = 36 and .*: take "),
        ("transformer/config.json", {"image_dim": 1280}, "has image_dim = 1280: take "),
    ],
)
def test_what_is_no_single_network_is_refused(tmp_path: Path, file: str, changes: dict[str, Any], words: str) -> None:
    """By configurations alone: there are no weights here to be read."""
    for name in ("model_index.json", "transformer/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"transformer_2": [None, None], "boundary_ratio": None}))
    changed(tmp_path, "transformer/config.json", _class_name="WanTransformer3DModel")
    check_network(tmp_path)
    changed(tmp_path, file, **changes)
    for refuse in (check_network, load_backbone):
        with pytest.raises(UserError, match=words):
            refuse(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", TWO),
        ("Wan-AI/Wan2.2-I2V-A14B-Diffusers@main", TWO),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "is no text-to-video network: take "),
        ("Wan-AI/Wan2.2-Animate-14B-Diffusers", "is no text-to-video network: take "),
    ],
)
def test_published_ones_are_known_by_name(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_network(name)
    for fine in ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "owner/i2v-model"):
        check_network(fine)


def test_of_another_hub_model_the_configurations_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody downloads 60 GB to read one sentence, nor one of two networks that then passes for the whole."""
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "model_index.json").write_text('{"boundary_ratio": 0.9}')
    with pytest.raises(UserError, match=TWO):
        load_backbone("owner/tuned")
    assert "model_index.json" in asked and not [words for words in asked if words.startswith("transformer/*")]


# Exports --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=ARCHITECTURES)
def folder(request, small_wan22: Path, tmp_path: Path) -> Path:
    """Converted, written out again, in float32."""
    torch.manual_seed(1)
    backbone = load_backbone(small_wan22, architecture=request.param, network=CHUNKS)
    for weight in backbone.transformer.condition_embedder.delta_embedder.parameters():
        weight.data += 0.1 * torch.randn_like(weight)  # it has learnt where it goes to
    card = ModelCard("Converted", size=(13, 64, 128))
    codec = Codec.from_folder(small_wan22)
    return export_pipeline(tmp_path / "out", backbone.transformer, codec, SHIFT, card, dtype=torch.float32)


def theirs(pipeline: Any, noise: Tensor, output: str, **given: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents = noise.transpose(1, 2)
    made = pipeline(
        ["a car", "a blue car"], **SIZE, num_inference_steps=STEPS, latents=latents, output_type=output, **given
    )
    return made.frames.transpose(1, 2)


@torch.no_grad()
def test_an_export_makes_in_diffusers_what_we_make(folder: Path) -> None:
    """From a text by the stock pipeline (of a causal network: once corrected), from an image by the shipped one."""
    backbone, codec = load_backbone(folder), Codec.from_folder(folder)
    noise, image = torch.randn(2, 4, 48, 4, 8), torch.rand(2, 1, 3, 64, 128)
    text = codec.encode_text(["a car", "a blue car"])
    known = codec.encode_video(image.transpose(1, 2) * 2 - 1)
    from_text, from_image = (backbone.sample(Conditions(text, given), noise, STEPS, SHIFT) for given in (None, known))
    stock = (AnyFlowFARPipeline if backbone.is_causal else AnyFlowPipeline).from_pretrained(
        folder, local_files_only=True
    )
    if backbone.is_causal:
        correct_attention(stock.transformer)
    trusted = {"custom_pipeline": str(folder), "trust_remote_code": True, "local_files_only": True}
    shipped = DiffusionPipeline.from_pretrained(folder, **trusted)
    close = {"atol": 1e-4, "rtol": 1e-4}
    for pipeline in (stock, shipped):
        torch.testing.assert_close(theirs(pipeline, noise, "latent"), from_text, **close)
    torch.testing.assert_close(theirs(shipped, noise, "latent", video=image), from_image, **close)
    assert (from_image[:, 1:] - from_text[:, 1:]).abs().max() > 1e-2
    video = theirs(shipped, noise, "pt", video=image).transpose(1, 2)
    pixels = torch.cat(list(codec._decoded(from_image, None))).transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(video, pixels, **close)
    with pytest.raises(ValueError, match="height=48 and width=128: both must be multiples of 32"):
        shipped("a car", height=48, width=128)
    if not backbone.is_causal and (theirs(stock, noise, "latent", video=image) - from_image).abs().max() < 1e-4:
        pytest.fail("diffusers' pipeline leaves given frames where they are: exact_pipeline.py has served its time")


def test_the_card_says_how_to_load_it(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained(".", custom_pipeline=".", trust_remote_code=True)' in readme
    assert "pipe(..., video=frames)" in readme
    assert (folder / "pipeline.py").is_file()


def test_the_published_size_has_the_published_parameters() -> None:
    from diffusers import AnyFlowTransformer3DModel, AutoencoderKLWan

    from anyflow.backbone.layout import WAN22_VAE
    from anyflow.memory.need import WAN22_VAE_WEIGHTS

    with torch.device("meta"):
        wan = WanTransformer3DModel(**PUBLISHED["ti2v-5b"])
        ours = AnyFlowTransformer3DModel(**PUBLISHED["ti2v-5b"])
        vae = AutoencoderKLWan(**WAN22_VAE)
    count = [sum(weight.numel() for weight in part.parameters()) for part in (wan, vae)]
    assert count == [4_999_787_712, WAN22_VAE_WEIGHTS]
    assert ours.state_dict().keys() - wan.state_dict().keys() == {
        f"condition_embedder.delta_embedder.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")
    }
