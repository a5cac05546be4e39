"""The stream: any workers and ranks see the same batches; exact resumption; bad clips; WebDataset's view of shards."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from tiny_shards import CLIPS, FRAMES, HEIGHT, WIDTH, MakeShards, clip_parts

from anyflow.data.batches import Batch, ClipDataset
from anyflow.data.decode import ClipShape, DecodeError
from anyflow.data.order import Order
from anyflow.data.reader import ShardReader, check_length, find_split, parse_metadata
from anyflow.data.shards import load_index
from anyflow.data.skips import Skip, enforce_budget
from anyflow.data.stream import ClipStream
from anyflow.errors import UserError

SHAPE = ClipShape(FRAMES, HEIGHT, WIDTH)


def open_stream(
    folder: Path,
    steps: int = 12,
    global_batch: int = 4,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    error_budget: float = 0.01,
    passes: int = 1,
) -> ClipStream:
    reader = ShardReader([folder])
    dataset = ClipDataset(reader, Order(reader.identities(), seed, global_batch), SHAPE, rank, world_size)
    dataset.passes = passes
    return ClipStream(dataset, steps, error_budget)


def run(stream: ClipStream, batches: int | None = None, num_workers: int = 0) -> list[Batch]:
    """Train on some batches; a prefetched one that is not trained on must not count."""
    trained: list[Batch] = []
    for batch in stream.loader(num_workers):
        if len(trained) == batches:
            break
        trained.append(batch)
        stream.advance(batch)
    return trained


def keys(batches: list[Batch]) -> list[list[str]]:
    return [batch["key"] for batch in batches]


def through_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state must survive being written down."""
    return json.loads(json.dumps(state))


def test_a_batch_holds_the_clips_that_its_keys_name(shards: Path) -> None:
    batch = run(open_stream(shards), 1)[0]
    assert batch["frames"].shape == (4, FRAMES, HEIGHT, WIDTH, 3) and batch["frames"].dtype == torch.uint8
    assert set(batch) == {"frames", "caption", "key", "attributes", "position", "place", "skipped"}
    for row, (key, caption, attributes) in enumerate(
        zip(batch["key"], batch["caption"], batch["attributes"], strict=True)
    ):
        number = attributes["number"]
        assert (key, caption) == (f"clip-{number:03d}", f"clip {number}")
        levels = batch["frames"][row].float().mean((1, 2, 3))
        assert torch.allclose(levels, 10.0 * number + torch.arange(FRAMES), atol=3)


def test_any_number_of_workers_gives_the_same_batches(shards: Path) -> None:
    alone = run(open_stream(shards))
    for num_workers in (1, 2):
        helped = run(open_stream(shards), num_workers=num_workers)
        assert keys(helped) == keys(alone)
        assert all(torch.equal(a["frames"], b["frames"]) for a, b in zip(alone, helped, strict=True))


def dealt(*parts: list[str]) -> list[str]:
    """The global batch of which each rank got every n-th clip."""
    return list(chain(*zip(*parts, strict=True)))


def test_any_number_of_ranks_sees_the_same_global_batches(shards: Path) -> None:
    whole = keys(run(open_stream(shards)))
    for world_size in (2, 4):
        parts = [keys(run(open_stream(shards, rank=rank, world_size=world_size))) for rank in range(world_size)]
        assert [dealt(*batch) for batch in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("stop", [0, 3, 5, 7])  # five batches make an epoch
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_is_exact(shards: Path, stop: int, num_workers: int) -> None:
    whole = keys(run(open_stream(shards)))
    first = open_stream(shards)
    before = keys(run(first, stop, num_workers))
    state = through_json(first.state_dict())
    assert (state["epoch"], state["batch"]) == divmod(stop, 5)
    second = open_stream(shards)
    second.load_state_dict(state)
    assert before + keys(run(second)) == whole


def test_a_stop_between_passes_goes_back_to_the_first(shards: Path) -> None:
    """The gradients of an update's first passes are not saved, so their clips come again, at the same places."""
    stream = open_stream(shards, passes=3)
    trained = run(stream, 5)
    assert [batch["place"] for batch in trained] == [[0, 12], [4, 12], [8, 12], [0, 12], [4, 12]]
    resumed = open_stream(shards, passes=3)
    resumed.load_state_dict(through_json(stream.state_dict()))
    again = run(resumed, 2)
    assert keys(again) == keys(trained[3:]) and [batch["place"] for batch in again] == [[0, 12], [4, 12]]
    other = open_stream(shards, global_batch=6, passes=2)  # a run may go on with another split of its update
    other.load_state_dict(through_json(stream.state_dict()))
    of_other, of_same = run(other, 4), run(resumed, 4)
    assert [batch["place"] for batch in of_other] == [[0, 12], [6, 12]] * 2
    clips = [key for batch in [*again, *of_same] for key in batch["key"]]
    assert [key for batch in of_other for key in batch["key"]] == clips


def test_resuming_on_other_ranks_keeps_the_order(shards: Path) -> None:
    whole = keys(run(open_stream(shards)))
    first = open_stream(shards)
    before = keys(run(first, 7))
    parts = []
    for rank in range(2):
        second = open_stream(shards, rank=rank, world_size=2)
        second.load_state_dict(first.state_dict())
        parts.append(keys(run(second)))
    assert before + [dealt(*batch) for batch in zip(*parts, strict=True)] == whole


def test_the_declared_length_is_the_whole_run_wherever_it_stands(shards: Path) -> None:
    stream = open_stream(shards, steps=9)
    run(stream, 4)
    assert len(stream.loader()) == 9 and len(run(stream)) == 5 and run(stream) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, r"data seed \(was 0, is 3\)"),
        ({"global_batch": 2}, r"global batch \(was 4, is 2\)"),
    ],
)
def test_another_plan_is_refused_by_name(shards: Path, change: dict[str, int], named: str) -> None:
    state = open_stream(shards).state_dict()
    with pytest.raises(UserError, match=named):
        open_stream(shards, **change).load_state_dict(state)  # type: ignore[arg-type]


def test_other_shards_are_refused_by_name(shards: Path, make_shards: MakeShards) -> None:
    state = open_stream(shards).state_dict()
    changed = make_shards({0: clip_parts(1)}, name="changed")
    with pytest.raises(UserError, match="contents of the shards changed"):
        open_stream(changed).load_state_dict(state)


# Bad clips ------------------------------------------------------------------------------------------------------------


def bad_parts(kind: str) -> dict[str, bytes]:
    good = clip_parts(3)
    return {
        "no caption": clip_parts(3, caption=" "),
        "no mp4 member": {"json": good["json"]},
        "cannot be decoded": {**good, "mp4": good["mp4"][:300]},
        "malformed": {**good, "json": b"\xff{"},
        "attributes are malformed": clip_parts(3, attributes=[1]),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["no caption", "no mp4 member", "cannot be decoded", "malformed", "attributes are malformed"]
)
def test_a_bad_clip_is_named_replaced_and_remembered(make_shards: MakeShards, kind: str) -> None:
    folder = make_shards({3: bad_parts(kind)})
    stream = open_stream(folder, error_budget=0.1)
    batches = run(stream, num_workers=1)
    assert all(len(batch["key"]) == 4 and "clip-003" not in batch["key"] for batch in batches)
    assert keys(batches) == keys(run(open_stream(folder, error_budget=0.1)))
    state = through_json(stream.state_dict())
    assert [(entry["shard"], entry["key"]) for entry in state["skipped"]] == [("tiny-000000.tar", "clip-003")]
    assert kind in state["skipped"][0]["reason"]
    resumed = open_stream(folder, error_budget=0.1)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


def test_only_the_bad_clip_s_place_changes(shards: Path, make_shards: MakeShards) -> None:
    """The plan depends on the shards' bytes by its hash alone, so the other places keep their clips."""
    good = list(chain(*keys(run(open_stream(shards, steps=5)))))
    stream = open_stream(make_shards({3: bad_parts("no caption")}, name="bad"), steps=5, error_budget=0.1)
    bad = list(chain(*keys(run(stream))))
    assert [(a, b) for a, b in zip(good, bad, strict=True) if a != b and a != "clip-003"] == []


def test_the_budget_stops_the_run_and_names_the_first_offenders(make_shards: MakeShards) -> None:
    folder = make_shards({3: bad_parts("no caption"), 9: bad_parts("cannot be decoded")})
    for num_workers in (0, 1):
        with pytest.raises(UserError) as raised:
            run(open_stream(folder, error_budget=0.05), num_workers=num_workers)
        message = str(raised.value)
        assert message.startswith("2 of 23 clips cannot be used, more than error_budget 0.05 allows: tiny-")
        assert "clip-003 (no caption)" in message and "clip-009 (" in message and "\n" not in message


def test_clips_that_encoding_left_out_count_among_those_it_read(make_shards: MakeShards) -> None:
    """One of 24 was bad: 23 are in the cache, and a twenty-fourth is tolerated there as it was while encoding."""
    dataset = open_stream(make_shards({})).dataset
    left_out = [Skip("tiny-000000.tar", "gone", "the video cannot be decoded")]
    clips = dataset.order.num_samples
    ClipStream(dataset, 5, 1 / (clips + 1), left_out).check_budget()
    with pytest.raises(UserError, match=f"1 of {clips + 1} clips"):
        ClipStream(dataset, 5, 0.9 / (clips + 1), left_out).check_budget()


def test_the_budget_counts_a_clip_once(make_shards: MakeShards) -> None:
    stream = open_stream(make_shards({3: bad_parts("no caption")}), steps=40, error_budget=0.05)
    assert len(run(stream)) == 40 and len(stream.skipped) == 1


def test_a_large_data_set_stops_early() -> None:
    """Ten bad clips among the first thousand are 1 %, though they are nothing among ten million."""
    skips = [Skip("s.tar", f"k{number}", "no caption") for number in range(11)]
    enforce_budget(skips[:10], read=500, total=10**7, error_budget=0.01)
    with pytest.raises(UserError, match="and 6 more"):
        enforce_budget(skips, read=500, total=10**7, error_budget=0.01)


def test_a_truncated_tar_loses_only_its_tail(shards: Path) -> None:
    shard = load_index(shards).shards[1]
    cut = shard.samples[5].parts["mp4"][0] + 10
    os.truncate(shards / shard.name, cut)
    stream = open_stream(shards, error_budget=0.2)
    run(stream)
    assert {(skip.key, skip.reason) for skip in stream.skipped.values()} == {
        (sample.key, "the shard is truncated") for sample in shard.samples[5:]
    }
    with pytest.raises(UserError, match="its index says"):
        ShardReader([shards], strict=True)


def test_nothing_usable_ends_in_one_sentence(make_shards: MakeShards) -> None:
    folder = make_shards(dict.fromkeys(range(CLIPS), bad_parts("no caption")))
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=r"23 clips in a row cannot be used: .*; and 18 more; repair") as raised:
            run(open_stream(folder), num_workers=num_workers)
        assert "Traceback" not in str(raised.value)


def _train_rank(rank: int, folder: Path, rendezvous: Path, result: Path) -> None:
    """One of two ranks: train until the budget stops it, and note the record."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    stream = open_stream(folder, steps=200, rank=rank, world_size=2, error_budget=0.05)
    run(stream, 3)
    state = stream.state_dict()
    message = ""
    try:
        run(stream)
    except UserError as error:
        message = str(error)
    (result / f"{rank}.json").write_text(json.dumps({"state": state, "position": stream.position, "message": message}))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_their_record_and_stop_together(make_shards: MakeShards, tmp_path: Path) -> None:
    """A rank that stopped alone would leave the others waiting for its gradients."""
    folder = make_shards({3: bad_parts("no caption"), 9: bad_parts("cannot be decoded")})
    on_ranks(_train_rank, (folder, tmp_path / "rendezvous", tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["state"] == second["state"], "the checkpoint of any rank holds for all"
    assert first["position"] == second["position"] == 64
    assert first["message"] == second["message"] != "" and "2 of 23 clips" in first["message"]


# The reader -----------------------------------------------------------------------------------------------------------


def test_missing_and_foreign_shards_are_refused_at_once(shards: Path) -> None:
    name = load_index(shards).shards[2].name
    with (shards / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=f"{name}' has .* its index says"):
        ShardReader([shards])
    (shards / name).unlink()
    with pytest.raises(UserError, match=f"{name}' is missing"):
        ShardReader([shards])
    with pytest.raises(UserError, match=r"index\.json"):
        ShardReader([shards / "nowhere"])


def test_hashes_are_checked_on_demand(shards: Path) -> None:
    ShardReader([shards], verify=True)
    shard = load_index(shards).shards[0]
    with (shards / shard.name).open("r+b") as file:
        file.seek(shard.samples[0].parts["mp4"][0])
        file.write(b"xx")
    ShardReader([shards])
    with pytest.raises(UserError, match="sha256"):
        ShardReader([shards], verify=True)


def test_a_shard_that_is_not_its_index_s_is_noticed_at_the_sample(shards: Path) -> None:
    """Same size, other order: the tar's own header before each member tells."""
    first, second = load_index(shards).shards[:2]
    swapped = (shards / first.name).read_bytes()
    (shards / first.name).write_bytes((shards / second.name).read_bytes()[: len(swapped)].ljust(len(swapped), b"\0"))
    reader = ShardReader([shards])
    with pytest.raises(DecodeError, match="does not match its index"):
        reader.read(0, reader.sample(0, 0), "mp4")


def test_few_files_are_open_and_a_pickle_carries_none(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyflow.data.reader.OPEN_FILES", 2)
    reader = ShardReader([shards])
    data = [reader.read(shard, reader.sample(shard, 0), "json") for shard in (0, 1, 2, 3, 0)]
    assert data[0] == data[-1] and len(reader._descriptors) == 2
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._descriptors and copy.read(0, copy.sample(0, 0), "json") == data[0]


def test_a_default_caption_stands_in() -> None:
    assert parse_metadata(b'{"caption": ""}', "a road")["caption"] == "a road"
    assert parse_metadata(b'{"caption": "a car"}', "a road")["caption"] == "a car"


def test_splits_are_found_and_short_clips_refused(shards: Path) -> None:
    assert find_split(shards, "train").folder == find_split(shards.parent, "train").folder == shards
    split = find_split(shards, "train")
    check_length(split, ClipShape(81, 32, 48))  # without a card the length is seen when decoding
    known = type(split)(split.name, split.folder, split.home, frames=17, fps=8.0)
    check_length(known, ClipShape(17, 32, 48))
    check_length(known, ClipShape(9, 32, 48, fps=4))
    with pytest.raises(UserError, match=r"data.frames=17 needs 33 frames of every clip of 'train', which have 17"):
        check_length(known, ClipShape(17, 32, 48, fps=4))


def test_webdataset_reads_the_same_samples(shards: Path) -> None:
    import webdataset

    urls = [str(shards / shard.name) for shard in load_index(shards).shards]
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    reader = ShardReader([shards])
    assert len(samples) == CLIPS
    for number, (_, shard) in enumerate(reader.shards):
        for sample in shard.samples:
            for extension in ("mp4", "json"):
                assert reader.read(number, sample, extension) == samples[sample.key][extension]
