"""Attention in which runs of tokens see some runs and not others: chunk by chunk, noisy beside clean.

Three ways to compute the same: ``segments`` cuts the sequence and attends run by run, without a mask and without the
work that a mask would throw away; ``dense`` masks one whole attention; ``flex`` compiles a block mask (GPU: on the CPU
it has no backward pass).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.flowmap.chunks import ChunkLayout

AttentionKind = Literal["segments", "dense", "flex"]


@dataclass(frozen=True)
class SegmentMask:
    """Which runs of tokens attend to which.

    Attributes:
        lengths: Tokens of each run, in the order of the sequence.
        reads: For each run the runs that it attends to, ascending.
        kind: How it is computed.
    """

    lengths: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    kind: AttentionKind = "segments"

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of ``[B, heads, L, head_dim]`` under this mask."""
        return _KINDS[self.kind](self, query, key, value)

    @property
    def slices(self) -> list[slice]:
        """Where each run lies."""
        return [slice(start, end) for start, end in pairwise((0, *accumulate(self.lengths)))]

    def dense(self, device: torch.device) -> Tensor:
        """``[L, L]`` bool: whether a token (row) attends to another (column)."""
        run, table = self.tables(device)
        return table[run][:, run]

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The run of each token ``[L]``, and ``[runs, runs]`` bool, whether one attends to the other."""
        runs = torch.arange(len(self.lengths), device=device)
        table = torch.tensor([[run in seen for run in range(len(self.lengths))] for seen in self.reads], device=device)
        return runs.repeat_interleave(torch.tensor(self.lengths, device=device)), table


def segment_mask(layout: ChunkLayout, full_tokens: int, compressed_tokens: int, kind: AttentionKind) -> SegmentMask:
    """The mask of a layout: each chunk sees itself and clean earlier chunks.

    Args:
        layout: of the sequence.
        full_tokens: of a frame at full resolution.
        compressed_tokens: of a compressed frame.
        kind: how to compute it.
    """
    num_context, num_full = len(layout.compressed), len(layout.full)
    context = tuple(range(num_context))
    first_clean = num_context + num_full if layout.noisy else num_context
    reads = [context[: chunk + 1] for chunk in context]
    if layout.noisy:
        earlier = [tuple(range(first_clean, first_clean + chunk)) for chunk in range(num_full)]
        reads += [(*context, num_context + chunk, *earlier[chunk]) for chunk in range(num_full)]
    reads += [(*context, *range(first_clean, first_clean + chunk + 1)) for chunk in range(num_full)]
    full = [frames * full_tokens for frames in layout.full]
    compressed = [frames * compressed_tokens for frames in layout.compressed]
    return SegmentMask((*compressed, *full, *(full if layout.noisy else ())), tuple(reads), kind)


def _attend_segments(mask: SegmentMask, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run by run: every query sees exactly the keys that it may, so no mask is needed."""
    slices = mask.slices
    results = []
    for own, seen in zip(slices, mask.reads, strict=True):
        keys, values = (torch.cat([source[:, :, slices[run]] for run in seen], dim=2) for source in (key, value))
        results.append(F.scaled_dot_product_attention(query[:, :, own], keys, values))
    return torch.cat(results, dim=2)


def _attend_dense(mask: SegmentMask, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense(query.device))


def _attend_flex(mask: SegmentMask, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _flex_attention(query.is_cuda)(query, key, value, block_mask=_block_mask(mask, query.device))


@cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


@lru_cache(maxsize=32)
def _block_mask(mask: SegmentMask, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(False):  # a mask first made while sampling must serve training too
        run, table = mask.tables(device)
        size = len(run)
        return create_block_mask(lambda _b, _h, q, k: table[run[q], run[k]], None, None, size, size, device=str(device))


_KINDS: dict[AttentionKind, Callable[[SegmentMask, Tensor, Tensor, Tensor], Tensor]] = {
    "segments": _attend_segments,
    "dense": _attend_dense,
    "flex": _attend_flex,
}
