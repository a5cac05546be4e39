"""A frozen base in 8 or 4 bits under low-rank adapters, so that training fits a small card.

The large layers of the blocks keep codes, and a scale for every 64 weights (QLoRA's NF4, or linear int8). A layer makes
its weights anew whenever it multiplies, forward and backward, in the network's precision: one layer at a time lies
there in full. The weights alone are rounded: the network stays a smooth function of latents and times, with another
finite difference (measured in docs/large.md). bitsandbytes does the rounding. Its own layers, and PEFT's on them, serve
less: they quantise when they are moved, when a whole network lies there already; they have no forward-mode derivative;
the 8-bit one multiplies in float16.

The originals stay in their files. An export merges adapters into those, so that no rounding is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow.backbone.options import BaseWeights
from anyflow.backbone.parallelize import load_parts
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.errors import UserError, first_line

BLOCK = 64
"""Weights that share a scale (``absmax``, float32): half a bit more for each weight."""

_CODES = ("codes", "absmax", "levels")
"""Names of what a layer holds instead of its weight."""


def check_quantizer(base: BaseWeights) -> None:
    """That what quantises a base is installed, if one is to be quantised; it is got ready here.

    Raises:
        UserError: it is not.
    """
    if base == "full":
        return
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.lora.base={base} needs bitsandbytes, which is not installed: run pip install -e "
            "'.[quantized]', or set model.lora.base=full"
        )
    try:
        import bitsandbytes  # noqa: F401 (registers its operators with torch)
    except Exception as error:  # whatever a broken build of it raises
        raise UserError(
            f"model.lora.base={base}: bitsandbytes is installed and cannot be imported ({first_line(error)}): install "
            "it again, or set model.lora.base=full"
        ) from error


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is kept as codes.

    Attributes:
        original: reads the weight as it was before, from its file.
        codes: uint8, one weight each, or two.
        absmax: the scale of every BLOCK weights, float32.
        levels: what the codes stand for; None: NF4's levels.
    """

    codes: Tensor
    absmax: Tensor
    levels: Tensor | None

    def __init__(self, original: Callable[[], Tensor], bias: Tensor | None, base: BaseWeights, device: Any) -> None:
        super().__init__()
        self.original = original
        weight = original().to(device)
        self.out_features, self.in_features = weight.shape
        levels = None
        if base == "nf4":
            codes, absmax = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
        else:
            # in 255 equal steps; bitsandbytes asks for a table of 256
            levels = torch.arange(-127, 129, dtype=torch.float32, device=device).clamp(max=127) / 127
            codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(weight, levels, BLOCK)
        for name, value in zip((*_CODES, "bias"), (codes, absmax, levels, bias), strict=True):
            kept = None if value is None else nn.Parameter(value.to(device), requires_grad=False)
            self.register_parameter(name, kept)

    def forward(self, inputs: Tensor) -> Tensor:
        """As ``nn.Linear`` with the weights that the codes stand for, under autocast too."""
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        shape = (self.out_features, self.in_features)
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Tensor = _Product.apply(inputs.to(dtype), self.codes, self.absmax, self.levels, bias, shape)
        return product

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights that the codes stand for, ``[outputs, inputs]``."""
        return _weight(self.codes, self.absmax, self.levels, (self.out_features, self.in_features), dtype)


def _weight(codes: Tensor, absmax: Tensor, levels: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    operators = torch.ops.bitsandbytes
    if levels is None:
        weight: Tensor = operators.dequantize_4bit(codes, absmax, BLOCK, "nf4", shape, dtype)
    else:
        weight = operators.dequantize_blockwise(codes, absmax, levels, BLOCK, dtype)
    return weight


class _Product(torch.autograd.Function):
    """``F.linear`` that keeps codes for the backward pass, where the usual one would keep the weight."""

    @staticmethod
    def forward(
        inputs: Tensor, codes: Tensor, absmax: Tensor, levels: Tensor | None, bias: Tensor | None, shape: Any
    ) -> Tensor:
        return F.linear(inputs, _weight(codes, absmax, levels, shape, inputs.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])
        ctx.save_for_forward(*inputs[1:4])
        ctx.shape = inputs[5]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes, absmax, levels = ctx.saved_tensors
        return gradient @ _weight(codes, absmax, levels, ctx.shape, gradient.dtype), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        codes, absmax, levels = ctx.saved_tensors
        return F.linear(tangent, _weight(codes, absmax, levels, ctx.shape, tangent.dtype))


@torch.no_grad()
def quantize_base(backbone: FlowMapBackbone, base: BaseWeights, device: torch.device) -> None:
    """Bring a network in from its files, the large layers of its blocks quantised one by one; adapters are on it.

    Never more than one layer lies anywhere in full. Adapters, times, norms, embeddings and the read-out stay as they
    are.
    """
    stored, transformer = backbone.stored, backbone.transformer
    for name in _large_layers(transformer):
        bias = stored.read(f"{name}.bias") if transformer.get_submodule(name).bias is not None else None
        layer = QuantizedLinear(partial(stored.read, f"{name}.weight"), bias, base, device)
        transformer.set_submodule(name, layer)
    load_parts(backbone, device)


def _large_layers(transformer: nn.Module) -> list[str]:
    """The blocks' linear layers by name: attention to the video and to the text, feed-forward."""
    names = (name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    return [name for name in names if name.startswith("blocks.") and ".lora_" not in name]


def with_originals(transformer: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The items of a network's state; those of quantised layers as they are in the network's files, one at a time."""
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        if owner not in layers or last == "bias":
            yield name, tensor
        elif last == _CODES[0]:
            yield f"{owner}.weight", layers[owner].original()
