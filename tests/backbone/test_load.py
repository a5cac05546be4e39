"""Every kind of checkpoint comes in exactly, and what does not fit is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from anyflow.backbone.causal import CausalBackbone
from anyflow.backbone.files import WEIGHTS_NAME
from anyflow.backbone.load import CHUNKING, backbone_class, load_backbone, new_backbone, read_shift
from anyflow.errors import UserError


@pytest.fixture
def wan(tiny_config) -> WanTransformer3DModel:
    return WanTransformer3DModel(**tiny_config).eval()


@pytest.fixture
def saved(stock, tmp_path) -> Path:
    """A pipeline folder's transformer."""
    stock.save_pretrained(tmp_path / "model" / "transformer")
    return tmp_path / "model"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "transformer" / WEIGHTS_NAME
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@torch.no_grad()
def test_a_converted_wan_is_that_wan_where_both_times_agree(wan, tmp_path, make_text) -> None:
    wan.save_pretrained(tmp_path / "transformer")
    backbone = load_backbone(tmp_path)
    told, full = make_text([3, 20])
    latents, t = torch.randn(2, 3, 16, 8, 12), torch.tensor([981.0, 40.0])
    expected = wan(latents.transpose(1, 2), t, full, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(backbone(latents, t, t, told), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(backbone(latents, t, t / 2, told), expected, atol=1e-3)


def test_our_own_folders_come_back_bit_for_bit(stock, saved) -> None:
    for place in (saved, saved / "transformer", saved.parent):  # a pipeline, a transformer, a run that exported "model"
        loaded = load_backbone(place).transformer
        assert loaded.config["gate_value"] == 0.25 and loaded.condition_embedder.delta_emb_gate.item() == 0.25
        for name, weight in stock.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name


def test_sharded_weights_come_back(stock, tmp_path) -> None:
    stock.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / f"{WEIGHTS_NAME}.index.json").exists()
    assert torch.equal(load_backbone(tmp_path).transformer.proj_out.weight, stock.proj_out.weight)
    next(tmp_path.glob("*-00001-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"00001-of-.* is missing or damaged"):
        load_backbone(tmp_path)


def test_the_old_layout_comes_in(stock, saved) -> None:
    old = {"_class_name": "FAR_Wan_Transformer3DModel", "init_far_model": False, "compressed_patch_size": [1, 4, 4]}
    change_config(saved, **old, full_chunk_limit=3, qk_norm="rms_norm_across_heads", pos_embed_seq_len=None)
    assert torch.equal(load_backbone(saved).transformer.proj_out.weight, stock.proj_out.weight)


def test_half_precision_spares_the_times(stock, saved) -> None:
    transformer = load_backbone(saved, dtype=torch.bfloat16).transformer
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    embedder = transformer.condition_embedder.delta_embedder.linear_1
    assert torch.equal(embedder.weight, stock.condition_embedder.delta_embedder.linear_1.weight)


def test_loaded_weights_do_not_share_memory_with_the_file(stock, saved) -> None:
    backbone = load_backbone(saved)
    before = backbone.transformer.proj_out.weight.clone()
    change_weights(saved, lambda weights: weights["proj_out.weight"].zero_())
    assert torch.equal(backbone.transformer.proj_out.weight, before)


@pytest.fixture
def saved_far(tiny_config, tmp_path) -> Path:
    """A causal pipeline folder's transformer, its second patch embedding trained."""
    far = AnyFlowFARTransformer3DModel(**tiny_config, full_chunk_limit=2, chunk_partition=[1, 2])
    torch.nn.init.normal_(far.far_patch_embedding.weight)
    far.save_pretrained(tmp_path / "far" / "transformer")
    return tmp_path / "far"


@pytest.mark.parametrize("old_layout", [False, True])
@pytest.mark.parametrize("architecture", [None, "causal"])
def test_causal_networks_come_in_in_both_layouts(saved_far, old_layout, architecture) -> None:
    if old_layout:
        old = {"init_far_model": True, "qk_norm": "rms_norm_across_heads", "pos_embed_seq_len": None}
        change_config(saved_far, _class_name="FAR_Wan_Transformer3DModel", **old)
    backbone = load_backbone(saved_far, architecture=architecture)
    assert isinstance(backbone, CausalBackbone)
    assert backbone.transformer.config.full_chunk_limit == 2 and backbone.chunks_of(3) == (1, 2)
    weights = load_file(saved_far / "transformer" / WEIGHTS_NAME)
    for name, weight in backbone.transformer.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_causal_network_is_no_bidirectional_one(saved_far) -> None:
    with pytest.raises(UserError, match=r"holds a causal \(FAR\) network: set model.architecture to causal"):
        load_backbone(saved_far, architecture="bidirectional")
    with pytest.raises(UserError, match="'diagonal' is not known: choose bidirectional or causal"):
        backbone_class("diagonal")


@torch.no_grad()
def test_wan_and_bidirectional_networks_become_causal(wan, stock, saved, tmp_path, make_text) -> None:
    """All frames at once they are what they were; compressed frames start as diffusers starts them."""
    told, full = make_text([3, 20])
    latents, t = torch.randn(2, 3, 16, 8, 12), torch.tensor([981.0, 40.0])
    wan.save_pretrained(tmp_path / "wan" / "transformer")
    causal = load_backbone(tmp_path / "wan", architecture="causal")
    expected = wan(latents.transpose(1, 2), t, full, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(causal(latents, t, t, told), expected, atol=1e-5, rtol=1e-5)

    converted = load_backbone(saved, architecture="causal")
    bidirectional = load_backbone(saved)
    torch.testing.assert_close(converted(latents, t, t / 2, told), bidirectional(latents, t, t / 2, told))
    fresh = AnyFlowFARTransformer3DModel(**{k: v for k, v in stock.config.items() if not k.startswith("_")})
    fresh.patch_embedding.load_state_dict(stock.patch_embedding.state_dict())
    kernel = fresh.patch_embedding.weight.view(-1, 1, 1, 2, 2)
    stretched = torch.nn.functional.interpolate(kernel, size=(1, 4, 4), mode="trilinear", align_corners=False)
    torch.testing.assert_close(converted.transformer.far_patch_embedding.weight, stretched.view(48, 16, 1, 4, 4))
    assert torch.equal(converted.transformer.far_patch_embedding.bias, stock.patch_embedding.bias)


def test_a_network_that_becomes_causal_is_told_its_chunks_and_one_that_is_knows(saved, saved_far) -> None:
    chunks = {"chunk_partition": [1, 1, 2], "full_chunk_limit": 4, "compressed_patch_size": [1, 8, 4], "ffn_dim": 9}
    converted = load_backbone(saved, architecture="causal", network=chunks).transformer
    assert {name: converted.config[name] for name in CHUNKING} == {name: chunks[name] for name in CHUNKING}
    assert converted.far_patch_embedding.weight.shape[2:] == (1, 8, 4) and converted.config.ffn_dim == 64
    kept = load_backbone(saved_far, architecture="causal", network=chunks)
    assert kept.chunks_of(3) == (1, 2) and kept.transformer.config.full_chunk_limit == 2


def test_a_new_causal_network_starts_as_a_converted_one(tiny_config) -> None:
    new, plain = new_backbone({**tiny_config, "chunk_partition": [1, 2]}, 3, "causal"), new_backbone(tiny_config, 3)
    assert isinstance(new, CausalBackbone) and new.chunks_of(5) == (1, 2, 2)
    far = new.transformer.far_patch_embedding.weight
    torch.testing.assert_close(far.mean((2, 3, 4)), new.transformer.patch_embedding.weight.mean((2, 3, 4)))
    assert not new.transformer.proj_out.weight.any()
    new.fit_clip(8)
    assert list(new.transformer.config.chunk_partition) == [1, 2, 2, 2, 1]
    plain.fit_clip(8)  # a bidirectional network takes any length


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "CogVideoXTransformer3DModel"}, "names CogVideoXTransformer3DModel: only Wan and AnyFlow"),
        ({"image_dim": 1280}, "image_dim = 1280: take a text-to-video"),
        ({"in_channels": 36}, "in_channels = 36"),
        ({"num_layers": 3}, r"lacks blocks\.2\.attn1.* and \d+ more weights"),
        ({"num_layers": 1}, r"also has blocks\.1\.attn1"),
        ({"ffn_dim": 65}, r"blocks\.0\.ffn\.net\.0\.proj\.bias has shape \(64,\) where config.json asks for \(65,\)"),
    ],
)
def test_what_does_not_fit_is_named(saved, config, message) -> None:
    change_config(saved, **config)
    with pytest.raises(UserError, match=message):
        load_backbone(saved)


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q.scale_weight", "scaled_fp8", "blocks.0.ffn.net.2.weight.absmax"])
def test_quantised_weights_are_refused_by_name(saved, name: str) -> None:
    """Scaled float8 files of other tools: their numbers alone would load, and mean nothing."""
    change_weights(saved, lambda weights: weights.update({name: torch.ones(1)}))
    with pytest.raises(UserError, match=rf"quantised weights \({name}\): give the model as it was published"):
        load_backbone(saved)


def test_codes_that_lack_their_scales_are_refused_and_plain_float8_is_read(stock, saved) -> None:
    name = "blocks.1.attn1.to_q.weight"
    small = stock.state_dict()[name].to(torch.float8_e4m3fn)
    change_weights(saved, lambda weights: weights.update({name: small}))
    for stored in (False, True):
        loaded = load_backbone(saved, leave_stored=stored)
        read = loaded.stored.read(name) if stored else loaded.transformer.state_dict()[name]
        assert torch.equal(read, small.float())
    change_weights(saved, lambda weights: weights.update({name: small.to(torch.int8)}))
    with pytest.raises(UserError, match=rf"quantised weights \({name}\)"):
        load_backbone(saved)


def test_a_missing_delta_embedder_is_named(saved) -> None:
    name = "condition_embedder.delta_embedder.linear_1.weight"
    change_weights(saved, lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=f"lacks {name}"):
        load_backbone(saved)


def test_missing_and_damaged_files_are_named(saved, tmp_path) -> None:
    with pytest.raises(UserError, match="No folder /no/such/place: give a model folder"):
        load_backbone("/no/such/place")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"No config\.json in .*empty"):
        load_backbone(tmp_path / "empty")
    weights = saved / "transformer" / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="missing or damaged"):
        load_backbone(saved)
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(UserError, match=r"only pickled weights \(diffusion_pytorch_model.bin\), which are never read"):
        load_backbone(saved)


def test_an_unknown_hub_name_is_a_user_error(monkeypatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"No folder nobody/nothing, and the Hugging Face Hub .*no network"):
        load_backbone("nobody/nothing")


def test_the_shift_is_read_from_either_scheduler(saved) -> None:
    assert read_shift(saved) == 5.0
    (saved / "scheduler").mkdir()
    for key, value in (("flow_shift", 3.0), ("shift", 4.0)):
        (saved / "scheduler" / "scheduler_config.json").write_text(json.dumps({key: value}))
        assert read_shift(saved) == value


def test_wrong_config_of_wan_is_found_before_its_weights_are_read(tiny_config, tmp_path) -> None:
    WanTransformer3DModel(**tiny_config).save_pretrained(tmp_path / "transformer")
    (tmp_path / "transformer_2").mkdir()
    with pytest.raises(UserError, match="two transformers"):
        load_backbone(tmp_path)


def test_anyflow_type(stock, saved) -> None:
    assert type(load_backbone(saved).transformer) is AnyFlowTransformer3DModel


def test_a_revision_of_a_hub_model_is_pinned(saved, monkeypatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_backbone("owner/model@0123abc")
    assert (asked["name"], asked["revision"]) == ("owner/model", "0123abc")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])
    load_backbone("owner/model")
    assert asked["revision"] is None


def test_weights_left_in_their_files_are_read_by_the_window(wan, tmp_path) -> None:
    wan.save_pretrained(tmp_path)
    whole = load_backbone(tmp_path, dtype=torch.bfloat16).transformer.state_dict()
    left = load_backbone(tmp_path, dtype=torch.bfloat16, leave_stored=True)
    assert all(weight.is_meta for weight in left.parameters())
    assert copy.deepcopy(left).stored is left.stored
    for name, weight in whole.items():
        assert torch.equal(left.stored.read(name), weight), name
        window = (slice(0, 1), *(slice(0, size) for size in weight.shape[1:]))
        part = left.stored.read(name, window)
        assert torch.equal(part, weight[:1]) and part.dtype == weight.dtype
