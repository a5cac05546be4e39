"""Compiled blocks: few graphs, which all blocks and roles share, and a word where something is not compiled.

``torch.compile`` makes a new graph whenever what it assumed of its arguments no longer holds. What the stages ask a
network differs in nearly everything it would assume: which adapter speaks, how many rows and tokens, how long the texts
are, which runs of tokens see which. So a block is cut in two functions, before and after its attention, which take
tensors alone:

- a layer comes as its weights and those of the adapter that speaks, found beforehand: names are never compared;
- rows, tokens and texts are marked as dimensions that vary;
- self-attention, one call of a library kernel, stays between the two functions, with its mask and its memory, and so
  does what ranks that share a clip exchange for it: no collective is ever compiled.

What is left makes a graph each: whether there is a gradient (and whether the times want one), whether an adapter
speaks, one time a clip or one a frame, one row or several. That is all, for any number of blocks and steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

from anyflow.backbone.attention import (
    Memory,
    Recorder,
    RotaryTable,
    attend,
    attend_to_video,
    narrowed,
    padding_bias,
    project,
    rotate,
)
from anyflow.backbone.conditions import Text
from anyflow.backbone.context import Share
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.segments import SegmentMask
from anyflow.errors import first_line

LIMIT = 64
"""Graphs of one function, after which the rest is not compiled: several times what any stage needs."""

_REMEDY = "results stay right and steps become slower; hardware.compile=false spares the attempt"


class Layer(NamedTuple):
    """A linear layer and the low-rank adapter that speaks on it, if one does; called as the layer is."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0

    def __call__(self, inputs: Tensor) -> Tensor:
        result = F.linear(narrowed(inputs, self), self.weight, self.bias)
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
    """Rotated queries, keys and values ``[B, L, heads, head_dim]``; ``modulation`` ``[B, 1 or L, 2, dim]``.

    ``rotary`` are tables ``[L, head_dim / 2]``.
    """
    shift, scale = (parts.table[:, :2] + modulation.float()).unbind(2)
    normed = (parts.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    query, key, value = project(parts.video, normed, normed)
    rotary = (rotary[0][None, :, None], rotary[1][None, :, None])
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

    ``fullgraph`` turns whatever ``torch.compile`` would pass over in silence (a limit reached, a break, an unsupported
    call, a dispatch mode) into an exception.
    """

    def __init__(self, function: Callable[..., Any], backend: str) -> None:
        self._function = function
        self._is_given_up = False
        self._compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    def __call__(self, *arguments: Any) -> Any:
        if self._is_given_up:
            return self._function(*arguments)
        try:
            return self._compiled(*arguments)
        except FailOnRecompileLimitHit:
            self._give_up(f"calls of the network differ in more than {torch._dynamo.config.recompile_limit} ways")
        except RuntimeError as error:
            if not isinstance(error, TorchDynamoException) and "no compiled frames" not in str(error):
                raise
            self._give_up(f"{type(error).__name__}: {first_line(error).rstrip('.')}")
        return self._function(*arguments)

    def _give_up(self, cause: str) -> None:
        self._is_given_up = True
        name = self._function.__name__
        _tell(f"{name} is not compiled from here on ({cause}): {_REMEDY}")


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
        kv_cache: Memory | Recorder | None = None,
        kv_cache_flag: Any = None,
    ) -> Tensor:
        text = encoder_hidden_states
        parts = take_apart(self.block) if _can_compile(hidden_states, text) else None
        if parts is None or isinstance(text, Tensor):
            written: Any = type(self.block).forward
            return written(  # type: ignore[no-any-return]
                self.block, hidden_states, text, temb, rotary_emb, attention_mask, kv_cache, kv_cache_flag
            )
        return self._run(parts, hidden_states, text, temb, rotary_emb, attention_mask, kv_cache)

    def _run(
        self,
        parts: Parts,
        hidden: Tensor,
        text: Text,
        modulation: Tensor,
        rotary: RotaryTable,
        mask: SegmentMask | Share | None,
        memory: Memory | Recorder | None,
    ) -> Tensor:
        before, after = pieces(self.backend)
        if torch.is_grad_enabled() and not hidden.requires_grad and _is_trained(parts):
            hidden = hidden.detach().requires_grad_()  # else the first block would be a graph of its own
        first, rest = modulation.split((2, 4), dim=2)
        rotary = (_own(rotary[0]), _own(rotary[1]))
        for tensor in (hidden, first, rest, text.embeddings):
            _vary(tensor, 0, 1)
        for table in rotary:
            _vary(table, 0)
        query, key, value = before(parts, hidden, first, rotary)
        attended = attend_to_video(query, key, value, mask, memory)
        _vary(attended, 0, 1)
        if text.lengths is not None:
            _vary(text.lengths, 0)
        result: Tensor = after(parts, hidden, attended, rest, *text)
        return result


@cache
def pieces(backend: str) -> tuple[Piece, Piece]:
    """The two functions, compiled: all blocks of all networks share them."""
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, LIMIT)
    settings.optimize_ddp = False  # it would cut graphs at DDP's buckets; a block's halves are small enough
    return Piece(before_attention, backend), Piece(after_attention, backend)


def compile_blocks(backbone: FlowMapBackbone, backend: str = "inductor") -> None:
    """Compile each block in place: names of weights stay, and all blocks share their code.

    Args:
        backbone: its adapters are on it already.
        backend: of ``torch.compile``.
    """
    _keep_code()
    for block in backbone.transformer.blocks:
        block.forward = CompiledBlock(block, backend)


def _keep_code() -> None:
    """Let compiled code lie in the user's cache; torch would put it into the folder for temporary files."""
    cache = Path.home() / ".cache" / "anyflow" / "compiled"
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def graph_count() -> int:
    """Graphs that this process has compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def take_apart(block: Any) -> Parts | None:
    """A block's weights as they are now: whole if they are sharded, with the adapters that speak now.

    Returns:
        None if a layer is of a kind that is not known here, which is told.
    """
    layers = [
        *(layer for attn in (block.attn1, block.attn2) for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])),
        block.ffn.net[0].proj,
        block.ffn.net[2],
    ]
    known = [_layer(layer) for layer in layers]
    strange = next((layer for layer, found in zip(layers, known, strict=True) if found is None), None)
    if strange is not None:
        kind = type(getattr(strange, "base_layer", strange)).__name__
        rounded = " (model.lora.base)" if kind == "QuantizedLinear" else ""
        _tell(f"blocks with layers of the kind {kind}{rounded} are not compiled: {_REMEDY}")
        return None
    video = [*known[:4], block.attn1.norm_q, block.attn1.norm_k, block.attn1.heads]
    text = [*known[4:8], block.attn2.norm_q, block.attn2.norm_k, block.attn2.heads]
    norms = (block.norm1, block.norm2, block.norm3)
    return Parts._make([block.scale_shift_table, Attention._make(video), Attention._make(text), *norms, *known[8:]])


def _can_compile(hidden: Tensor, text: Text | Tensor) -> bool:
    """Whether the call is this project's own (a pipeline's has a plain text) and takes no forward-mode derivative."""
    if forward_ad.unpack_dual(hidden).tangent is not None:
        _tell("passes that take a forward-mode derivative (stage.derivative=jvp) are not compiled; all others are")
        return False
    return not isinstance(text, Tensor)


def _layer(layer: Any) -> Layer | None:
    """A linear layer, with PEFT's plain low-rank adapter or without; None for anything else."""
    if isinstance(layer, nn.Linear):
        return Layer(_known(layer.weight), _optional(layer.bias))
    base = getattr(layer, "base_layer", None)
    if not isinstance(base, nn.Linear) or not hasattr(layer, "lora_A") or layer.merged:
        return None
    weight, bias = _known(base.weight), _optional(base.bias)
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return Layer(weight, bias)
    down, up = layer.lora_A[names[0]], layer.lora_B[names[0]]
    if len(names) > 1 or names[0] in layer.lora_variant or up.bias is not None:
        return None
    return Layer(weight, bias, _known(down.weight), _known(up.weight), layer.scaling[names[0]])


def _known(weight: Tensor) -> Tensor:
    """Without gradient all weights look alike, trained or not: one graph serves every role."""
    return weight if torch.is_grad_enabled() else weight.detach()


def _optional(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else _known(weight)


def _is_trained(parts: Parts) -> bool:
    layers = (*parts.video[:4], *parts.text[:4], parts.widen, parts.narrow)
    return any(part is not None and part.requires_grad for layer in layers for part in layer[:4])


def _own(table: Tensor) -> Tensor:
    """A table ``[L, head_dim / 2]`` that begins where its memory begins: where a slice lies would be compiled in."""
    rows = table[0, :, 0]
    return rows if rows.storage_offset() == 0 else rows.clone()


def _vary(tensor: Tensor, *dimensions: int) -> None:
    """Mark dimensions that differ from call to call; one of size 1 is a case of its own, to ``torch.compile`` too."""
    torch._dynamo.maybe_mark_dynamic(tensor, list(dimensions))


@cache
def _tell(sentence: str) -> None:
    """Say it once, on the first rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"warning: hardware.compile: {sentence}", file=sys.stderr, flush=True)
