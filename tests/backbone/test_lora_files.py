"""Adapters that other trainers wrote: each is taken at its own scale, or one sentence says what it is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow.backbone.bidirectional import BidirectionalBackbone
from anyflow.backbone.export import export_lora, rename_for_comfyui
from anyflow.backbone.files import LORA_FILE
from anyflow.backbone.load import new_backbone
from anyflow.backbone.lora import LoraSettings, add_lora, load_lora, lora_state, merged_state
from anyflow.backbone.lora_files import find_lora, read_lora
from anyflow.backbone.model_card import ModelCard
from anyflow.errors import UserError

WAN = {
    **{f"attn{n}.to_{part}": f"{kind}_attn.{part}" for n, kind in ((1, "self"), (2, "cross")) for part in "qkv"},
    **{"attn1.to_out.0": "self_attn.o", "attn2.to_out.0": "cross_attn.o"},
    **{"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"},
}
"""Written out by hand: what the code's own table must agree with."""

Layers = dict[str, tuple[Tensor, Tensor]]
RANK = 4


def layers_of(network: Any, ranks: Callable[[str], int] = lambda _: RANK) -> Layers:
    """Random halves for every layer of the blocks, by diffusers' names."""
    drawn = {}
    for name, module in network.named_modules():
        block = re.fullmatch(r"blocks\.\d+\.(.+)", name)
        if block and block[1] in WAN:
            rank = ranks(name)
            drawn[name] = (torch.randn(rank, module.in_features) * 0.1, torch.randn(module.out_features, rank) * 0.1)
    return drawn


def wan(name: str) -> str:
    _, number, rest = name.split(".", 2)
    return f"blocks.{number}.{WAN[rest]}"


def kohya(name: str) -> str:
    return f"lora_unet_{wan(name)}".replace(".", "_")


FORMS: dict[str, tuple[Callable[[str], str], str, str, float | None]] = {
    "diffusers": (lambda name: f"transformer.{name}", "lora_A.weight", "lora_B.weight", None),
    "diffusers, plain": (lambda name: name, "lora_A.weight", "lora_B.weight", None),
    "diffusers, of old": (lambda name: f"transformer.{name}", "lora.down.weight", "lora.up.weight", 3.0),
    "PEFT": (lambda name: f"base_model.model.{name}", "lora_A.weight", "lora_B.weight", None),
    "PEFT of Wan's code": (lambda name: f"base_model.model.{wan(name)}", "lora_A.weight", "lora_B.weight", None),
    "ComfyUI": (lambda name: f"diffusion_model.{wan(name)}", "lora_A.weight", "lora_B.weight", None),
    "ComfyUI, alpha": (lambda name: f"diffusion_model.{wan(name)}", "lora_down.weight", "lora_up.weight", 8.0),
    "musubi": (kohya, "lora_down.weight", "lora_up.weight", 2.0),
    "DiffSynth": (wan, "lora_A.default.weight", "lora_B.default.weight", None),
    "DiffSynth, pipe": (lambda name: f"pipe.dit.{wan(name)}", "lora_A.default.weight", "lora_B.default.weight", None),
}
"""``(a layer's name, the halves' endings, alpha)``; without an alpha the scale is 1."""


def written(layers: Layers, form: str) -> dict[str, Tensor]:
    name_of, down_end, up_end, alpha = FORMS[form]
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {f"{name_of(name)}.{down_end}": down, f"{name_of(name)}.{up_end}": up}
        if alpha is not None:
            tensors[f"{name_of(name)}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture
def inputs(make_text: Any) -> tuple[Any, ...]:
    return torch.randn(2, 2, 16, 8, 12), torch.tensor([900.0, 30.0]), torch.tensor([100.0, 30.0]), make_text([3, 9])[0]


@torch.no_grad()
def by_hand(stock: Any, layers: Layers, scale: Callable[[str], float]) -> BidirectionalBackbone:
    """The network with ``scale * B @ A`` added to its weights."""
    network = copy.deepcopy(stock)
    for name, (down, up) in layers.items():
        network.get_submodule(name).weight += scale(name) * up.float() @ down.float()
    return BidirectionalBackbone(network)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_converted_adapter_answers_as_the_merged_weights(
    form: str, stock: Any, inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers, alpha = layers_of(stock), FORMS[form][3]
    save_file(written(layers, form), tmp_path / "any-name.safetensors")
    expected = by_hand(stock, layers, lambda _: 1.0 if alpha is None else alpha / RANK)(*inputs)
    backbone = BidirectionalBackbone(copy.deepcopy(stock))
    assert (backbone(*inputs) - expected).abs().max() > 1e-2, "the adapter changes something"
    load_lora(backbone, tmp_path)
    torch.testing.assert_close(backbone(*inputs), expected, atol=1e-5, rtol=1e-5)
    plain = BidirectionalBackbone(copy.deepcopy(stock))
    plain.transformer.load_state_dict(merged_state(backbone.transformer))
    torch.testing.assert_close(plain(*inputs), expected, atol=1e-5, rtol=1e-5)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{len(layers)} layers of rank {RANK}" in told
    assert {p.requires_grad for n, p in backbone.named_parameters() if ".lora_" in n} == {True}


@pytest.mark.parametrize("has_alphas", [True, False])
@torch.no_grad()
def test_layers_of_several_ranks_and_scales_keep_their_own(
    has_alphas: bool, stock: Any, inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers has one scale for all layers of one file; where ranks differ, alphas do not mean the same."""
    layers = layers_of(stock, lambda name: 2 if "ffn" in name else 6)
    alphas = {name: 5.0 if "attn1" in name else 3.0 for name in layers}
    tensors = written(layers, "ComfyUI")
    if has_alphas:
        tensors |= {f"diffusion_model.{wan(name)}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    backbone = BidirectionalBackbone(copy.deepcopy(stock))
    load_lora(backbone, tmp_path / "lora.safetensors")
    expected = by_hand(stock, layers, lambda n: alphas[n] / layers[n][0].shape[0] if has_alphas else 1.0)
    torch.testing.assert_close(backbone(*inputs), expected(*inputs), atol=1e-5, rtol=1e-5)
    assert "lower ranks are filled up with zeros" in capsys.readouterr().err


@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_pefts_own_folder_has_its_scale_beside_it(rslora: bool, stock: Any, inputs: Any, tmp_path: Path) -> None:
    layers = layers_of(stock)
    save_file(written(layers, "PEFT of Wan's code"), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 7, "use_rslora": rslora, "target_modules": ["q", "ffn.0"]}
    config["alpha_pattern"] = {"blocks.1.self_attn.q": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    backbone = BidirectionalBackbone(copy.deepcopy(stock))
    load_lora(backbone, tmp_path)
    divisor = RANK**0.5 if rslora else RANK
    expected = by_hand(stock, layers, lambda name: (2 if name == "blocks.1.attn1.to_q" else 7) / divisor)
    torch.testing.assert_close(backbone(*inputs), expected(*inputs), atol=1e-5, rtol=1e-5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(UserError, match=r"adapter_config\.json is of LOHA, and only LoRA is read"):
        load_lora(BidirectionalBackbone(copy.deepcopy(stock)), tmp_path)


@pytest.mark.parametrize(
    ("form", "convert"),
    [
        ("ComfyUI", _convert_non_diffusers_wan_lora_to_diffusers),
        ("ComfyUI, alpha", _convert_non_diffusers_wan_lora_to_diffusers),
        ("musubi", _convert_musubi_wan_lora_to_diffusers),
    ],
)
def test_diffusers_converters_agree(form: str, convert: Any, stock: Any, tmp_path: Path) -> None:
    """Where these know a file, the change of each layer is theirs."""
    tensors = written(layers_of(stock), form)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", stock)
    theirs = convert({name: tensor.clone() for name, tensor in tensors.items()})
    assert len(theirs) == 2 * len(found.layers)
    for name, (down, up) in found.layers.items():
        change = theirs[f"transformer.{name}.lora_B.weight"] @ theirs[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(found.alpha / found.rank * up @ down, change)


def test_half_precision_and_some_blocks_alone_are_taken(stock: Any, tmp_path: Path) -> None:
    layers = {name: pair for name, pair in layers_of(stock).items() if name.startswith("blocks.1.attn1.to_q")}
    tensors = {name: tensor.bfloat16() for name, tensor in written(layers, "ComfyUI").items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    backbone = BidirectionalBackbone(copy.deepcopy(stock))
    load_lora(backbone, tmp_path)
    assert {name.partition(".lora_")[0] for name in lora_state(backbone)} == layers.keys()
    assert {weight.dtype for weight in lora_state(backbone).values()} == {torch.float32}


@torch.no_grad()
def test_comfyuis_layout_comes_back(stock: Any, inputs: Any, tmp_path: Path) -> None:
    """Names as ComfyUI looks them up: the layer's path behind ``diffusion_model.``, an alpha beside each pair."""
    backbone = BidirectionalBackbone(copy.deepcopy(stock))
    add_lora(backbone, LoraSettings(rank=4, alpha=6))
    for name, parameter in backbone.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "mine"
    export_lora(folder, backbone, ModelCard("a title", base_model="owner/base"))
    assert rename_for_comfyui(folder, "mine") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "mine.safetensors"]
    readme = (folder / "README.md").read_text()
    assert "models/loras" in readme and "load_lora_weights" not in readme and readme.startswith("---")
    tensors = load_file(folder / "mine.safetensors")
    layer = "diffusion_model.blocks.1.self_attn.o"
    assert tensors[f"{layer}.lora_down.weight"].shape == (4, 48) and tensors[f"{layer}.lora_up.weight"].shape == (48, 4)
    assert float(tensors[f"{layer}.alpha"]) == 6
    assert {name.split(".")[1] for name in tensors} == {"blocks", "time_embedding", "delta_embedding"}
    again = BidirectionalBackbone(copy.deepcopy(stock))
    load_lora(again, folder)
    assert torch.equal(again(*inputs), backbone(*inputs))
    assert {n: tuple(w.shape) for n, w in lora_state(again).items()} == {
        n: tuple(w.shape) for n, w in lora_state(backbone).items()
    }


STRANGE: dict[str, tuple[dict[str, Tensor], str]] = {
    "DoRA": ({"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(48, 1)}, "has a DoRA adapter"),
    "LoKr": ({"lycoris_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 2)}, "has a LyCORIS adapter"),
    "LoHa": ({"diffusion_model.blocks.0.self_attn.q.hada_w1_a": torch.ones(2, 2)}, "has a LyCORIS adapter"),
    "differences": ({"diffusion_model.blocks.0.norm3.diff_b": torch.ones(48)}, "has changes of whole weights"),
    "biases": ({"diffusion_model.blocks.0.self_attn.q.lora_B.bias": torch.ones(48)}, "has biases"),
    "half": ({"diffusion_model.blocks.0.cross_attn.q.lora_A.weight": torch.ones(4, 48)}, "without its other half"),
    "text encoder": (
        {"lora_te_layer_0.lora_down.weight": torch.ones(4, 8), "lora_te_layer_0.lora_up.weight": torch.ones(8, 4)},
        "does not fit this network: lora_te_layer_0 is no linear layer of it",
    ),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_no_plain_adapter_is_named(what: str, stock: Any, tmp_path: Path) -> None:
    more, sentence = STRANGE[what]
    layers = {name: pair for name, pair in layers_of(stock).items() if name == "blocks.0.attn1.to_q"}
    save_file({**written(layers, "ComfyUI"), **more}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        load_lora(BidirectionalBackbone(stock), tmp_path)
    assert str(tmp_path / "lora.safetensors") in str(caught.value)


def test_differences_of_nothing_are_left_out_and_told(stock: Any, tmp_path: Path) -> None:
    """Distilled adapters for ComfyUI hold norms' differences that are all zero."""
    tensors = {**written(layers_of(stock), "ComfyUI"), "diffusion_model.blocks.0.norm3.diff": torch.zeros(48)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert "1 changes of 0 left out" in read_lora(tmp_path / "lora.safetensors", stock).told


def test_an_adapter_of_a_larger_model_is_refused_with_the_shapes(
    stock: Any, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """As one of 14B for 1.3B: the names are the same."""
    save_file(written(layers_of(stock), "musubi"), tmp_path / "lora.safetensors")
    smaller = new_backbone({**tiny_config, "attention_head_dim": 12, "ffn_dim": 32}, 0)
    sentence = r"has 48 inputs and 48 outputs in the file, 24 and 24 in the network: it is the adapter of a model of"
    with pytest.raises(UserError, match=sentence):
        load_lora(smaller, tmp_path)


def test_what_cannot_be_an_adapters_file_is_told(stock: Any, tmp_path: Path) -> None:
    backbone = BidirectionalBackbone(stock)
    save_file(dict(stock.state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds no adapter: give the file of a LoRA"):
        load_lora(backbone, tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.safetensors cannot be read"):
        load_lora(backbone, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="holds 2 safetensors files: name one of them"):
        load_lora(backbone, tmp_path)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04")
    for place in (tmp_path / "pickled", tmp_path / "pickled" / "adapter_model.bin"):
        with pytest.raises(UserError, match=r"adapter_model\.bin is pickled, and pickles are never read"):
            load_lora(backbone, place)
    with pytest.raises(UserError, match="No LoRA at"):
        find_lora(tmp_path / "nothing")
    (tmp_path / LORA_FILE).write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load_lora(backbone, tmp_path)
