"""The lanes of a stream alone, on clips without pixels: each once an epoch, and on from wherever they were cut."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyflow.data.lanes import Lane, LaneOrder, LaneState, StreamedTar
from anyflow.data.tars import USUAL
from anyflow.errors import UserError


def lane_order(sizes: list[int], ranks: int = 1, workers: int = 1, buffer: int = 5, seed: int = 0) -> LaneOrder:
    tars = tuple(StreamedTar(f"{n:03d}.tar", f"{size}", USUAL, None) for n, size in enumerate(sizes))
    return LaneOrder(tars, seed, ranks, ranks, workers, buffer)


class Opened:
    """In the place of reading tars: their clips' numbers, and which tars were opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tars: list[str] = []
        opened = self.tars

        def read(self: Lane, tar: StreamedTar) -> Any:
            opened.append(tar.name)
            yield from ({"__key__": str(clip)} for clip in range(int(tar.address)))

        monkeypatch.setattr(Lane, "_read", read)


def taken(lane: Lane, clips: int) -> list[tuple[int, str, str]]:
    return [(epoch, tar.name, found["__key__"]) for epoch, tar, found in (lane.take() for _ in range(clips))]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    lanes=st.integers(1, 4),
    buffer=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_every_clip_is_seen_once_an_epoch(sizes: list[int], lanes: int, buffer: int, seed: int) -> None:
    lanes = min(lanes, len(sizes))
    order = lane_order(sizes, lanes, 1, buffer, seed)
    with pytest.MonkeyPatch.context() as patch:
        Opened(patch)
        seen: Counter[tuple[int, str, str]] = Counter()
        for number in range(lanes):
            lane = Lane(order, number, LaneState())
            while True:
                found = taken(lane, 1)[0]
                if found[0] == 3:
                    break
                seen[found] += 1
    assert seen == Counter(
        (e, f"{n:03d}.tar", str(c)) for e in range(3) for n, size in enumerate(sizes) for c in range(size)
    )


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    cuts=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    buffer=st.integers(1, 12),
)
def test_a_lane_goes_on_wherever_it_was_cut(sizes: list[int], cuts: list[int], buffer: int) -> None:
    order = lane_order(sizes, buffer=buffer)
    with pytest.MonkeyPatch.context() as patch:
        Opened(patch)
        whole = taken(Lane(order, 0, LaneState()), sum(cuts) + 30)
        state, seen = LaneState(), []
        for cut in [*cuts, 30]:
            lane = Lane(order, 0, LaneState.parse(state.text()))
            seen += taken(lane, cut)
            state = lane.state
    assert seen == whole


def test_a_lane_that_goes_on_opens_only_tars_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    order = lane_order([50] * 20, buffer=10)
    opened = Opened(monkeypatch)
    lane = Lane(order, 0, LaneState())
    taken(lane, 700)
    opened.tars.clear()
    taken(Lane(order, 0, lane.state), 1)
    assert len(opened.tars) <= 5  # those of the buffer's ten clips, of 14 that were read


def test_a_lane_shuffles_over_tars_and_each_epoch_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    Opened(monkeypatch)
    seen = taken(Lane(lane_order([30, 30, 30], buffer=40), 0, LaneState()), 180)
    first, second = [clip[1:] for clip in seen[:90]], [clip[1:] for clip in seen[90:]]
    assert first != second and set(first) == set(second)
    assert len({name for name, _ in first[:30]}) > 1


def test_tars_are_dealt_evenly_however_many_there_are() -> None:
    order = lane_order([1] * 7, ranks=2, workers=2)
    for epochs in (1, 4):
        counts = [sum(len(order.of_lane(epoch, lane)) for epoch in range(epochs)) for lane in range(4)]
        assert max(counts) - min(counts) <= 1
    dealt = [tar.name for lane in range(4) for tar in order.of_lane(3, lane)]
    assert sorted(dealt) == [f"{n:03d}.tar" for n in range(7)]


def test_fewer_tars_than_workers_are_a_sentence() -> None:
    with pytest.raises(UserError, match=r"2 ranks with 2 workers are more than 3 tars: lower data.num_workers"):
        lane_order([1, 1, 1], ranks=2, workers=2)


def test_a_tar_that_became_longer_shifts_no_other_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new clips come in the next epoch: the numbers of those in the buffer were given by the old count."""
    Opened(monkeypatch)
    before, after = lane_order([5, 5, 5], buffer=30), lane_order([9, 9, 9], buffer=30)
    whole = taken(Lane(before, 0, LaneState()), 15)
    lane = Lane(before, 0, LaneState())
    assert taken(lane, 6) == whole[:6] and lane.state.counts
    rest = taken(Lane(after, 0, lane.state), 9)
    read = [tar.name for tar in before.of_lane(0, 0)][: len(lane.state.counts)]
    assert [clip for clip in rest if clip[1] in read and int(clip[2]) > 4] == []
    assert len({*whole[:6], *rest}) == 15
