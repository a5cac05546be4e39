"""What bfloat16 leaves of the flow map's finite difference, and what runs from block to block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow.backbone.bidirectional import in_float32
from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.embedded import transformer_config
from anyflow.backbone.load import new_backbone
from anyflow.backbone.options import Residual


@pytest.fixture(scope="module")
def network() -> Any:
    """The embedded network with weights of every layer drawn; bidirectional."""
    found, generator = new_backbone(transformer_config(), 0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    return found


def difference(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    z, v = (torch.randn(2, 3, 16, 8, 8, generator=generator) for _ in range(2))
    told = Conditions(Text(torch.randn(2, 5, network.transformer.config.text_dim, generator=generator), None, 5))
    t, r = torch.tensor([300.0, 800.0]), torch.tensor([100.0, 700.0])
    with torch.no_grad():
        ahead, behind = (network(z + side * v * 0.005, t + 5 * side, r, told) for side in (1, -1))
    return ahead - behind


def error(network: Any, residual: Residual) -> float:
    """Of the finite difference in bfloat16, rms."""
    exact = difference(network)
    network.compute, network.residual = torch.bfloat16, residual
    try:
        return float((difference(network) - exact).square().mean().sqrt())
    finally:
        network.compute, network.residual = None, "auto"


def test_a_float32_stream_halves_the_error_of_the_finite_difference(network: Any) -> None:
    """And costs nothing in passes without gradient: there it is the default."""
    assert error(network, "auto") == error(network, "float32") < 0.6 * error(network, "compute")


@pytest.mark.parametrize("residual, with_gradient", [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_pass_with_gradient_keeps_activations_as_narrow_as_asked(
    network: Any, residual: Residual, with_gradient: torch.dtype
) -> None:
    seen: list[torch.dtype] = []
    hook = network.transformer.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    network.compute, network.residual = torch.bfloat16, residual
    told = Conditions(Text(torch.zeros(1, 5, network.transformer.config.text_dim), None, 5))
    try:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                answer = network(torch.zeros(1, 1, 16, 4, 4), torch.tensor([300.0]), torch.tensor([100.0]), told)
            assert answer.dtype == torch.float32
    finally:
        hook.remove()
        network.compute, network.residual = None, "auto"
    assert seen == [with_gradient, torch.float32]


def test_a_layer_in_bfloat16_computes_in_float32() -> None:
    """A base that is kept in bfloat16 has rounded weights, and its inputs are not rounded to match."""
    layer = torch.nn.Linear(8, 4).to(torch.bfloat16)
    inputs = torch.randn(3, 8, requires_grad=True)
    wide = torch.nn.functional.linear(inputs, layer.weight.float(), layer.bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = in_float32(layer, inputs)
    assert torch.equal(found, wide)
    found.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.bfloat16 and inputs.grad is not None
