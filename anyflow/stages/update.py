"""The update under way: where a pass stands in it, its random draws and its means.

Everything random in a stage comes from :meth:`Update.generator`, a function of (seed, purpose, position) alone: the
same numbers on every rank, after every resume, for every number of workers.

Clips and draws belong to data ranks: ranks that share each clip (``backbone/context.py``) count as one of them.

An update may take several passes, each with a batch of its own. What is drawn for a sample depends on its number in the
update's whole batch, and losses are averaged over that: how it is split in passes and ranks changes nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.backbone.context import ALONE, Context
from anyflow.flowmap.schedule import logit_normal_timestep
from anyflow.system.data_ranks import data_rank


class Loss(NamedTuple):
    """What a batch gave: the mean over the update's samples, and figures to report."""

    mean: Tensor
    figures: dict[str, Tensor]


class Update:
    """One optimiser update of all ranks, in one pass or several.

    Attributes:
        seed: Of every draw.
        passes: Batches whose gradients make one update.
        context: The ranks that share this one's clips.
        position: Updates begun, from which every random draw is derived.
    """

    def __init__(self, seed: int, passes: int = 1, context: Context = ALONE) -> None:
        self.seed = seed
        self.passes = passes
        self.context = context
        self.position = 0
        self._begun = 0  # passes of this update
        self._place: tuple[int, int] | None = None  # of the batch: see begin_pass
        self._summed: dict[str, Tensor | float] = {}  # losses of the passes so far
        self._has_bad_loss: Tensor | bool = False

    def begin_pass(self, place: tuple[int, int] | None = None) -> None:
        """Go on to the next batch, and to the next update if this one has all of its passes.

        ``place`` is where the batch stands in that of the update: the clips before it, and all of them, over all ranks.
        None: all passes have as many clips.
        """
        if self.is_complete:
            self.position += 1
            self._begun = 0
            self._summed = {}
        self._begun += 1
        self._place = place

    @property
    def is_complete(self) -> bool:
        """Whether no pass waits for others: between two batches, nothing is lost by a stop."""
        return self._begun in (0, self.passes)

    def go_on_from(self, position: int) -> None:
        """Take up a checkpoint's position; the next pass begins an update."""
        self.position, self._begun = position, 0

    # Places ---------------------------------------------------------------------------------------------------------

    @property
    def data_rank(self) -> tuple[int, int]:
        """Which of the ranks that clips are dealt out to this is, and how many."""
        return data_rank(*world(), self.context.size)

    def place_of(self, batch_size: int) -> tuple[int, int]:
        """Where a batch of this many clips a data rank stands in its update's: the clips before it, and all of them."""
        size = batch_size * self.data_rank[1]
        return self._place or (max(0, self._begun - 1) * size, self.passes * size)

    def own_samples(self, batch_size: int) -> list[int]:
        """The numbers of this rank's samples in the update's batch: dealt out in turn, as the data stream does."""
        rank, ranks = self.data_rank
        first = self.place_of(batch_size)[0]
        return list(range(first + rank, first + batch_size * ranks, ranks))

    # Means ----------------------------------------------------------------------------------------------------------

    def weight_of_pass(self, batch_size: int) -> float:
        """What a batch's mean counts for, so that the mean over ranks and passes is that over the update's batch: 1 if
        all passes have as many clips.
        """
        return batch_size * self.data_rank[1] * self.passes / self.place_of(batch_size)[1]

    def mean(self, per_sample: Tensor) -> Tensor:
        """The mean of losses ``[B]``, weighed with :meth:`weight_of_pass`."""
        return per_sample.mean() * self.weight_of_pass(len(per_sample))

    def over_passes(self, name: str, value: Tensor | float) -> Tensor | float:
        """A loss's mean over the passes so far: one pass alone has other kinds of samples than the next."""
        if self.passes == 1 or not name.endswith("loss") or name == "diffusion_loss":
            return value
        own = value.detach() if isinstance(value, Tensor) else value
        self._summed[name] = own + self._summed.get(name, 0.0)
        return self._summed[name] / self._begun

    def note(self, per_sample: Tensor) -> None:
        """Remember whether this rank's own losses are finite, before ranks are mixed."""
        self._has_bad_loss = self._has_bad_loss | ~torch.isfinite(per_sample.detach()).all()

    def where_it_began(self) -> str:
        """The ranks whose own losses were not finite, in words (a collective: all ranks see the same norm)."""
        found = gather(bool(self._has_bad_loss))
        bad = [str(rank) for rank, is_bad in enumerate(found) if is_bad]
        if len(bad) in (0, len(found)) and len(found) > 1:
            return " on all ranks" if bad else ", though all losses were finite"
        return f" (it began on rank {', '.join(bad)} of {len(found)})" if len(found) > 1 else ""

    # Draws ----------------------------------------------------------------------------------------------------------

    def generator(self, purpose: str, *position: int) -> torch.Generator:
        """A CPU generator for this update's ``purpose``, equal on all ranks and in all passes."""
        text = ":".join(map(str, (self.seed, purpose, self.position, *position)))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)

    def chance(self, purpose: str) -> float:
        """One uniform number of the whole update."""
        return float(torch.rand((), generator=self.generator(purpose)))

    def draw_all(self, purpose: str, *size: int) -> Tensor:
        """Uniforms for the update's whole batch, the same on every rank and in every pass."""
        return torch.rand(size, generator=self.generator(purpose))

    def draw_own(self, purpose: str, like: Tensor) -> Tensor:
        """Uniforms ``[B]`` of this rank's samples, on the device of their latents."""
        own = self.own_samples(len(like))
        return torch.stack([torch.rand((), generator=self.generator(purpose, i)) for i in own]).to(like.device)

    def draw_noise(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal shaped as latents ``[B, ...]``, sample by sample."""
        own = self.own_samples(len(like))
        return torch.stack([torch.randn(like.shape[1:], generator=self.generator(purpose, i)) for i in own]).to(like)

    def draw_logit_normal(self, purpose: str, like: Tensor, shift: float) -> Tensor:
        """Shifted logit-normal timesteps ``[B]`` of this rank's samples, on the device of their latents."""
        own = self.own_samples(len(like))
        normals = torch.cat([torch.randn(1, generator=self.generator(purpose, i)) for i in own])
        return logit_normal_timestep(normals, shift).to(like.device)


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """Everybody's ``value``, in the order of the ranks."""
    if world()[1] == 1:
        return [value]
    values: list[Any] = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' ``values``, on every rank; those that share a clip add it each, to sum and count alike."""
    if world()[1] > 1:
        dist.all_reduce(values)
    return values
