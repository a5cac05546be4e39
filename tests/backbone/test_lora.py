"""Adapters: what is trained, what is saved, what is merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from anyflow.backbone.bidirectional import BidirectionalBackbone
from anyflow.backbone.export import export_lora
from anyflow.backbone.lora import LoraSettings, add_lora, load_lora, lora_state, merged_state
from anyflow.errors import UserError

SETTINGS = LoraSettings(rank=4, alpha=8)
T, R = torch.tensor([900.0, 30.0]), torch.tensor([100.0, 30.0])


@pytest.fixture
def adapted(stock) -> BidirectionalBackbone:
    """A network with an adapter that changes it."""
    backbone = BidirectionalBackbone(copy.deepcopy(stock))
    add_lora(backbone, SETTINGS)
    for name, parameter in backbone.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return backbone


@pytest.fixture
def inputs(make_text) -> tuple:
    return torch.randn(2, 2, 16, 8, 12), T, R, make_text([3, 9])[0]


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(stock, inputs) -> None:
    """Two blocks of 48 and 64 channels: 4 x (48+48) + 2 x (48+64) a block, and twice (32+48) + (48+48), all times 4."""
    backbone = BidirectionalBackbone(stock)
    before = backbone(*inputs)
    count = add_lora(backbone, SETTINGS)
    assert count == 4 * (2 * (4 * 96 + 2 * 112) + 2 * (80 + 96))
    torch.testing.assert_close(backbone(*inputs), before)
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert not any("attn2" in name for name in trained)


def test_both_time_embedders_are_trained_and_saved(adapted, inputs) -> None:
    adapted(*inputs).square().mean().backward()
    saved = lora_state(adapted)
    assert len(saved) == 2 * (2 * 6 + 4)
    for part in ("time_embedder", "delta_embedder"):
        for layer in ("linear_1", "linear_2"):
            name = f"condition_embedder.{part}.{layer}"
            assert {f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= saved.keys()
            module = adapted.transformer.get_submodule(name)
            assert module.lora_A["default"].weight.grad.abs().sum() > 0, name


def test_the_same_seed_gives_the_same_adapter(stock) -> None:
    states = []
    for seed in (1, 1, 2):
        backbone = BidirectionalBackbone(copy.deepcopy(stock))
        add_lora(backbone, SETTINGS, seed)
        states.append(lora_state(backbone)["blocks.0.attn1.to_q.lora_A.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_adapters_are_float32_on_a_bfloat16_base(stock, inputs) -> None:
    backbone = BidirectionalBackbone(stock).to(torch.bfloat16)
    add_lora(backbone, SETTINGS)
    backbone.to(torch.bfloat16)
    assert {weight.dtype for weight in lora_state(backbone).values()} == {torch.float32}
    backbone(*inputs).square().mean().backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


@torch.no_grad()
def test_merging_gives_the_same_network_without_adapter(adapted, stock, inputs) -> None:
    expected = adapted(*inputs)
    plain = BidirectionalBackbone(copy.deepcopy(stock))
    assert (plain(*inputs) - expected).abs().max() > 1e-2
    plain.transformer.load_state_dict(merged_state(adapted.transformer))
    torch.testing.assert_close(plain(*inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapted(*inputs), expected)  # left alone


def test_averaged_weights_are_merged_and_exported_in_place_of_the_networks_own(adapted) -> None:
    averaged = {
        name: weight * (0.5 if ".lora_B." in name else 1) for name, weight in adapted.transformer.state_dict().items()
    }
    name = "blocks.1.ffn.net.2"
    own, half = (merged_state(adapted.transformer, weights=weights)[f"{name}.weight"] for weights in (None, averaged))
    base = adapted.transformer.get_submodule(name).base_layer.weight
    torch.testing.assert_close(half - base, (own - base) / 2, atol=1e-6, rtol=1e-4)
    key = f"{name}.lora_B.weight"
    assert torch.equal(lora_state(adapted, weights=averaged)[key] * 2, lora_state(adapted)[key])


@torch.no_grad()
def test_an_exported_adapter_comes_back(adapted, stock, inputs, tmp_path) -> None:
    file = export_lora(tmp_path, adapted)
    for path in (tmp_path, file):
        backbone = BidirectionalBackbone(copy.deepcopy(stock))
        load_lora(backbone, path)
        assert torch.equal(backbone(*inputs), adapted(*inputs))
        trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        assert len(trained) == len(lora_state(backbone))


def test_an_adapter_of_another_network_is_refused(adapted, tiny_config, tmp_path) -> None:
    from anyflow.backbone.load import new_backbone

    export_lora(tmp_path, adapted)
    for change in ({"num_layers": 3}, {"num_layers": 1}, {"ffn_dim": 96}):
        with pytest.raises(UserError, match="does not fit this network"):
            load_lora(new_backbone({**tiny_config, **change}, seed=0), tmp_path)
    with pytest.raises(UserError, match="No LoRA at"):
        load_lora(adapted, tmp_path / "nothing")


def test_dropout_and_unknown_targets_are_refused(stock) -> None:
    with pytest.raises(UserError, match=r"dropout is 0\.1, but must be 0: it would corrupt the finite difference"):
        LoraSettings(dropout=0.1)
    with pytest.raises(UserError, match="must be positive"):
        LoraSettings(rank=0)
    with pytest.raises(UserError, match=r"attn3\.to_q, which is no linear layer: choose from attn1\.to_k"):
        add_lora(BidirectionalBackbone(stock), LoraSettings(targets=("attn3.to_q",)))
    with pytest.raises(UserError, match="attn1, which is no linear layer"):
        add_lora(BidirectionalBackbone(stock), LoraSettings(targets=("attn1",)))
