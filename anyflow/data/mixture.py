"""Several data sets in one stream, each with its share, exact and without end.

Every data set keeps its own order, and so its own epochs: each of its clips is seen once before any is seen again,
however large its share. A block of slots is dealt to the data sets by their shares, each one's slots spread evenly and
jittered, so that any batch has about the right mixture and no place in a batch belongs to one data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from anyflow.data.order import ORDER_VERSION, Order, OrderIdentity, ShardIdentity, digest, raw_bits
from anyflow.errors import UserError

BLOCK = 4096
"""Slots that are dealt at a time: a share is exact to one in so many."""
KEPT_BLOCKS = 4


@dataclass(frozen=True)
class MixedOrder:
    """The order of a run's clips from several data sets; as an :class:`Order` to whoever reads it.

    Args:
        parts: each data set's shards.
        weights: each data set's share, up to a common factor.
        seed: the run's data seed.
        global_batch: clips in a batch over all ranks.

    Raises:
        UserError: the weights do not fit the data sets, or a data set is empty.
    """

    parts: tuple[tuple[ShardIdentity, ...], ...]
    weights: tuple[float, ...]
    seed: int
    global_batch: int
    _blocks: dict[int, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.parts):
            raise UserError(
                f"data.weights has {len(self.weights)} values for {len(self.parts)} cards: give one for each card"
            )
        if self.global_batch < 1:
            raise UserError(f"The global batch is {self.global_batch}: give a batch size of at least 1.")
        if not all(np.isfinite(weight) and weight > 0 for weight in self.weights) or min(self.slots) == 0:
            raise UserError(
                f"data.weights={list(self.weights)}: give numbers above 0, none below 1/{BLOCK} of their sum"
            )

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        """Each data set's own order, clip by clip."""
        return tuple(
            Order(shards, int(raw_bits(1, (self.seed, number, BLOCK))[0] >> 1), 1)
            for number, shards in enumerate(self.parts)
        )

    @cached_property
    def first_shards(self) -> tuple[int, ...]:
        """The number of each data set's first shard, counted through."""
        return tuple(int(end) for end in np.cumsum([0, *(len(shards) for shards in self.parts)]))

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Each data set's slots of a block, by the largest remainders."""
        shares = np.array(self.weights, dtype=np.float64) / sum(self.weights) * BLOCK
        counts = np.floor(shares).astype(np.int64)
        most = np.argsort(counts - shares, kind="stable")[: BLOCK - int(counts.sum())]
        counts[most] += 1
        return tuple(int(count) for count in counts)

    @cached_property
    def num_samples(self) -> int:
        """Clips in all data sets."""
        return sum(order.num_samples for order in self.orders)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that have as many clips as there are: a unit of counting, for each data set has its own epochs."""
        return max(1, self.num_samples // self.global_batch)

    @cached_property
    def identity(self) -> OrderIdentity:
        """The order's inputs, for the checkpoint."""
        content = digest("\n".join(order.identity.content for order in self.orders))
        shares = ", ".join(f"{count}/{BLOCK}" for count in self.slots)
        shards = sum(len(part) for part in self.parts)
        return OrderIdentity(
            ORDER_VERSION,
            self.seed,
            self.global_batch,
            shards,
            self.num_samples,
            content,
            self.orders[0].window,
            shares,
        )

    def epoch_and_batch(self, index: int) -> tuple[int, int]:
        """Split the endless batch number; see :attr:`batches_per_epoch`."""
        return divmod(index, self.batches_per_epoch)

    def batch_positions(self, index: int, rank: int = 0, world_size: int = 1) -> tuple[int, range]:
        """Return (0, positions in the endless order) of global batch ``index`` that fall to ``rank``."""
        if self.global_batch % world_size:
            raise UserError(
                f"The global batch {self.global_batch} cannot be divided among {world_size} ranks: choose a multiple."
            )
        first = index * self.global_batch
        return 0, range(first + rank, first + self.global_batch, world_size)

    def replacements(self, position: int) -> range:
        """Positions to try, in order, when the clip at ``position`` is bad; of any data set."""
        return range(position + self.global_batch, position + self.global_batch + self.num_samples)

    def occurrence(self, epoch: int, position: int) -> tuple[int, int, int]:
        """Return (epoch of its data set, shard, sample within the shard) of a position; shards count through."""
        block, slot = divmod(position, BLOCK)
        owners, ranks = self._dealt(block)
        part = int(owners[slot])
        own = block * self.slots[part] + int(ranks[slot])
        order = self.orders[part]
        local_epoch, place = divmod(own, order.num_samples)
        shard, sample = order.sample_at(local_epoch, place)
        return local_epoch, self.first_shards[part] + shard, sample

    def sample_at(self, epoch: int, position: int) -> tuple[int, int]:
        """Return (shard, sample within the shard) of a position."""
        _, shard, sample = self.occurrence(epoch, position)
        return shard, sample

    def _dealt(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Who has each slot of a block, and which of its owner's slots it is."""
        if block not in self._blocks:
            times = [
                (np.arange(count) + raw_bits(count, (self.seed, block, number)) / 2.0**64) / count
                for number, count in enumerate(self.slots)
            ]
            order = np.argsort(np.concatenate(times), kind="stable")
            owners = np.repeat(np.arange(len(self.slots)), self.slots)[order]
            ranks = np.concatenate([np.arange(count) for count in self.slots])[order]
            while len(self._blocks) >= KEPT_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = owners, ranks
        return self._blocks[block]


def order_of(
    shards: Sequence[ShardIdentity], counts: Sequence[int], weights: Sequence[float], seed: int, global_batch: int
) -> Order | MixedOrder:
    """The order of one or several data sets: shuffled together as one, or mixed by weights if there are any.

    Args:
        shards: of all data sets, one after the other. counts: how many belong to each.
        weights: each data set's share; empty to read them as one.

    Raises:
        UserError: the weights do not fit, or there are too few clips.
    """
    if not weights:
        return Order(tuple(shards), seed, global_batch)
    ends = np.cumsum([0, *counts])
    parts = tuple(tuple(shards[start:end]) for start, end in pairwise(ends))
    return MixedOrder(parts, tuple(float(weight) for weight in weights), seed, global_batch)
