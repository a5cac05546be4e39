"""The order: a pure function from (shards, seed, global batch) to the order in which a run sees its clips.

The order knows nothing of ranks, workers or time. The stream is one endless sequence of global batches; batch ``n``
lies in epoch ``n // batches_per_epoch``. Every epoch shuffles the shards, cuts them into windows of a few shards, and
shuffles the clips within each window: reads stay local, and only a few windows' order is ever held in memory. The clips
left over at an epoch's end are dropped, so that all batches and all ranks are equal.

Only numpy's raw bit streams are used (numpy's compatibility policy freezes them, unlike ``Generator.permutation``),
so an order is the same on every machine and version.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from anyflow.errors import UserError

ORDER_VERSION = 1
SHARDS_PER_WINDOW = 16


@dataclass(frozen=True)
class ShardIdentity:
    """What the order needs to know of a shard: who it is (name, digest of its bytes) and how many clips it holds."""

    name: str
    digest: str
    samples: int


@dataclass(frozen=True)
class OrderIdentity:
    """The inputs of an order, small enough to be stored in a checkpoint and compared field by field on resume."""

    version: int
    seed: int
    global_batch: int
    shards: int
    samples: int
    content: str
    window: int
    shares: str = ""
    buckets: str = ""
    lanes: str = ""

    @property
    def hash(self) -> str:
        """Hexadecimal digest of all inputs: two orders with the same hash give the same order."""
        inputs = asdict(self)
        for later in ("shares", "buckets", "lanes"):
            if not inputs[later]:  # as before there were any: older checkpoints still fit
                del inputs[later]
        return digest(json.dumps(inputs, sort_keys=True))


@dataclass(frozen=True)
class Order:
    """The order of a run's clips.

    Args:
        shards: the shards, in the order of the index.
        seed: the run's data seed.
        global_batch: clips in a batch over all ranks.
        window: shards shuffled together; bounds memory and keeps reads local.

    Raises:
        UserError: if there are fewer clips than a global batch needs.
    """

    shards: tuple[ShardIdentity, ...]
    seed: int
    global_batch: int
    window: int = SHARDS_PER_WINDOW
    _windows: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise UserError(f"The global batch is {self.global_batch}: give a batch size of at least 1.")
        if self.num_samples < self.global_batch:
            raise UserError(
                f"The data has {self.num_samples} clips but a global batch needs {self.global_batch}: "
                "lower batch_size, use fewer ranks, or add clips."
            )

    @cached_property
    def num_samples(self) -> int:
        """Clips in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches in an epoch; the rest of the clips is left out of that epoch."""
        return self.num_samples // self.global_batch

    @cached_property
    def identity(self) -> OrderIdentity:
        """The order's inputs, for the checkpoint."""
        content = digest("\n".join(f"{shard.name} {shard.digest} {shard.samples}" for shard in self.shards))
        return OrderIdentity(
            ORDER_VERSION, self.seed, self.global_batch, len(self.shards), self.num_samples, content, self.window
        )

    def epoch_and_batch(self, index: int) -> tuple[int, int]:
        """Split the endless batch number into (epoch, batch within the epoch)."""
        return divmod(index, self.batches_per_epoch)

    def sample_at(self, epoch: int, position: int) -> tuple[int, int]:
        """Return (shard, sample within the shard) of the ``position``-th clip of ``epoch``; positions wrap around."""
        shard_order, ends = self._epoch_layout(epoch)
        position %= self.num_samples
        number = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[number - 1]) if number else 0
        members = shard_order[number * self.window : (number + 1) * self.window]
        within = int(self._window_order(epoch, number, int(ends[number]) - begin)[position - begin])
        for shard in members:
            if within < self.shards[shard].samples:
                return int(shard), within
            within -= self.shards[shard].samples
        raise AssertionError("a window holds as many clips as its shards")

    def occurrence(self, epoch: int, position: int) -> tuple[int, int, int]:
        """Return (epoch, shard, sample within the shard) of a position: which reading of which clip it is."""
        return epoch, *self.sample_at(epoch, position)

    def batch_positions(self, index: int, rank: int = 0, world_size: int = 1) -> tuple[int, range]:
        """Return (epoch, positions within the epoch) of global batch ``index`` that fall to ``rank``.

        Positions are dealt out in turn, as the stages deal out intervals: a clip meets the same interval and noise for
        any number of ranks, and dear and cheap samples spread evenly over them.
        """
        if self.global_batch % world_size:
            raise UserError(
                f"The global batch {self.global_batch} cannot be divided among {world_size} ranks: choose a multiple."
            )
        epoch, batch = self.epoch_and_batch(index)
        first = batch * self.global_batch
        return epoch, range(first + rank, first + self.global_batch, world_size)

    def replacements(self, position: int) -> range:
        """Positions to try, in order, when the clip at ``position`` is bad.

        They start one global batch further on, so a batch rarely meets the same clip twice, and in the end reach
        every clip. They depend on the order alone: all ranks and workers agree.
        """
        return range(position + self.global_batch, position + self.global_batch + self.num_samples)

    def _epoch_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (order of the shards, clips up to the end of each window) of an epoch."""
        key = (epoch, -1)
        if key not in self._windows:
            order = _shuffled(len(self.shards), (self.seed, epoch))
            sizes = np.array([self.shards[shard].samples for shard in order], dtype=np.int64)
            ends = np.cumsum(sizes)[self.window - 1 :: self.window]
            if len(self.shards) % self.window:
                ends = np.append(ends, sizes.sum())
            self._remember(key, np.concatenate([order, ends]))
        layout = self._windows[key]
        return layout[: len(self.shards)], layout[len(self.shards) :]

    def _window_order(self, epoch: int, number: int, size: int) -> np.ndarray:
        key = (epoch, number)
        if key not in self._windows:
            self._remember(key, _shuffled(size, (self.seed, epoch, number)))
        return self._windows[key]

    def _remember(self, key: tuple[int, int], order: np.ndarray) -> None:
        """Keep the last few orders only: a batch touches two windows at most, replacements a third."""
        while len(self._windows) >= 8:
            self._windows.pop(next(iter(self._windows)))
        self._windows[key] = order


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """Seed of everything random about one clip in one epoch, the same whoever reads it: 63 bits."""
    return int(digest(f"{seed}/{epoch}/{key}")[:16], 16) >> 1


def describe_difference(saved: OrderIdentity, current: OrderIdentity) -> str:
    """Name the inputs in which two orders differ, in words for a user; empty if they do not."""
    names = {
        "version": "version of the order",
        "seed": "data seed",
        "global_batch": "global batch",
        "shards": "number of shards",
        "samples": "number of clips",
        "content": "contents of the shards",
        "window": "shuffle window",
        "shares": "shares of the cards",
        "buckets": "shapes of the batches",
        "lanes": "ranks x workers",
    }
    differences: list[str] = []
    for name, words in names.items():
        before, now = getattr(saved, name), getattr(current, name)
        if before != now:
            differences.append(words if name == "content" else f"{words} (was {before}, is {now})")
    return ", ".join(differences)


def _shuffled(size: int, entropy: tuple[int, ...]) -> np.ndarray:
    """A permutation of ``size`` from a raw bit stream: sort by random 64-bit keys."""
    return np.argsort(raw_bits(size, entropy), kind="stable").astype(np.int64)


def raw_bits(size: int, entropy: tuple[int, ...]) -> np.ndarray:
    """uint64 [size] of a raw bit stream."""
    return np.atleast_1d(np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(size))


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
