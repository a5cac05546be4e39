"""A base in 8 or 4 bits: its products, its gradients, what it weighs, and an export that knows nothing of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.export import export_lora, export_pipeline
from anyflow.backbone.load import StoredWeights, load_backbone
from anyflow.backbone.lora import LoraSettings, add_lora, merged_state
from anyflow.backbone.model_card import ModelCard
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.quantized import QuantizedLinear, check_quantizer, quantize_base
from anyflow.backbone.roles import ROLES, AdapterRoles
from anyflow.errors import UserError
from anyflow.recipe import Recipe, load_recipe

BASES = ("int8", "nf4")
BYTES = {"int8": 1 + 4 / 64, "nf4": 0.5 + 4 / 64}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _ready() -> None:
    check_quantizer("nf4")


def adapted(folder: Path, base: Any, checkpointing: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The small model with an adapter that changes something, on a base of that kind."""
    backbone = load_backbone(folder, leave_stored=base != "full", gradient_checkpointing=checkpointing, dtype=dtype)
    add_lora(backbone, LoraSettings(4, 4.0))
    shaken(backbone)
    if base != "full":
        quantize_base(backbone, base, CPU)
    return backbone


def shaken(backbone: FlowMapBackbone) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, weight in backbone.named_parameters():
        if ".lora_B." in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05


def layers_of(backbone: FlowMapBackbone) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in backbone.transformer.named_modules() if isinstance(m, QuantizedLinear)}


def on_dequantised(folder: Path, quantised: FlowMapBackbone, checkpointing: bool = False) -> Any:
    """A plain network with the weights that the codes stand for."""
    twin = adapted(folder, "full", checkpointing)
    for name, layer in layers_of(quantised).items():
        twin.transformer.get_submodule(name).weight.data = layer.dequantized(torch.float32)
    return twin


Asked = tuple[Tensor, Tensor, Tensor, Conditions]


@pytest.fixture
def asked(make_text: Callable[..., tuple[Conditions, Tensor]]) -> Asked:
    times = torch.tensor([900.0, 300.0])
    return torch.randn(2, 5, 16, 8, 12), times, times / 3, make_text([3, 5])[0]


@pytest.mark.parametrize("base", BASES)
def test_a_product_is_that_of_the_dequantised_weight(base: Any) -> None:
    """Forward, backward and forward-mode derivative; wrong if codes were transposed, or a scale were missing."""
    weight, bias = torch.randn(48, 64) * torch.rand(48, 1), torch.randn(48)
    layer = QuantizedLinear(lambda: weight, bias, base, CPU)
    kept = layer.dequantized(torch.float32)
    assert (kept - weight).norm() < {"int8": 0.01, "nf4": 0.12}[base] * weight.norm()
    inputs, tangent = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 64)
    expected = F.linear(inputs, kept, bias)
    torch.testing.assert_close(layer(inputs), expected)
    pulled = torch.randn_like(expected)
    [gradient] = torch.autograd.grad(layer(inputs), inputs, pulled)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, inputs, pulled)[0])
    along = torch.func.jvp(layer, (inputs.detach(),), (tangent,))[1]
    torch.testing.assert_close(along, F.linear(tangent, kept))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
        layer(inputs).sum().backward()
    assert inputs.grad is not None and inputs.grad.dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_adapters_learn_as_on_the_dequantised_base(
    base: Any, checkpointing: bool, small_model: Path, asked: Asked
) -> None:
    quantised = adapted(small_model, base, checkpointing)
    twin = on_dequantised(small_model, quantised, checkpointing)
    answers = [network(*asked) for network in (quantised, twin)]
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
    for answer in answers:
        answer.square().mean().backward()
    own, theirs = (dict(network.named_parameters()) for network in (quantised, twin))
    trained = [name for name, weight in own.items() if weight.requires_grad]
    assert len(trained) == 2 * (6 * 2 + 4) and all(".lora_" in name for name in trained)
    for name in trained:
        torch.testing.assert_close(own[name].grad, theirs[name].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
def test_the_blocks_large_layers_alone_are_rounded_and_weigh_what_they_should(base: Any, small_model: Path) -> None:
    full, quantised = adapted(small_model, "full"), adapted(small_model, base)
    layers, own = layers_of(quantised), dict(quantised.transformer.named_parameters())
    assert len(layers) == 2 * 10 and all(name.startswith("blocks.") for name in layers)
    for name, weight in full.transformer.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in layers and name.endswith(".weight"):
            codes = (own[f"{owner}.codes"], own[f"{owner}.absmax"])
            assert sum(part.nbytes for part in codes) == BYTES[base] * weight.numel()
            assert not any(part.requires_grad for part in codes)
        else:
            assert torch.equal(own[name], weight)
    quantised.to(torch.bfloat16)
    assert {layer.absmax.dtype for layer in layers.values()} == {torch.float32}


def test_one_layer_at_a_time_is_read(small_model: Path) -> None:
    """While a network comes in, no weight is left in full once its codes are there."""
    alive: list[int] = []
    here: weakref.WeakSet[Tensor] = weakref.WeakSet()
    read = StoredWeights.read

    def watched(self: StoredWeights, name: str, window: tuple[slice, ...] = ()) -> Tensor:
        alive.append(sum(tensor.ndim == 2 for tensor in here))
        tensor = read(self, name, window)
        if name.startswith("blocks.") and name.endswith("weight"):
            here.add(tensor)
        return tensor

    with patch.object(StoredWeights, "read", watched):
        adapted(small_model, "nf4")
    assert max(alive) <= 1


@pytest.mark.parametrize("base", BASES)
def test_three_roles_share_one_quantised_base(base: Any, small_model: Path, asked: Asked) -> None:
    """The teacher is the quantised base itself; a switch before the backward pass leaves gradients alone."""
    quantised, bare = (load_backbone(small_model, leave_stored=True) for _ in range(2))
    add_lora(quantised, LoraSettings(4, 4.0))
    roles = AdapterRoles(quantised, LoraSettings(4, 4.0))
    shaken(quantised)
    for network in (quantised, bare):
        quantize_base(network, base, CPU)
    with torch.no_grad():
        answers = {role: roles(role, *asked) for role in ROLES}
        torch.testing.assert_close(answers["teacher"], bare(*asked))
    assert not torch.allclose(answers["student"], answers["teacher"])
    adapters = sum(weight.nbytes for _, weight in (*roles.parameters("student"), *roles.parameters("critic")))
    assert roles.weight_bytes - adapters == sum(weight.nbytes for weight in bare.parameters())
    student = roles("student", *asked)
    roles("critic", *asked)
    student.square().mean().backward()
    assert all(weight.grad is None for _, weight in roles.parameters("critic"))
    assert all(weight.grad is not None for _, weight in roles.parameters("student") if weight.ndim == 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_an_export_is_that_of_an_adapter_on_the_original(
    base: Any, dtype: torch.dtype, small_model: Path, codec: Codec, tmp_path: Path
) -> None:
    """Bitwise: nothing that was rounded is written, however the network was trained."""
    folders = {}
    for kind in ("full", base):
        backbone = adapted(small_model, kind, dtype=dtype)
        folders[kind] = tmp_path / kind
        export_pipeline(folders[kind], backbone.transformer, codec, 3.0, ModelCard("x", size=(17, 64, 96), fps=8.0))
        export_lora(folders[kind] / "lora", backbone)
    names = [file.relative_to(folders["full"]) for file in folders["full"].rglob("*") if file.is_file()]
    assert any(name.suffix == ".safetensors" and name.parts[0] == "transformer" for name in names)
    for name in names:
        if name.suffix == ".safetensors":  # whose header has no fixed order
            own, theirs = load_file(folders[base] / name), load_file(folders["full"] / name)
            assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
        else:
            assert (folders["full"] / name).read_bytes() == (folders[base] / name).read_bytes(), name
    assert merged_state(backbone.transformer).keys() == load_backbone(small_model).transformer.state_dict().keys()


@pytest.mark.parametrize("base", BASES)
def test_the_same_files_give_the_same_codes(base: Any, small_model: Path) -> None:
    """A resumed run quantises anew."""
    once, again = (adapted(small_model, base).state_dict() for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once) and once.keys() == again.keys()


def lora(*more: str, **where: str) -> Recipe:
    return load_recipe(
        "finetune/driving", overrides=["model.lora.enabled=true", "optimizer.name=adamw", *more], **where
    )  # type: ignore[arg-type]


def test_a_quantised_base_is_for_adapters_and_stays_whole() -> None:
    with pytest.raises(UserError, match=r"set model.lora.enabled=true, or model.lora.base=full"):
        load_recipe("finetune/driving", overrides=["model.lora.base=nf4"])
    with pytest.raises(UserError, match=r"set hardware.strategy=ddp, or model.lora.base=full"):
        lora("model.lora.base=int8", "hardware.strategy=fsdp", "hardware.devices=2")
    assert lora("model.lora.base=int8", hardware="8gpu").hardware.strategy == "ddp"
    assert lora(hardware="8gpu").hardware.strategy == "fsdp"


def test_who_lacks_the_library_is_told_before_anything_is_loaded() -> None:
    with patch("anyflow.backbone.quantized.find_spec", lambda name: None):
        with pytest.raises(UserError, match="needs bitsandbytes"):
            check_quantizer("int8")
        check_quantizer("full")
