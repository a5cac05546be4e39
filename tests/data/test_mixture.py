"""Laws of the mixture: exact shares, every data set's own epochs, the same order for any number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_shards import FRAMES, HEIGHT, WIDTH, MakeShards

from anyflow.data.mixture import BLOCK, MixedOrder, order_of
from anyflow.data.module import VideoDataModule
from anyflow.data.order import Order, ShardIdentity, describe_difference
from anyflow.errors import UserError


def part(name: str, sizes: list[int]) -> tuple[ShardIdentity, ...]:
    return tuple(ShardIdentity(f"{name}-{number}", f"{name}{number}", size) for number, size in enumerate(sizes))


@st.composite
def mixtures(draw: st.DrawFn) -> MixedOrder:
    count = draw(st.integers(1, 4))
    sizes = [draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)) for _ in range(count)]
    weights = tuple(draw(st.floats(0.01, 10)) for _ in range(count))
    parts = tuple(part(f"p{number}", of) for number, of in enumerate(sizes))
    return MixedOrder(parts, weights, draw(st.integers(0, 2**31)), draw(st.sampled_from([1, 4, 12])))


def owner(order: MixedOrder, shard: int) -> int:
    return int(np.searchsorted(order.first_shards, shard, side="right")) - 1


@given(mixtures())
def test_every_block_has_the_shares(order: MixedOrder) -> None:
    """The slots of a block differ from weight / sum x BLOCK by less than one, and so it goes on for ever."""
    shares = np.array(order.weights) / sum(order.weights) * BLOCK
    assert sum(order.slots) == BLOCK and np.abs(np.array(order.slots) - shares).max() < 1
    for block in (0, 3):
        owners, _ = order._dealt(block)
        assert np.bincount(owners, minlength=len(order.parts)).tolist() == list(order.slots)


@given(mixtures(), st.integers(0, 3 * BLOCK), st.integers(1, 100))
def test_any_stretch_has_about_the_shares(order: MixedOrder, start: int, length: int) -> None:
    """Jittered strata: a stretch of n slots has n x share of each data set, but for 2 at each of its ends and at a
    block's border."""
    seen = Counter(owner(order, order.occurrence(0, position)[1]) for position in range(start, start + length))
    borders = (start + length) // BLOCK - start // BLOCK
    for number, slots in enumerate(order.slots):
        assert abs(seen[number] - length * slots / BLOCK) <= (4 + 2 * borders) * len(order.parts)


@given(mixtures())
def test_each_data_set_has_epochs_of_its_own(order: MixedOrder) -> None:
    """Of one data set every clip comes once before any comes again, and its epoch counts those rounds."""
    rounds: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for position in range(300):
        epoch, shard, sample = order.occurrence(0, position)
        rounds.setdefault((owner(order, shard), epoch), []).append((shard, sample))
    for (number, epoch), clips in rounds.items():
        assert len(clips) == len(set(clips))
        if (number, epoch + 1) in rounds:
            assert len(clips) == order.orders[number].num_samples


@given(mixtures(), st.integers(0, 2000))
def test_ranks_share_out_the_same_batch(order: MixedOrder, index: int) -> None:
    _, whole = order.batch_positions(index)
    for world_size in (1, 2, 4):
        if order.global_batch % world_size:
            with pytest.raises(UserError, match="cannot be divided"):
                order.batch_positions(index, 0, world_size)
            continue
        dealt = [order.batch_positions(index, rank, world_size)[1] for rank in range(world_size)]
        assert sorted(position for positions in dealt for position in positions) == list(whole)
    epoch, batch = order.epoch_and_batch(index)
    assert epoch * order.batches_per_epoch + batch == index


def test_batches_follow_each_other_without_a_gap() -> None:
    order = MixedOrder((part("a", [5]), part("b", [3, 3])), (1.0, 2.0), 7, 12)
    spans = [order.batch_positions(index)[1] for index in range(5)]
    assert all(before.stop == after.start for before, after in pairwise(spans))


def test_no_place_in_a_batch_belongs_to_one_data_set() -> None:
    """Half and half in batches of two: each data set has each place about as often."""
    order = MixedOrder((part("a", [50]), part("b", [50])), (1.0, 1.0), 0, 2)
    first = [owner(order, order.occurrence(0, position)[1]) for position in range(0, 1000, 2)]
    assert 0.4 < np.mean(first) < 0.6


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, 1e-9)])
def test_senseless_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"data\.weights"):
        MixedOrder((part("a", [5]), part("b", [5])), weights, 0, 2)


def test_other_weights_are_another_plan() -> None:
    parts = [*part("a", [5]), *part("b", [5])]
    one, two = (order_of(parts, [1, 1], weights, 0, 2).identity for weights in ([1, 1], [1, 2]))
    assert one.hash != two.hash and "shares of the cards" in describe_difference(one, two)
    assert order_of(parts, [1, 1], [2, 2], 0, 2).identity.hash == one.hash
    plain = order_of(parts, [1, 1], [], 0, 2)
    assert isinstance(plain, Order) and plain.identity.hash not in (one.hash, two.hash)


def test_a_stream_of_two_cards_resumes_and_divides(make_shards: MakeShards) -> None:
    """The keys of 20 batches: with workers, on two ranks put together, and gone on from the middle."""
    cards: list[str | Path] = [make_shards(name="one"), make_shards(name="two")]

    def module(rank: int = 0, ranks: int = 1, **options: int) -> VideoDataModule:
        made = VideoDataModule(
            cards, batch_size=4, frames=FRAMES, height=HEIGHT, width=WIDTH, steps=20, weights=[3, 1], **options
        )
        made.setup()
        assert made.stream is not None
        made.stream.dataset.rank, made.stream.dataset.world_size = rank, ranks
        return made

    whole = [batch["key"] for batch in module().train_dataloader()]
    assert [batch["key"] for batch in module(num_workers=2).train_dataloader()] == whole
    halves = [[batch["key"] for batch in module(rank, 2).train_dataloader()] for rank in range(2)]
    assert [[*left, *right] for left, right in zip(*halves, strict=True)] == [[*b[::2], *b[1::2]] for b in whole]
    first, second = module(), module()
    assert first.stream is not None and second.stream is not None
    for batch in first.train_dataloader():
        first.stream.advance(batch)
        if first.stream.position == 13:
            break
    second.load_state_dict(first.state_dict())
    assert [batch["key"] for batch in second.train_dataloader()] == whole[13:]
