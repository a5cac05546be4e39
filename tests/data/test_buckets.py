"""Buckets: who goes where, every batch of one shape, all ranks agreed, exact resumption, cards and latents mixed in."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_shards import card_of

from anyflow.data.buckets import BucketOrder
from anyflow.data.clip import encode_mp4
from anyflow.data.decode import ClipShape
from anyflow.data.module import VideoDataModule
from anyflow.data.order import Order, ShardIdentity
from anyflow.data.shapes import choose_shape, note_shape, tokens
from anyflow.data.shards import INDEX_NAME, load_index, write_samples
from anyflow.errors import UserError

WIDE, TALL, LONG = (5, 32, 48), (5, 48, 32), (9, 32, 48)
CLIPS = {WIDE: 12, TALL: 9, LONG: 8, (3, 32, 48): 2}
"""Shapes of the footage, and clips of each; the last are too short for all."""


def parts(shape: tuple[int, int, int], number: int) -> dict[str, bytes]:
    frames = np.full((*shape, 3), 10 * number, dtype=np.uint8)
    metadata = {"caption": f"{shape}", "fps": 8, "domain": "driving", "attributes": {}}
    return {"mp4": encode_mp4(frames, 8), "json": json.dumps(metadata).encode()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which footage of all these shapes is mixed."""
    samples = [
        (f"{'x'.join(map(str, shape))}-{n}", parts(shape, n)) for shape, count in CLIPS.items() for n in range(count)
    ]
    order = np.random.default_rng(0).permutation(len(samples))
    folder = tmp_path_factory.mktemp("mixed") / "train"
    write_samples([samples[number] for number in order], folder, "mixed", per_shard=7)
    return folder


def module(folder: Any, world_size: int = 1, rank: int = 0, **options: Any) -> VideoDataModule:
    own = {"frames": 5, "height": 32, "width": 48, "batch_size": 4 // world_size, "buckets": [TALL, LONG], "steps": 14}
    data = VideoDataModule(folder, **{**own, **options})
    if world_size > 1:
        data.trainer = type("Ranks", (), {"global_rank": rank, "world_size": world_size, "callbacks": []})()  # type: ignore[assignment]
    data.setup()
    data.trainer = None
    return data


def read(data: VideoDataModule, count: int | None = None) -> list[dict[str, Any]]:
    """Batches that were trained on."""
    batches: list[dict[str, Any]] = []
    assert data.stream is not None
    for batch in data.train_dataloader():
        if len(batches) == count:
            break
        data.stream.advance(batch)
        batches.append(batch)
    return batches


def keys(batches: list[dict[str, Any]]) -> list[list[str]]:
    return [batch["key"] for batch in batches]


def test_the_index_notes_what_is_shown(mixed: Path) -> None:
    for _, sample in load_index(mixed):
        shape = [int(side) for side in sample.key.split("-")[0].split("x")]
        assert list(sample.shape) == [*shape, 8.0]
    assert note_shape({"mp4": b"no video"}) == () == note_shape({"json": b""})


def test_a_batch_is_of_one_shape_and_a_clip_is_never_stretched_into_another(mixed: Path) -> None:
    data = module(mixed)
    for batch in read(data):
        shape = tuple(batch["frames"].shape[1:4])
        assert {key.split("-")[0] for key in batch["key"]} == {"x".join(map(str, shape))}
        assert len(batch["key"]) * tokens(ClipShape(*shape)) <= 4 * tokens(ClipShape(*WIDE))
    counts = Counter(batch["frames"].shape[1:4] for batch in read(module(mixed, steps=9)))
    assert counts == {WIDE: 3, TALL: 2, LONG: 4}, "an epoch is all whole batches of each: 12 / 4, 9 / 4, 8 / 2"


def test_an_epoch_shows_each_clip_once_and_another_one_in_another_order(mixed: Path) -> None:
    batches = keys(read(module(mixed, steps=18)))
    for epoch in (batches[:9], batches[9:]):
        seen = Counter(key for batch in epoch for key in batch)
        assert max(seen.values()) == 1 and len(seen) == 12 + 8 + 8
    assert batches[:9] != batches[9:]


def test_the_passes_of_an_update_know_their_places_whatever_their_shapes(mixed: Path) -> None:
    """Shares and averages are over the update's clips: a pass of a longer shape has fewer of them."""
    batches = read(module(mixed, steps=9, passes=3))
    for first in range(0, 9, 3):
        sizes = [len(batch["key"]) for batch in batches[first : first + 3]]
        before = [sum(sizes[:number]) for number in range(3)]
        assert [batch["place"] for batch in batches[first : first + 3]] == [[clips, sum(sizes)] for clips in before]
    assert len({batch["place"][1] for batch in batches}) > 1


def test_shares_are_told_with_what_is_left_out(mixed: Path) -> None:
    lines = module(mixed).shares
    assert [line.split()[:3] for line in lines] == [
        ["5x32x48", "12", "clips,"],
        ["5x48x32", "9", "clips,"],
        ["9x32x48", "8", "clips,"],
        ["no", "bucket", "2"],
    ]
    assert "38.7%" in lines[0] and "12 tokens each, 4 in a batch" in lines[0] and "6.5%" in lines[3]
    larger = module(mixed, token_side=32).shares
    assert "2 tokens each, 4 in a batch" in larger[0], "a network of larger tokens has fewer, and the same batches"


def test_all_ranks_agree_on_the_shape_of_a_step_and_share_its_clips(mixed: Path) -> None:
    whole = read(module(mixed))
    ranks = [read(module(mixed, world_size=2, rank=rank)) for rank in range(2)]
    for one, first, second in zip(whole, *ranks, strict=True):
        assert first["frames"].shape == second["frames"].shape
        dealt = [key for pair in zip(first["key"], second["key"], strict=True) for key in pair]
        assert dealt == one["key"]


@pytest.mark.parametrize("stop", [0, 4, 9, 11])
def test_a_run_goes_on_exactly_with_other_ranks(mixed: Path, stop: int) -> None:
    whole = keys(read(module(mixed)))
    first = module(mixed)
    before = keys(read(first, stop))
    state = json.loads(json.dumps(first.state_dict()))
    again = []
    for rank in range(2):
        second = module(mixed, world_size=2, rank=rank)
        second.load_state_dict(state)
        again.append(keys(read(second)))
    after = [[key for pair in zip(*batch, strict=True) for key in pair] for batch in zip(*again, strict=True)]
    assert before + after == whole


def test_a_checkpoints_own_sizes_of_batches_rule(mixed: Path) -> None:
    """Of 9 tall clips two ranks make a batch of 8 and one rank would make one of 9: it goes on with 8."""
    two, one = module(mixed, world_size=2, batch_size=5), module(mixed, batch_size=10)
    state = json.loads(json.dumps(two.state_dict()))
    assert "5x48x32:8" in state["plan"]["buckets"] and "5x48x32:9" in one.state_dict()["plan"]["buckets"]
    one.load_state_dict(state)
    assert {len(batch["key"]) for batch in read(one) if batch["frames"].shape[1:4] == TALL} == {8}
    with pytest.raises(UserError, match=r"The batch of 8 clips of 5x48x32 cannot be divided among 5 ranks"):
        module(mixed, world_size=5, batch_size=2).load_state_dict(state)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 2), (2, 2), (1, 4)])
def test_half_the_clips_a_pass_are_the_same_clips_in_twice_the_passes(
    mixed: Path, world_size: int, batch_size: int
) -> None:
    """Each pass is half of one of the order's batches, still of one shape; and a run may go back to whole ones."""
    split = 4 // (world_size * batch_size)
    options: dict[str, Any] = {"batch_size": batch_size, "passes": 2 * split, "steps": 14 * split}
    whole = module(mixed, passes=2, steps=14)
    before = read(whole, 4)
    state = json.loads(json.dumps(whole.state_dict()))
    expected = read(whole)
    ranks = [module(mixed, world_size, rank, **options) for rank in range(world_size)]
    for rank in ranks:
        rank.load_state_dict(state)
    parts = [read(rank) for rank in ranks]
    dealt = [
        [key for clips in zip(*keys, strict=True) for key in clips] for keys in zip(*map(keys, parts), strict=True)
    ]
    joined = [[key for part in dealt[first : first + split] for key in part] for first in range(0, len(dealt), split)]
    assert before and joined == keys(expected)
    assert [batch["place"][1] for batch in parts[0][::split]] == [batch["place"][1] for batch in expected]
    assert [batch["place"][0] for batch in parts[0][::split]] == [batch["place"][0] for batch in expected]
    again = module(mixed, passes=2, steps=14)
    again.load_state_dict(ranks[0].state_dict())
    assert again.stream is not None and again.stream.position == 14


def test_a_pass_of_several_shapes_cannot_be_made_larger_or_be_cut_unevenly(mixed: Path) -> None:
    state = module(mixed, passes=4).state_dict()
    with pytest.raises(UserError, match=r"cannot be divided among 1 ranks in passes of data.batch_size=8: go on with"):
        module(mixed, batch_size=8, passes=2).load_state_dict(state)
    with pytest.raises(UserError, match=r"The batch of 4 clips of 5x32x48 cannot be divided among 4 ranks"):
        module(mixed, world_size=4, batch_size=2, passes=2).load_state_dict(state)


def test_another_list_of_shapes_does_not_go_on(mixed: Path) -> None:
    state = module(mixed).state_dict()
    with pytest.raises(UserError, match=r"shapes of the batches \(was 5x32x48:4, 5x48x32:4, 9x32x48:2, is 5x32x48:4"):
        module(mixed, buckets=[TALL]).load_state_dict(state)


def test_bad_clips_are_replaced_by_clips_of_the_same_shape(mixed: Path, tmp_path: Path) -> None:
    samples = [(f"{shape[0]}-{shape[1]}-{n}", parts(shape, n)) for shape in (WIDE, TALL) for n in range(8)]
    samples[11] = (samples[11][0], {**samples[11][1], "json": b"{}"})
    write_samples(samples, tmp_path / "train", "t", per_shard=16)
    data = module(tmp_path / "train", buckets=[TALL], steps=4, error_budget=0.1)
    batches = read(data)
    assert [len(set(batch["key"])) for batch in batches] == [4, 4, 4, 4]
    assert all(len({key[:4] for key in batch["key"]}) == 1 for batch in batches)
    assert [skip["key"] for skip in data.state_dict()["skipped"]] == ["5-48-3"]


def test_cards_are_mixed_by_their_weights_within_the_shapes(tmp_path: Path) -> None:
    """Twice as much of b as of a, whatever they hold: 8 wide clips in a; 4 wide and 12 tall ones in b."""
    for name, shapes in (("a", [WIDE] * 8), ("b", [WIDE] * 4 + [TALL] * 12)):
        samples = [(f"{name}-{n}", parts(shape, n)) for n, shape in enumerate(shapes)]
        write_samples(samples, tmp_path / name, name)
    data = module([tmp_path / "a", tmp_path / "b"], buckets=[TALL], weights=[1, 2], steps=120)
    seen = Counter(key[0] for batch in read(data) for key in batch["key"])
    assert seen["b"] / seen["a"] == pytest.approx(2, rel=0.1)


def test_an_index_without_shapes_goes_by_its_card_and_is_refused_without_one(mixed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    samples = [(f"clip-{n}", parts(TALL, n)) for n in range(8)]
    write_samples(samples, folder, "old")
    index = json.loads((folder / INDEX_NAME).read_text())
    for sample in index["shards"][0]["samples"]:
        del sample["shape"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"data\.buckets: neither a card nor the index of .* says what shape clip"):
        module(folder, buckets=[TALL])
    card = card_of(folder, frames=5, height=48, width=32)
    assert all(batch["frames"].shape[1:4] == TALL for batch in read(module(card, buckets=[TALL])))


def test_too_little_footage_and_too_large_shapes_are_refused(mixed: Path) -> None:
    with pytest.raises(UserError, match=r"a clip of 17x64x96 has 120 tokens, more than data\.batch_size=4 clips"):
        module(mixed, buckets=[(17, 64, 96)])
    with pytest.raises(UserError, match="no shape has enough clips for a batch"):
        module(mixed, frames=101, buckets=[(97, 32, 48)])


def test_a_bucket_with_few_clips_has_a_smaller_batch(mixed: Path) -> None:
    data = module(mixed, batch_size=10)
    sizes = {batch["frames"].shape[1:4]: len(batch["key"]) for batch in read(data)}
    assert sizes == {WIDE: 10, TALL: 9, LONG: 6}


SHAPES = [ClipShape(81, 480, 832, 16.0), ClipShape(81, 832, 480, 16.0), ClipShape(49, 480, 832, 16.0)]
LARGE = ClipShape(81, 720, 1280, 16.0)


@pytest.mark.parametrize(
    ("clip", "shapes", "chosen"),
    [
        ((200, 1080, 1920, 16.0), SHAPES, 0),
        ((200, 1920, 1080, 16.0), SHAPES, 1),
        ((60, 1080, 1920, 16.0), SHAPES, 2),  # long enough for the short one alone
        ((60, 1920, 1080, 16.0), SHAPES, 2),  # rather cropped than left out
        ((150, 1080, 1920, 30.0), SHAPES, 2),  # 5 seconds at 30 are not 81 frames at 16
        ((152, 1080, 1920, 30.0), SHAPES, 0),
        ((20, 1080, 1920, 16.0), SHAPES, None),
        ((200, 1080, 1920, 16.0), [SHAPES[0], LARGE], 1),
        ((200, 480, 854, 16.0), [SHAPES[0], LARGE], 0),  # not enlarged for the sake of tokens
    ],
)
def test_the_shape_that_loses_least(clip: Any, shapes: list[ClipShape], chosen: int | None) -> None:
    assert choose_shape(clip, shapes) == chosen


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_every_bucket_gets_its_batches_once_an_epoch(sizes: list[tuple[int, int]], seed: int) -> None:
    """Whatever the buckets: an epoch is a permutation of all their batches, numbered through from epoch to epoch."""
    sizes = [(max(clips, batch), batch) for clips, batch in sizes]
    orders = tuple(
        Order((ShardIdentity(f"s{n}", "d", clips),), seed + n, batch) for n, (clips, batch) in enumerate(sizes)
    )
    order = BucketOrder(orders, tuple(map(str, range(len(orders)))), (1.0,) * len(orders), seed, 4)
    for epoch in range(2):
        located = [order.locate(epoch * order.batches_per_epoch + place) for place in range(order.batches_per_epoch)]
        expected = {
            (n, epoch * part.batches_per_epoch + k)
            for n, part in enumerate(orders)
            for k in range(part.batches_per_epoch)
        }
        assert set(located) == expected and len(located) == len(expected)


def test_latents_do_not_need_pixels_shapes() -> None:
    from safetensors.torch import save

    assert note_shape({"safetensors": save({"latents": torch.zeros(2, 16, 4, 6)})}) == (2, 16, 4, 6)
