"""Buckets: clips of several shapes in one run, and every batch of one of them.

Each bucket orders its own clips. An epoch is all buckets' whole batches, shuffled together: the bucket
of a step follows from (seed, epoch, place) alone, so all ranks agree, every rank has the same number of batches, and a
run goes on exactly. A bucket's batch has as many clips as fit into the tokens of a batch of the run's own shape: memory
is about even.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from anyflow.data.batches import Batch, BatchDataset, ClipDataset, check_clips
from anyflow.data.cache import LatentShape
from anyflow.data.controls import Control
from anyflow.data.decode import ClipShape
from anyflow.data.mixture import BLOCK, MixedOrder, order_of
from anyflow.data.order import ORDER_VERSION, Order, OrderIdentity, digest, raw_bits
from anyflow.data.reader import ShardReader, Split
from anyflow.data.shapes import choose_shape, tokens
from anyflow.errors import UserError

KEPT_EPOCHS = 2
LEAST_WEIGHT = 2 / BLOCK
"""Of a card in a bucket, beside all of them: a mixture deals no smaller shares."""


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape.

    Attributes:
        shape: what they are brought to.
        reader: their samples alone.
        clips: how many they are.
        share: of the clips that a run sees.
        global_batch: clips in a batch of theirs over all ranks; 0: they are too few for one and are never seen.
        weights: of the cards that they are from; empty to read these as one.
        latent_shape: (F, C, H, W) if the samples are latents instead of footage.
    """

    shape: ClipShape
    reader: ShardReader
    clips: int
    share: float
    global_batch: int
    weights: tuple[float, ...] = ()
    latent_shape: LatentShape | None = None

    @property
    def name(self) -> str:
        """``17x64x96``: frames, height, width."""
        return f"{self.shape.frames}x{self.shape.height}x{self.shape.width}"


def sort_clips(reader: ShardReader, splits: Sequence[Split], shapes: Sequence[ClipShape]) -> list[list[list[int]]]:
    """The clips of each shape, as their numbers in each shard; too short ones are in none.

    Raises:
        UserError: the shape of a clip is not known.
    """
    owners = [split for split, count in zip(splits, reader.counts, strict=True) for _ in range(count)]
    sorted_clips: list[list[list[int]]] = [[[] for _ in reader.shards] for _ in shapes]
    for number, ((_, shard), split) in enumerate(zip(reader.shards, owners, strict=True)):
        for place, sample in enumerate(shard.samples):
            clip = split.shape_of(sample)
            if not clip:
                raise UserError(
                    f"data.buckets: neither a card nor the index of {str(split.folder)!r} says what shape clip "
                    f"{sample.key!r} has: give it a card with frames, height, width and fps"
                )
            chosen = choose_shape(clip, shapes)
            if chosen is not None:
                sorted_clips[chosen][number].append(place)
    return sorted_clips


def sort_latents(reader: ShardReader, shapes: Sequence[tuple[float, ...]]) -> list[list[list[int]]]:
    """The samples of each shape of latents, as their numbers in each shard."""
    numbers = {shape: number for number, shape in enumerate(shapes)}
    sorted_samples: list[list[list[int]]] = [[[] for _ in reader.shards] for _ in shapes]
    for number, (_, shard) in enumerate(reader.shards):
        for place, sample in enumerate(shard.samples):
            if tuple(sample.shape) in numbers:
                sorted_samples[numbers[tuple(sample.shape)]][number].append(place)
    return sorted_samples


def make_buckets(
    reader: ShardReader,
    sorted_clips: Sequence[Sequence[Sequence[int]]],
    shapes: Sequence[ClipShape],
    batch_size: int,
    world_size: int,
    weights: Sequence[float] = (),
    latent_shapes: Sequence[LatentShape] | None = None,
) -> list[Bucket]:
    """The buckets that have clips.

    Args:
        reader: all clips. sorted_clips: those of each shape.
        shapes: the first is the run's own, whose batch of ``batch_size`` clips a rank sets the tokens of all.
        weights: of the cards; empty to read them as one.
        latent_shapes: the shapes' latents, if the samples are these.

    Raises:
        UserError: a shape has more tokens than a batch, or no clip fits any shape.
    """
    budget = batch_size * tokens(shapes[0])
    in_card = _count_by_card(reader)
    importance = np.array(weights, dtype=float) if weights else in_card
    buckets = []
    of_latents: Sequence[LatentShape | None] = latent_shapes or [None] * len(shapes)
    for shape, latent_shape, kept in zip(shapes, of_latents, sorted_clips, strict=True):
        fitting = budget // tokens(shape)
        if not fitting:
            raise UserError(
                f"data.buckets: a clip of {shape.frames}x{shape.height}x{shape.width} has {tokens(shape)} tokens, more "
                f"than data.batch_size={batch_size} clips of the run's own shape ({budget}): raise data.batch_size, or "
                "make the largest shape the run's own"
            )
        own = reader.restricted(kept)
        counts = _count_by_card(own)
        # A card's clips are seen as often here as its weight in the run and their share of it ask for.
        seen = importance * counts / np.maximum(in_card, 1)
        clips = int(counts.sum())
        whole = min(fitting * world_size, clips // world_size * world_size)
        own_weights = tuple(np.maximum(seen, LEAST_WEIGHT * seen.sum())[counts > 0].tolist()) if weights else ()
        if clips:
            share = float(seen.sum() / importance.sum())
            buckets.append(Bucket(shape, own, clips, share, whole, own_weights, latent_shape))
    if not any(bucket.global_batch for bucket in buckets):
        raise UserError(
            "data.buckets: no shape has enough clips for a batch (clips with too few frames for all shapes are left "
            "out): add a shorter shape, or footage"
        )
    return buckets


def _count_by_card(reader: ShardReader) -> np.ndarray:
    ends = np.cumsum([0, *reader.counts])
    sizes = [len(shard.samples) for _, shard in reader.shards]
    return np.array([sum(sizes[start:end]) for start, end in pairwise(ends)], dtype=float)


def bucket_order(buckets: Sequence[Bucket], seed: int, base_batch: int) -> BucketOrder:
    """The order of a run over buckets.

    Args:
        buckets: those with a batch.
        seed: the run's data seed.
        base_batch: clips of a batch of the run's own shape over all ranks.
    """
    orders = []
    for number, bucket in enumerate(buckets):
        own_seed = int(raw_bits(1, (seed, number, len(buckets)))[0] >> 1)
        counts = [count for count in bucket.reader.counts if count]
        orders.append(order_of(bucket.reader.identities(), counts, bucket.weights, own_seed, bucket.global_batch))
    names, shares = tuple(bucket.name for bucket in buckets), tuple(bucket.share for bucket in buckets)
    return BucketOrder(tuple(orders), names, shares, seed, base_batch)


@dataclass(frozen=True)
class BucketOrder:
    """The order of a run's batches over its buckets; as an :class:`Order` to the stream.

    Args:
        orders: each bucket's own. names: their shapes. shares: of the clips that are seen, for mixed cards.
        seed: the run's data seed. base_batch: clips of a batch of the run's own shape over all ranks.
    """

    orders: tuple[Order | MixedOrder, ...]
    names: tuple[str, ...]
    shares: tuple[float, ...]
    seed: int
    base_batch: int
    _dealt: dict[int, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def num_samples(self) -> int:
        """Clips in all buckets."""
        return sum(order.num_samples for order in self.orders)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Batches of each bucket in an epoch: all that its clips make, or what the cards' weights ask for."""
        if all(isinstance(order, Order) for order in self.orders):
            return tuple(order.batches_per_epoch for order in self.orders)
        clips = np.array(self.shares) / sum(self.shares) * self.num_samples
        return tuple(max(1, round(c / order.global_batch)) for c, order in zip(clips, self.orders, strict=True))

    @cached_property
    def batches_per_epoch(self) -> int:
        """Batches of all buckets in an epoch."""
        return sum(self.counts)

    @cached_property
    def global_batch(self) -> int:
        """Clips of a batch over all ranks, on average."""
        clips = sum(count * order.global_batch for count, order in zip(self.counts, self.orders, strict=True))
        return max(1, clips // self.batches_per_epoch)

    @cached_property
    def identity(self) -> OrderIdentity:
        """The order's inputs, for the checkpoint."""
        parts = [order.identity for order in self.orders]
        batches = ", ".join(f"{name}:{order.global_batch}" for name, order in zip(self.names, self.orders, strict=True))
        return OrderIdentity(
            ORDER_VERSION,
            self.seed,
            self.base_batch,
            sum(part.shards for part in parts),
            self.num_samples,
            digest("\n".join(part.content for part in parts)),
            parts[0].window,
            "; ".join(part.shares for part in parts).strip("; "),
            batches,
        )

    def epoch_and_batch(self, index: int) -> tuple[int, int]:
        """Split the endless batch number into (epoch, batch within the epoch)."""
        return divmod(index, self.batches_per_epoch)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (bucket, number of its own batch) of global batch ``index``."""
        epoch, place = self.epoch_and_batch(index)
        if epoch not in self._dealt:
            while len(self._dealt) >= KEPT_EPOCHS:
                self._dealt.pop(next(iter(self._dealt)))
            self._dealt[epoch] = self._deal(epoch)
        owners, ranks = self._dealt[epoch]
        bucket = int(owners[place])
        return bucket, epoch * self.counts[bucket] + int(ranks[place])

    def _deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose batch stands at each place of an epoch, and which of its owner's it is."""
        owners = np.repeat(np.arange(len(self.counts), dtype=np.int16), self.counts)
        keys = raw_bits(len(owners), (self.seed, epoch, len(owners), len(self.counts)))
        owners = owners[np.argsort(keys, kind="stable")]
        ranks = np.empty(len(owners), dtype=np.int32)
        for bucket in range(len(self.counts)):
            places = np.flatnonzero(owners == bucket)
            ranks[places] = np.arange(len(places))
        return owners, ranks


class BucketDataset(BatchDataset):
    """As :class:`ClipDataset`, over buckets: item ``n`` is this rank's part of global batch ``n``, all of one shape.

    Args:
        buckets: their clips; those without a batch are left out.
        seed, base_batch: of the order; see :class:`BucketOrder`.
        rank, world_size: which part of each batch.
        controls: those to give with each clip.
    """

    order: BucketOrder
    split_in: int = 1
    """Passes that one of the order's batches is divided into."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        seed: int,
        base_batch: int,
        rank: int = 0,
        world_size: int = 1,
        controls: Mapping[str, Control] | None = None,
    ) -> None:
        self.buckets, self.controls = [bucket for bucket in buckets if bucket.global_batch], controls
        self.rank, self.world_size = rank, world_size
        self._arrange(seed, base_batch)

    def _arrange(self, seed: int, base_batch: int) -> None:
        self.order = bucket_order(self.buckets, seed, base_batch)
        self.parts = [
            ClipDataset(
                bucket.reader, order, bucket.shape, self.rank, self.world_size, bucket.latent_shape, self.controls
            )
            for bucket, order in zip(self.buckets, self.order.orders, strict=True)
        ]
        for part in self.parts:
            part.batch = part.order.global_batch // self.split_in
        self.batch = base_batch // self.split_in

    def __getitem__(self, index: int) -> Batch:
        whole, part = divmod(index, self.split_in)
        bucket, number = self.order.locate(whole)
        found = self.parts[bucket][number * self.split_in + part]
        return {**found, "position": index, "place": self.place(index)}

    def clips_of(self, index: int) -> int:
        return self.parts[self.order.locate(index // self.split_in)[0]].batch

    def whole_batches(self, index: int) -> int:
        return index // self.split_in

    def pass_after(self, whole: int) -> int:
        return whole * self.split_in

    def adopt(self, saved: OrderIdentity, clips: int | None = None) -> None:
        """Take the sizes of the batches from a checkpoint: of another number of ranks, or of larger passes.

        Raises:
            UserError: these ranks and passes do not divide them.
        """
        check_clips(clips, self.batch * self.passes)
        sizes = {name: int(size) for name, size in (part.split(":") for part in saved.buckets.split(", ") if part)}
        if tuple(sizes) != self.order.names:
            return  # another order: told by whoever compares them
        split = saved.global_batch // self.batch
        for name, size in sizes.items():
            if split * self.batch != saved.global_batch or size % (split * self.world_size):
                raise UserError(
                    f"data.buckets: The batch of {size} clips of {name} cannot be divided among {self.world_size} "
                    f"ranks in passes of data.batch_size={self.batch // self.world_size}: go on with the ranks and "
                    "the data.batch_size of before, or half of one of them."
                )
        self.split_in = split
        self.buckets = [replace(b, global_batch=size) for b, size in zip(self.buckets, sizes.values(), strict=True)]
        self._arrange(self.order.seed, saved.global_batch)


def tell_buckets(buckets: Sequence[Bucket], clips: int, side: int = 16) -> list[str]:
    """The share of each bucket in words, and the clips that are in none; ``side``: pixels of a token's."""
    lines = []
    for bucket in buckets:
        batch = f"{bucket.global_batch} in a batch" if bucket.global_batch else "too few for a batch: never seen"
        tokens_told = f"{tokens(bucket.shape, side)} tokens each"
        lines.append(f"{bucket.name:<14} {bucket.clips} clips, {bucket.share:6.1%}, {tokens_told}, {batch}")
    short = clips - sum(bucket.clips for bucket in buckets)
    if short:
        lines.append(f"{'no bucket':<14} {short} clips, {short / clips:6.1%}: too short for all, left out")
    return lines
