"""Attention processors for diffusers' AnyFlow blocks: rotary positions in real arithmetic, and folded text padding.

They replace the stock processors without touching weights. Given the stock arguments (a dictionary of complex
frequencies, a plain tensor of text) they do what the stock ones do, so the wrapped transformer still serves a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_anyflow import apply_rotary_emb as apply_stock_rotary
from torch import Tensor

from anyflow.backbone.conditions import Text
from anyflow.backbone.context import Share
from anyflow.backbone.segments import SegmentMask

RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines, each ``[1, L, 1, head_dim / 2]`` float32, L = tokens of the video."""


class Memory(NamedTuple):
    """Rotated keys and values ``[B, L, heads, head_dim]`` of tokens before those at hand, for one block.

    Ranks that share clips hold all tokens of some heads each. It never changes, so a block that is run again (gradient
    checkpointing) finds what it found at first.
    """

    key: Tensor
    value: Tensor

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What to attend to: the tokens before, then those at hand."""
        return torch.cat([self.key, key], dim=1), torch.cat([self.value, value], dim=1)


class Recorder:
    """Takes down a block's keys and values for later passes to find."""

    memory: Memory

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What to attend to: the tokens at hand alone."""
        self.memory = Memory(key, value)
        return key, value


def install_processors(transformer: Any, self_attention: type[SelfAttentionProcessor]) -> None:
    """Put this kind of self-attention, and this module's attention to text, on every block.

    Whatever precision the stream between blocks has, layers get their own.
    """
    for block in transformer.blocks:
        block.attn1.set_processor(self_attention())
        block.attn2.set_processor(TextAttentionProcessor())
        block.ffn.register_forward_pre_hook(_narrow_inputs)


def narrowed(inputs: Tensor, layer: Any) -> Tensor:
    """Inputs that are no wider than the weight of the layer they meet, as float32 ones of a layer in bfloat16."""
    weight = getattr(layer, "weight", inputs)
    is_wider = weight.is_floating_point() and inputs.dtype.itemsize > weight.dtype.itemsize
    return inputs.to(weight.dtype) if is_wider else inputs


def _narrow_inputs(feed_forward: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return narrowed(inputs[0], feed_forward.net[0].proj), *inputs[1:]


def rotary_table(rope: Any, device: torch.device, **layout: Any) -> RotaryTable:
    """Angles of a grid of tokens, as the stock frequencies (``rope`` called with ``layout``) in float32."""
    with torch.inference_mode(False), torch.no_grad():  # a table first built while sampling must serve training too
        frequencies = rope(device=torch.device("cpu"), **layout)["query"]  # [1, 1, L, head_dim / 2] complex
        frequencies = frequencies.transpose(1, 2)
        return frequencies.real.float().to(device), frequencies.imag.float().to(device)


def rotate(heads: Tensor, table: RotaryTable) -> Tensor:
    """Rotate neighbouring channel pairs of ``[B, L, heads, head_dim]`` in float32; the result is float32."""
    cosine, sine = table
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


def padding_bias(text: Text, dtype: torch.dtype) -> Tensor | None:
    """Additive attention bias ``[B, 1, 1, S]`` which makes two padding tokens count for all of them, exactly.

    A token with bias ``log(n)`` weighs as much as n copies of it. ``log(n)`` rounded to bfloat16 would be off by up to
    1.5 %, so the padding token at ``length`` gets a value rounded down, and the spare last token what then lacks.
    """
    if text.lengths is None:
        return None
    tokens = text.embeddings.shape[1]
    position = torch.arange(tokens, device=text.embeddings.device)
    lengths = text.lengths.to(text.embeddings.device)[:, None]
    padding = (text.padded_length - lengths).float()  # log(0) = -inf: a prompt without padding ignores both tokens
    rounded_down = (padding.log() * (1 - torch.finfo(dtype).eps)).to(dtype).float()
    lacking = (padding - rounded_down.exp()).clamp(min=0).log()
    bias = torch.where(position < lengths, 0.0, -torch.inf)
    bias = torch.where(position == tokens - 1, lacking, bias)
    bias = torch.where(position == lengths, rounded_down, bias)
    return bias.to(dtype)[:, None, None, :]


def with_spare_token(text: Text) -> Text:
    """Append the zero token that :func:`padding_bias` gives the remainder to."""
    if text.lengths is None:
        return text
    return text._replace(embeddings=F.pad(text.embeddings, (0, 0, 0, 1)))


class SelfAttentionProcessor:
    """Attention of video tokens to video tokens, with rotary positions.

    Blocks hand over their fifth and sixth argument as ``attention_mask`` and ``kv_cache``: None for all tokens to all,
    else a mask, or a :class:`~anyflow.backbone.context.Share` where ranks share the sequence; and a :class:`Memory` of
    other tokens or a :class:`Recorder` of these.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | SegmentMask | Share | None = None,
        rotary_emb: RotaryTable | dict[str, Tensor] | None = None,
        kv_cache: Memory | Recorder | None = None,
        kv_cache_flag: None = None,
    ) -> Tensor:
        query, key, value = project(attn, hidden_states, hidden_states)
        if isinstance(rotary_emb, dict):
            query = apply_stock_rotary(query.transpose(1, 2), rotary_emb["query"]).transpose(1, 2)
            key = apply_stock_rotary(key.transpose(1, 2), rotary_emb["key"]).transpose(1, 2)
        elif rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        return _put_out(attn, attend_to_video(query, key, value, attention_mask, kv_cache))


class TextAttentionProcessor:
    """Attention of all video tokens to the prompt."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Text | Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if isinstance(encoder_hidden_states, Tensor):
            query, key, value = project(attn, hidden_states, encoder_hidden_states)
            return _put_out(attn, attend_and_keep(query, key, value, attention_mask))
        text = encoder_hidden_states
        query, key, value = project(attn, hidden_states, text.embeddings)
        return _put_out(attn, attend_and_keep(query, key, value, padding_bias(text, value.dtype)))


def project(attn: Any, hidden_states: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each ``[B, L, heads, head_dim]``."""
    hidden_states, source = narrowed(hidden_states, attn.to_q), narrowed(source, attn.to_k)
    query = attn.norm_q(attn.to_q(hidden_states))
    key = attn.norm_k(attn.to_k(source))
    value = attn.to_v(source)
    return tuple(part.unflatten(2, (attn.heads, -1)) for part in (query, key, value))  # type: ignore[return-value]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | SegmentMask | None) -> Tensor:
    """Attention ``[B, L, dim]`` of ``[B, L, heads, head_dim]`` each, in the precision of the values."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if isinstance(bias, SegmentMask):
        attended = bias.attend(query, key, value)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attended.transpose(1, 2).flatten(2, 3)


class KeptAttention:
    """A context in which each attention runs under a context of its own, in the order of the calls.

    Selective checkpointing looks at operators through a mode. Under it ``torch.compile`` would do nothing for the rest
    of a block, or be looked into; and every operator of the block would pass through Python.
    """

    def __init__(self, contexts: Sequence[AbstractContextManager[Any]]) -> None:
        self._contexts = contexts
        self._tokens: list[Token[Iterator[AbstractContextManager[Any]] | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_KEEPERS.set(iter(self._contexts)))

    def __exit__(self, *_: object) -> None:
        _KEEPERS.reset(self._tokens.pop())


_KEEPERS: ContextVar[Iterator[AbstractContextManager[Any]] | None] = ContextVar("keepers", default=None)


def attend_and_keep(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | SegmentMask | None) -> Tensor:
    """:func:`attend`, under what :class:`KeptAttention` has for it."""
    with next(_KEEPERS.get() or iter(()), nullcontext()):
        return attend(query, key, value, bias)


def attend_to_video(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | SegmentMask | Share | None,
    memory: Memory | Recorder | None,
) -> Tensor:
    """Self-attention ``[B, L, dim]`` of this rank's tokens ``[B, L, heads, head_dim]`` to all, and to a memory's."""
    share, width = mask if isinstance(mask, Share) else None, value.shape[3]
    query, key = query.to(value.dtype), key.to(value.dtype)
    if share is not None:
        query, key, value = (share.by_heads(part) for part in (query, key, value))
    if memory is not None:
        key, value = memory.extend(key, value)
    attended = attend_and_keep(query, key, value, mask if share is None else share.mask)  # type: ignore[arg-type]
    return attended if share is None else share.by_tokens(attended, width)


def _put_out(attn: Any, attended: Tensor) -> Tensor:
    result: Tensor = attn.to_out[1](attn.to_out[0](attended))
    return result
