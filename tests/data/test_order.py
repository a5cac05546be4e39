"""Laws of the order, for any data, seed, batch and number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyflow.data.order import Order, ShardIdentity, describe_difference, sample_seed
from anyflow.errors import UserError


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Plans of up to 12 shards in windows of 1 to 5, with at least one whole batch."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    shards = tuple(ShardIdentity(f"s-{number}", f"{number:x}", size) for number, size in enumerate(sizes))
    global_batch = draw(st.integers(1, sum(sizes)))
    return Order(shards, draw(st.integers(0, 2**31)), global_batch, window=draw(st.integers(1, 5)))


FROZEN_ORDER = [(1, 3), (1, 0), (1, 1), (0, 0), (0, 2), (1, 2), (0, 1)]
FROZEN_SEED = 4247890981849124998


def clips_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    return [order.sample_at(epoch, position) for position in range(order.num_samples)]


def everything(order: Order) -> set[tuple[int, int]]:
    return {(number, within) for number, shard in enumerate(order.shards) for within in range(shard.samples)}


@given(orders(), st.integers(0, 5))
def test_an_epoch_holds_every_clip_once(order: Order, epoch: int) -> None:
    assert Counter(clips_of(order, epoch)) == Counter(everything(order))


@given(orders())
def test_batches_of_an_epoch_are_equal_and_only_the_tail_is_dropped(order: Order) -> None:
    seen: list[tuple[int, int]] = []
    for index in range(order.batches_per_epoch):
        epoch, positions = order.batch_positions(index)
        assert epoch == 0 and len(positions) == order.global_batch
        seen += [order.sample_at(epoch, position) for position in positions]
    assert len(seen) == len(set(seen)) > order.num_samples - order.global_batch
    assert order.batch_positions(order.batches_per_epoch) == (1, range(order.global_batch))


@given(orders(), st.integers(0, 100), st.data())
def test_ranks_put_together_are_the_global_batch(order: Order, index: int, data: st.DataObject) -> None:
    divisors = [n for n in range(1, order.global_batch + 1) if order.global_batch % n == 0]
    world_size = data.draw(st.sampled_from(divisors))
    epoch, whole = order.batch_positions(index)
    parts = [order.batch_positions(index, rank, world_size) for rank in range(world_size)]
    dealt = zip(*(part for _, part in parts), strict=True)
    assert [position for turn in dealt for position in turn] == list(whole)
    assert {part_epoch for part_epoch, _ in parts} == {epoch}


@given(orders(), st.integers(0, 10**6))
def test_a_fresh_plan_finds_any_place_without_history(order: Order, index: int) -> None:
    """What a run reads at batch n does not depend on how it got there."""
    travelled = replace(order)
    for earlier in range(max(0, index - 5), index):
        epoch, positions = travelled.batch_positions(earlier)
        [travelled.sample_at(epoch, position) for position in positions]
    fresh = replace(order)
    epoch, positions = order.batch_positions(index)
    assert [travelled.sample_at(epoch, p) for p in positions] == [fresh.sample_at(epoch, p) for p in positions]


@given(orders(), st.integers(0, 50))
def test_replacements_reach_every_clip(order: Order, position: int) -> None:
    assert {order.sample_at(0, candidate) for candidate in order.replacements(position)} == everything(order)


def test_epochs_and_seeds_differ_and_shards_mix() -> None:
    order = Order(tuple(ShardIdentity(f"s-{n}", "", 10) for n in range(10)), seed=1, global_batch=10)
    first, second = clips_of(order, 0), clips_of(order, 1)
    assert first != second != clips_of(replace(order, seed=2), 1)
    assert len({shard for shard, _ in first[:10]}) > 3, "clips of several shards meet in a batch"


def test_memory_is_bounded_by_the_window() -> None:
    """100,000 shards of 1,000 clips: a place is found without listing 100 million clips."""
    order = Order(tuple(ShardIdentity(f"s-{n}", "", 1000) for n in range(100_000)), seed=0, global_batch=64)
    epoch, positions = order.batch_positions(123_456)
    assert len({order.sample_at(epoch, position) for position in positions}) == 64
    assert sum(kept.nbytes for kept in order._windows.values()) < 2**21


def test_the_order_is_frozen() -> None:
    """An order made today must be the same order in a later release: a checkpoint only says where in it a run stood."""
    order = Order((ShardIdentity("a", "", 3), ShardIdentity("b", "", 4)), seed=7, global_batch=2)
    assert clips_of(order, 0) == FROZEN_ORDER
    assert sample_seed(7, 0, "clip-000") == FROZEN_SEED


def test_too_few_clips_and_indivisible_batches_are_refused() -> None:
    with pytest.raises(UserError, match=r"has 3 clips but a global batch needs 4"):
        Order((ShardIdentity("a", "", 3),), seed=0, global_batch=4)
    with pytest.raises(UserError, match=r"global batch 3 cannot be divided among 2 ranks"):
        Order((ShardIdentity("a", "", 3),), seed=0, global_batch=3).batch_positions(0, 0, 2)


def test_a_difference_is_named() -> None:
    order = Order((ShardIdentity("a", "1", 8),), seed=0, global_batch=4)
    other = Order((ShardIdentity("a", "2", 8),), seed=5, global_batch=4)
    assert order.identity.hash != other.identity.hash
    assert describe_difference(order.identity, other.identity) == "data seed (was 0, is 5), contents of the shards"
    assert describe_difference(order.identity, order.identity) == ""


def test_seeds_of_samples_are_spread() -> None:
    seeds = np.array([sample_seed(0, epoch, f"k{key}") for epoch in range(10) for key in range(100)])
    assert len(set(seeds)) == 1000 and abs(np.mean(seeds / 2**63) - 0.5) < 0.05
