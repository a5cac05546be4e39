"""Context parallelism: the tokens of each clip spread over a few ranks, which exchange them for heads (Ulysses).

A rank holds ``L / size`` tokens of a clip. All but self-attention works on tokens one by one, or on the text, which is
whole everywhere. For self-attention the ranks deal out heads instead: by an all-to-all each gets all tokens of
``heads / size`` heads, and its own tokens of all heads back afterwards. So masks, runs of tokens and what a causal
network takes down stay those of whole sequences, of fewer heads.

Every rank of a group draws the same clips, noise and times, embeds all patches, and has the whole answer; so each
computes the same loss. Gradients are averaged over ALL ranks, by FSDP2 as by DDP, where a group's should be summed. So
the two ends carry the factor, and nothing else knows of it::

    whole answer = tokens of all ranks          backward: own tokens' gradient * size
    own tokens   = part of the patches          backward: gradients of all ranks put together / size

A weight between them gets ``size`` times what this rank's tokens give, whether it works on tokens or, as what embeds
times, texts and controls, on every rank alike; the mean over the group is the sum over its tokens. A weight before them
(the patches) and the latents get the whole gradient on every rank; the mean changes nothing, and a rollout's gradient
goes on to the jump before as it should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from anyflow.backbone.segments import SegmentMask
from anyflow.errors import UserError


@dataclass(frozen=True)
class Context:
    """The ranks that share each clip: neighbours, of one node.

    Attributes:
        size: how many; 1: nothing is shared.
        rank: which of them this is.
        group: torch's.
    """

    size: int = 1
    rank: int = 0
    group: Any = None

    def share(self, tokens: int) -> Share:
        """This rank's of a sequence of so many tokens."""
        return Share(tokens, self)

    def check_same(self, keys: Sequence[str]) -> None:
        """That all ranks of the group have read the same clips (a collective).

        Raises:
            UserError: they have not: a clip was replaced on one of them alone.
        """
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, list(keys), group=self.group)
        if other := next((read for read in found if read != found[0]), None):
            first, second = next(pair for pair in zip_longest(found[0], other) if pair[0] != pair[1])
            raise UserError(
                f"hardware.context={self.size}: ranks that share a clip have read {first} and {second}, so one of them "
                "could not be read everywhere: see that all ranks reach the same files, then resume"
            )


ALONE = Context()
"""A rank that holds whole clips."""


def join_context(size: int, timeout: Any = None) -> Context:
    """Meet the ranks that share clips with this one; every rank must ask for it. Alone: nobody to share with."""
    if size == 1 or not dist.is_initialized():
        return ALONE
    group, _ = dist.new_subgroups(size, timeout=timeout)
    return Context(size, dist.get_rank() % size, group)


@dataclass(frozen=True)
class Share:
    """This rank's tokens of a sequence: equally many on every rank, the last filled up with padding.

    Padding takes part in nothing: it is dropped before self-attention and from the answer, and its gradient is zero.

    Attributes:
        tokens: of the whole sequence.
        context: the ranks.
        mask: which tokens of the whole sequence see which; None: all see all.
    """

    tokens: int
    context: Context = ALONE
    mask: SegmentMask | None = None

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all tokens."""
        return self.context.size == 1

    def under(self, mask: SegmentMask | None) -> Share | SegmentMask | None:
        """What self-attention is to know: the share with a mask; the mask alone of whole sequences."""
        return mask if self.is_whole else replace(self, mask=mask)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's ``[B, n, ...]`` of all tokens ``[B, L, ...]``."""
        if self.is_whole:
            return whole
        return _mapped(whole, self._part, lambda gradient: self._joined(gradient) / self.context.size)

    def whole(self, own: Tensor) -> Tensor:
        """All tokens ``[B, L, ...]``, on every rank, of each one's ``[B, n, ...]`` (a collective)."""
        if self.is_whole:
            return own
        return _mapped(own, self._joined, lambda gradient: self._part(gradient) * self.context.size)

    def by_heads(self, own: Tensor) -> Tensor:
        """All tokens of this rank's heads ``[B, L, heads / size, d]`` of its tokens of all: ``[B, n, heads, d]``."""
        return self._exchanged(own, 2, 1)[:, : self.tokens]

    def by_tokens(self, attended: Tensor, width: int) -> Tensor:
        """Attention's result ``[B, L, heads / size * width]`` as this rank's tokens of all heads ``[B, n, dim]``."""
        heads = attended.unflatten(2, (-1, width))
        padded = F.pad(heads, (0, 0, 0, 0, 0, -self.tokens % self.context.size))
        return self._exchanged(padded, 1, 2).flatten(2)

    def _part(self, whole: Tensor) -> Tensor:
        each = -(-self.tokens // self.context.size)
        found = whole[:, each * self.context.rank :][:, :each]
        own = whole.new_zeros(len(whole), each, *whole.shape[2:])  # of its own memory: the whole may go
        own[:, : found.shape[1]] = found
        return own

    def _joined(self, own: Tensor) -> Tensor:
        parts = own.new_empty(self.context.size, *own.shape)
        dist.all_gather(list(parts), own.contiguous(), group=self.context.group)
        return parts.movedim(0, 1).flatten(1, 2)[:, : self.tokens]

    def _exchanged(self, tensor: Tensor, dealt: int, joined: int) -> Tensor:
        """Deal one dimension out to the ranks, and put another together from them (a collective)."""
        there, back = (partial(self._all_to_all, dealt=a, joined=b) for a, b in ((dealt, joined), (joined, dealt)))
        return _mapped(tensor, there, back)

    def _all_to_all(self, tensor: Tensor, dealt: int, joined: int) -> Tensor:
        sent = tensor.unflatten(dealt, (self.context.size, -1)).movedim(dealt, 0).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.context.group)
        return received.movedim(0, joined).flatten(joined, joined + 1)


Map = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A linear map with another for its gradient; torch's own collectives have no forward-mode derivative (jvp)."""

    @staticmethod
    def forward(tensor: Tensor, there: Map, back: Map) -> Tensor:
        return there(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Map, Map], output: Tensor) -> None:
        _, ctx.there, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.back(gradient), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return ctx.there(tangent)


def _mapped(tensor: Tensor, there: Map, back: Map) -> Tensor:
    result: Tensor = _Linear.apply(tensor, there, back)  # type: ignore[no-untyped-call]
    return result
