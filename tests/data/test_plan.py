"""Laws of the plan, for any data, seed, batch and number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyflow.data.order import Plan, PlannedShard, describe_difference, sample_seed
from anyflow.errors import UserError


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of up to 12 shards in windows of 1 to 5, with at least one whole batch."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    shards = tuple(PlannedShard(f"s-{number}", f"{number:x}", size) for number, size in enumerate(sizes))
    global_batch = draw(st.integers(1, sum(sizes)))
    return Plan(shards, draw(st.integers(0, 2**31)), global_batch, window=draw(st.integers(1, 5)))


FROZEN_ORDER = [(1, 3), (1, 0), (1, 1), (0, 0), (0, 2), (1, 2), (0, 1)]
FROZEN_SEED = 4247890981849124998


def order(plan: Plan, epoch: int) -> list[tuple[int, int]]:
    return [plan.sample_at(epoch, position) for position in range(plan.num_samples)]


def everything(plan: Plan) -> set[tuple[int, int]]:
    return {(number, within) for number, shard in enumerate(plan.shards) for within in range(shard.samples)}


@given(plans(), st.integers(0, 5))
def test_an_epoch_holds_every_clip_once(plan: Plan, epoch: int) -> None:
    assert Counter(order(plan, epoch)) == Counter(everything(plan))


@given(plans())
def test_batches_of_an_epoch_are_equal_and_only_the_tail_is_dropped(plan: Plan) -> None:
    seen: list[tuple[int, int]] = []
    for index in range(plan.batches_per_epoch):
        epoch, positions = plan.batch_positions(index)
        assert epoch == 0 and len(positions) == plan.global_batch
        seen += [plan.sample_at(epoch, position) for position in positions]
    assert len(seen) == len(set(seen)) > plan.num_samples - plan.global_batch
    assert plan.batch_positions(plan.batches_per_epoch) == (1, range(plan.global_batch))


@given(plans(), st.integers(0, 100), st.data())
def test_ranks_put_together_are_the_global_batch(plan: Plan, index: int, data: st.DataObject) -> None:
    divisors = [n for n in range(1, plan.global_batch + 1) if plan.global_batch % n == 0]
    world_size = data.draw(st.sampled_from(divisors))
    epoch, whole = plan.batch_positions(index)
    parts = [plan.batch_positions(index, rank, world_size) for rank in range(world_size)]
    dealt = zip(*(part for _, part in parts), strict=True)
    assert [position for turn in dealt for position in turn] == list(whole)
    assert {part_epoch for part_epoch, _ in parts} == {epoch}


@given(plans(), st.integers(0, 10**6))
def test_a_fresh_plan_finds_any_place_without_history(plan: Plan, index: int) -> None:
    """What a run reads at batch n does not depend on how it got there."""
    travelled = replace(plan)
    for earlier in range(max(0, index - 5), index):
        epoch, positions = travelled.batch_positions(earlier)
        [travelled.sample_at(epoch, position) for position in positions]
    fresh = replace(plan)
    epoch, positions = plan.batch_positions(index)
    assert [travelled.sample_at(epoch, p) for p in positions] == [fresh.sample_at(epoch, p) for p in positions]


@given(plans(), st.integers(0, 50))
def test_replacements_reach_every_clip(plan: Plan, position: int) -> None:
    assert {plan.sample_at(0, candidate) for candidate in plan.replacements(position)} == everything(plan)


def test_epochs_and_seeds_differ_and_shards_mix() -> None:
    plan = Plan(tuple(PlannedShard(f"s-{n}", "", 10) for n in range(10)), seed=1, global_batch=10)
    first, second = order(plan, 0), order(plan, 1)
    assert first != second != order(replace(plan, seed=2), 1)
    assert len({shard for shard, _ in first[:10]}) > 3, "clips of several shards meet in a batch"


def test_memory_is_bounded_by_the_window() -> None:
    """100,000 shards of 1,000 clips: a place is found without listing 100 million clips."""
    plan = Plan(tuple(PlannedShard(f"s-{n}", "", 1000) for n in range(100_000)), seed=0, global_batch=64)
    epoch, positions = plan.batch_positions(123_456)
    assert len({plan.sample_at(epoch, position) for position in positions}) == 64
    assert sum(order.nbytes for order in plan._windows.values()) < 2**21


def test_the_order_is_frozen() -> None:
    """A plan made today must be the same plan in a later release: a checkpoint only says where in it a run stood."""
    plan = Plan((PlannedShard("a", "", 3), PlannedShard("b", "", 4)), seed=7, global_batch=2)
    assert order(plan, 0) == FROZEN_ORDER
    assert sample_seed(7, 0, "clip-000") == FROZEN_SEED


def test_too_few_clips_and_indivisible_batches_are_refused() -> None:
    with pytest.raises(UserError, match=r"has 3 clips but a global batch needs 4"):
        Plan((PlannedShard("a", "", 3),), seed=0, global_batch=4)
    with pytest.raises(UserError, match=r"global batch 3 cannot be divided among 2 ranks"):
        Plan((PlannedShard("a", "", 3),), seed=0, global_batch=3).batch_positions(0, 0, 2)


def test_a_difference_is_named() -> None:
    plan = Plan((PlannedShard("a", "1", 8),), seed=0, global_batch=4)
    other = Plan((PlannedShard("a", "2", 8),), seed=5, global_batch=4)
    assert plan.identity.hash != other.identity.hash
    assert describe_difference(plan.identity, other.identity) == "data seed (was 0, is 5), contents of the shards"
    assert describe_difference(plan.identity, plan.identity) == ""


def test_seeds_of_samples_are_spread() -> None:
    seeds = np.array([sample_seed(0, epoch, f"k{key}") for epoch in range(10) for key in range(100)])
    assert len(set(seeds)) == 1000 and abs(np.mean(seeds / 2**63) - 0.5) < 0.05
