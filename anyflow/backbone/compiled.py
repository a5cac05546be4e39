"""Compiled blocks: few graphs, which all blocks and roles share, and a word where something is not compiled.

``torch.compile`` makes a new graph whenever what it assumed of its arguments no longer holds. What the stages ask a
network differs in nearly everything it would assume: which adapter speaks, how many rows and tokens, how long the texts
are, which runs of tokens see which. So a block is cut in two functions, before and after its attention, which take
tensors alone:

- a layer comes as its weights and those of the adapter that speaks, found beforehand: names are never compared;
- rows, tokens and texts are marked as dimensions that vary;
- self-attention, one call of a library kernel, stays between the two functions, with its mask and its memory.

What is left makes a graph each: whether there is a gradient (and whether the times want one), whether an adapter
speaks, one time a clip or one a frame, one row or several. That is all, for any number of blocks and steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow.backbone.attention import RotaryTable, attend, padding_bias, project, rotate
from anyflow.backbone.protocol import FlowMapBackbone, Text

LIMIT = 64
"""Graphs of one function, after which the rest is not compiled: several times what any stage needs."""


class Layer(NamedTuple):
    """A linear layer and the low-rank adapter that speaks on it, if one does; called as the layer is."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0

    def __call__(self, inputs: Tensor) -> Tensor:
        result = F.linear(inputs, self.weight, self.bias)
        if self.down is None or self.up is None:
            return result
        change = F.linear(F.linear(inputs.to(self.down.dtype), self.down), self.up) * self.scale
        return (result + change).to(result.dtype)


class Attention(NamedTuple):
    """The parts of an attention module that :func:`~anyflow.backbone.attention.project` asks for, and what follows."""

    to_q: Layer
    to_k: Layer
    to_v: Layer
    to_out: Layer
    norm_q: nn.Module
    norm_k: nn.Module
    heads: int


class Parts(NamedTuple):
    """A block, taken apart."""

    table: Tensor
    video: Attention
    text: Attention
    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    widen: Layer
    narrow: Layer


def before_attention(
    parts: Parts, hidden: Tensor, modulation: Tensor, rotary: RotaryTable
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, keys and values ``[B, L, heads, head_dim]``; ``modulation`` ``[B, 1 or L, 2, dim]``."""
    shift, scale = (parts.table[:, :2] + modulation.float()).unbind(2)
    normed = (parts.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    query, key, value = project(parts.video, normed, normed)
    return rotate(query, rotary).to(value.dtype), rotate(key, rotary).to(value.dtype), value


def after_attention(
    parts: Parts,
    hidden: Tensor,
    attended: Tensor,
    modulation: Tensor,
    embeddings: Tensor,
    lengths: Tensor | None,
    padded_length: int,
) -> Tensor:
    """The rest of a block: the attention's result added, the text, the feed-forward; ``modulation`` has 4 rows here."""
    gate, shift, scale, last_gate = (parts.table[:, 2:] + modulation.float()).unbind(2)
    hidden = (hidden.float() + parts.video.to_out(attended) * gate).type_as(hidden)

    normed = parts.norm2(hidden.float()).type_as(hidden)
    query, key, value = project(parts.text, normed, embeddings)
    bias = padding_bias(Text(embeddings, lengths, padded_length), value.dtype)
    hidden = hidden + parts.text.to_out(attend(query, key, value, bias))

    normed = (parts.norm3(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    change = parts.narrow(F.gelu(parts.widen(normed), approximate="tanh"))
    return (hidden.float() + change.float() * last_gate).type_as(hidden)


class Piece:
    """A compiled function; where it cannot be compiled it says so once and goes on as it was written.

    Attributes:
        function: As it was written.
        is_given_up: Whether it is no longer compiled.
    """

    def __init__(self, function: Callable[..., Any], backend: str) -> None:
        self.function = function
        self.is_given_up = False
        self._compiled = torch.compile(
            function, backend=backend, fullgraph=True, dynamic=False, recompile_limit=LIMIT
        )

    def __call__(self, *arguments: Any) -> Any:
        if self.is_given_up:
            return self.function(*arguments)
        try:
            return self._compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.is_given_up = True
            _tell(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return self.function(*arguments)


class CompiledBlock:
    """In the place of a block's ``forward``; the module, its hooks and its weights' names stay as they are."""

    def __init__(self, block: nn.Module, backend: str) -> None:
        self.block = block
        self.backend = backend

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Text | Tensor,
        temb: Tensor,
        rotary_emb: Any,
        attention_mask: Any = None,
        kv_cache: Any = None,
        kv_cache_flag: Any = None,
    ) -> Tensor:
        text, hidden, rotary = encoder_hidden_states, hidden_states, rotary_emb
        parts = take_apart(self.block)
        before, after = pieces(self.backend)
        if torch.is_grad_enabled() and not hidden.requires_grad and _is_trained(parts):
            hidden = hidden.detach().requires_grad_()  # the first block's, which would be a graph of its own
        first, rest = temb.split((2, 4), dim=2)
        _vary(hidden, 0, 1), _vary(first, 0, 1), _vary(rest, 0, 1), _vary(rotary[0], 1), _vary(rotary[1], 1)
        query, key, value = before(parts, hidden, first, rotary)
        if kv_cache is not None:
            key, value = kv_cache.extend(key, value)
        attended = attend(query, key, value, attention_mask)
        _vary(attended, 0, 1), _vary(text.embeddings, 0, 1), _vary(text.lengths, 0)
        return after(parts, hidden, attended, rest, *text)


@cache
def pieces(backend: str) -> tuple[Piece, Piece]:
    """The two functions, compiled: all blocks of all networks share them."""
    torch._dynamo.config.optimize_ddp = False  # it cuts graphs at DDP's buckets; a block is small enough
    return Piece(before_attention, backend), Piece(after_attention, backend)


def compile_blocks(backbone: FlowMapBackbone, backend: str = "inductor") -> None:
    """Compile each block in place: names of weights stay, and equal blocks share their code."""
    for block in backbone.transformer.blocks:
        block.forward = CompiledBlock(block, backend)


def take_apart(block: Any) -> Parts:
    """A block's weights as they are now: whole if they are sharded, with the adapters that speak now."""
    return Parts(
        block.scale_shift_table,
        _attention(block.attn1),
        _attention(block.attn2),
        block.norm1,
        block.norm2,
        block.norm3,
        _layer(block.ffn.net[0].proj),
        _layer(block.ffn.net[2]),
    )


def _attention(attn: Any) -> Attention:
    layers = (_layer(layer) for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]))
    return Attention(*layers, attn.norm_q, attn.norm_k, attn.heads)


def _layer(layer: Any) -> Layer:
    if isinstance(layer, nn.Linear):
        return Layer(_known(layer.weight), _known(layer.bias))
    base = layer.base_layer
    weight, bias = _known(base.weight), _known(base.bias)
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return Layer(weight, bias)
    [name] = names
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return Layer(weight, bias, _known(down), _known(up), layer.scaling[name])


def _known(weight: Tensor | None) -> Tensor | None:
    """Without gradient all weights look alike, trained or not."""
    return weight if weight is None or torch.is_grad_enabled() else weight.detach()


def _is_trained(parts: Parts) -> bool:
    layers = (*parts.video[:4], *parts.text[:4], parts.widen, parts.narrow)
    return any(part.requires_grad for layer in layers for part in layer[:4] if part is not None)


def _vary(tensor: Tensor | None, *dimensions: int) -> None:
    """Mark dimensions that differ from call to call; one of size 1 is a case of its own, for ``torch.compile`` too."""
    if tensor is not None:
        torch._dynamo.maybe_mark_dynamic(tensor, list(dimensions))


def _tell(cause: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"warning: {cause}", file=sys.stderr, flush=True)
