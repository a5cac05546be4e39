"""Streamed tars: every clip once an epoch over ranks and workers, and a run that goes on sees what is still to come."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tar_files import sample, video, write_set, write_tar
from tiny_shards import FRAMES, HEIGHT, WIDTH

from anyflow.data.batches import Batch
from anyflow.data.card import load_card
from anyflow.data.module import VideoDataModule
from anyflow.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


def card_of(folder: Path, **changes: Any) -> str:
    """A card that trains on all tars of a folder."""
    lines = {
        "name": "tars",
        "domain": "video",
        "description": "Tars.",
        "licence": "MIT",
        "splits": {"train": str(folder)},
    }
    import yaml

    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump({**lines, **changes}))
    return str(path)


def module_of(card: str, rank: int = 0, world: int = 1, workers: int = 0, **options: Any) -> VideoDataModule:
    shape: dict[str, Any] = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "batch_size": 2, "steps": 20}
    data = VideoDataModule(card, num_workers=workers, **{"streaming": True, "shuffle_buffer": 5, **shape, **options})
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, callbacks=[])  # type: ignore[assignment]
    data.setup()
    data.trainer = None
    return data


def train(data: VideoDataModule, batches: int) -> list[Batch]:
    """So many batches, trained on."""
    assert data.stream is not None
    seen = []
    for batch, _ in zip(data.train_dataloader(), range(batches), strict=False):
        data.stream.advance(batch)
        seen.append(batch)
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_see_every_clip_once_and_as_many_batches(tmp_path: Path, workers: int) -> None:
    keys = write_set(tmp_path / "set", [3, 1, 4, 2, 6])
    card = card_of(tmp_path / "set")
    ranks = [train(module_of(card, rank, 2, workers, steps=12), 12) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [12, 12]
    seen = Counter(key for batches in ranks for batch in batches for key in batch["key"])
    assert set(seen) == set(keys) and sum(seen.values()) == 48  # 3 epochs of 16
    assert max(seen.values()) <= 5
    for batches in ranks:
        for batch in batches:
            for caption, key, pixels in zip(batch["caption"], batch["key"], batch["frames"], strict=True):
                tar, clip = int(key[:3]), int(key.rpartition("clip")[2])
                assert caption == f"clip {clip} of tar {tar}"
                assert abs(float(pixels[0].float().mean()) - 10 * (tar + clip)) < 3


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 1)])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path: Path, world: int, workers: int) -> None:
    """Cut at every batch: the rest is the same, with decoded pixels."""
    write_set(tmp_path / "set", [3, 1, 4, 2, 6, 1])
    card = card_of(tmp_path / "set")
    whole = [train(module_of(card, rank, world, workers, steps=14), 14) for rank in range(world)]
    for cut in (1, 2, 5, 8, 9, 13):
        ranks = [module_of(card, rank, world, workers, steps=14) for rank in range(world)]
        for data in ranks:
            train(data, cut)
        states = [data.state_dict() for data in ranks]
        lanes = {lane: text for state in states for lane, text in state["lanes"].items()}
        for rank in range(world):
            data = module_of(card, rank, world, workers, steps=14)
            data.load_state_dict({**states[0], "lanes": lanes})
            rest = train(data, 14)
            assert [b["key"] for b in rest] == [b["key"] for b in whole[rank][cut:]]
            assert [b["position"] for b in rest] == list(range(cut, 14))
            assert all((a["frames"] == b["frames"]).all() for a, b in zip(rest, whole[rank][cut:], strict=True))


def test_a_stop_within_an_update_goes_on_where_it_began(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [5, 5])
    card = card_of(tmp_path / "set")
    whole = train(module_of(card, passes=3, steps=12), 12)
    data = module_of(card, passes=3, steps=12)
    train(data, 5)
    resumed = module_of(card, passes=3, steps=12)
    resumed.load_state_dict(data.state_dict())
    assert [b["key"] for b in train(resumed, 12)] == [b["key"] for b in whole[3:]]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("split", [(4, 1), (2, 2), (1, 4)])
def test_a_run_goes_on_with_another_split_of_its_updates(tmp_path: Path, split: tuple[int, int], world: int) -> None:
    """What one does after running out of memory, and back again: every update has the clips it would have had."""
    write_set(tmp_path / "set", [3, 1, 4, 2, 6])
    card = card_of(tmp_path / "set")

    def updates(size: int, passes: int, count: int, state: Any = None) -> tuple[list[list[str]], dict[str, Any]]:
        """Each update's clips of all ranks, and the state behind them."""
        seen, states = [], []
        for rank in range(world):
            data = module_of(card, rank, world, batch_size=size, passes=passes, steps=count * passes)
            if state:
                data.load_state_dict(state)
            keys = [key for batch in train(data, count * passes) for key in batch["key"]]
            seen.append([keys[n : n + 4] for n in range(0, len(keys), 4)])
            states.append(data.state_dict())
        lanes = {lane: text for state in states for lane, text in state["lanes"].items()}
        together = [sorted(key for part in parts for key in part) for parts in zip(*seen, strict=True)]
        return together, {**states[0], "lanes": lanes}

    whole, _ = updates(4, 1, 9)
    _, state = updates(*split, 4)
    for other in ((4, 1), (2, 2), (1, 4)):
        rest, behind = updates(*other, 9, state)
        assert rest == whole[4:] and behind["batch"] == 9


def test_a_streamed_checkpoint_of_before_goes_on(tmp_path: Path) -> None:
    """Its position was in passes, and it did not say how many clips an update has."""
    write_set(tmp_path / "set", [5, 5])
    card = card_of(tmp_path / "set")
    whole = train(module_of(card, passes=3, steps=12), 12)
    data = module_of(card, passes=3, steps=12)
    train(data, 6)
    state = data.state_dict()
    order = dataclasses.replace(data.stream.dataset.order, global_batch=2)  # type: ignore[union-attr]
    old = {**state, "batch": 6, "plan": asdict(order.identity), "plan_hash": order.identity.hash}
    resumed = module_of(card, passes=3, steps=12)
    resumed.load_state_dict(old)
    assert [b["key"] for b in train(resumed, 12)] == [b["key"] for b in whole[6:]]


def test_updates_of_other_clips_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [5, 5])
    data = module_of(card_of(tmp_path / "set"))
    with pytest.raises(UserError, match=r"set data\.global_batch=2, and data\.batch_size as you like"):
        module_of(card_of(tmp_path / "set"), batch_size=1).load_state_dict(data.state_dict())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"workers": 2}, r"ranks x workers \(was 1 x 1, is 1 x 2\) changed; set it back"),
        ({"world": 2}, "was 1 x 1, is 2 x 1"),
    ],
)
def test_other_ranks_or_workers_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    write_set(tmp_path / "set", [2, 2, 2])
    card = card_of(tmp_path / "set")
    data = module_of(card)
    train(data, 2)
    with pytest.raises(UserError, match=told):
        module_of(card, **changes).load_state_dict(data.state_dict())


def test_states_of_the_two_ways_do_not_fit_each_other(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [3, 3])
    card = card_of(tmp_path / "set")
    streamed = module_of(card)
    indexed = VideoDataModule(card, frames=FRAMES, height=HEIGHT, width=WIDTH, batch_size=2)
    indexed.setup()
    with pytest.raises(UserError, match=r"set data\.streaming=false"):
        streamed.load_state_dict(indexed.state_dict())
    with pytest.raises(UserError, match="does not fit"):
        indexed.load_state_dict(streamed.state_dict())


def test_what_cannot_be_used_is_named_and_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    good = [member for n in range(6) for member in sample(f"good{n}", n)]
    write_tar(folder / "000.tar", good)
    write_tar(
        folder / "001.tar",
        [
            *sample("a", 1),
            ("b.mp4", b"no video"),
            ("b.txt", b"b"),
            *sample("c", 2, caption=None),
            ("d.txt", b"no video at all"),
            *sample("e", 3),
            ("e.mp4", video(4)),
            *sample("a", 5),
            ("f.cls", b"3"),
        ],
    )
    data = module_of(card_of(folder), error_budget=1.0, steps=8)
    keys = {key for batch in train(data, 8) for key in batch["key"]}
    assert keys == {*(f"000/good{n}" for n in range(6)), "001/a"}
    assert data.stream is not None
    reasons = {skip.key: skip.reason for skip in data.stream.skipped.values()}
    assert "decoded" in reasons["b"] and reasons["c"] == "no caption" and "no video among" in reasons["d"]
    assert reasons["a"].startswith("its key occurs again")
    assert "is there twice, so which video has which caption" in reasons["e"] and set(reasons) == set("abcde")


@pytest.mark.parametrize("more", ["x.mp4", "x.txt", "x.cls", "x.MP4"])
def test_of_a_key_that_is_there_twice_nothing_is_taken(tmp_path: Path, more: str) -> None:
    """Two recordings under one key, or two texts of one: no video may come with the words of another."""
    first = [("x.mp4", video(1)), ("x.cls", b"1"), ("x.txt", b"of the first")]
    again = (more, video(2) if more.lower() == "x.mp4" else b"of the other")
    write_tar(tmp_path / "set/000.tar", [*sample("y"), *first, again, *sample("z")])
    data = module_of(card_of(tmp_path / "set"), error_budget=1.0)
    assert {key for batch in train(data, 4) for key in batch["key"]} == {"000/y", "000/z"}
    assert [skip.key for skip in data.stream.skipped.values()] == ["x"]  # type: ignore[union-attr]


def test_a_stand_in_caption_keeps_the_clip(tmp_path: Path) -> None:
    write_tar(tmp_path / "set/000.tar", [*sample("a", 1, caption=None), *sample("b", 2, caption=" ")])
    batch = train(module_of(card_of(tmp_path / "set", caption="A road.")), 1)[0]
    assert batch["caption"] == ["A road.", "A road."]


def test_a_damaged_tar_gives_what_it_has_and_counts_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_set(folder, [4, 4, 4])
    cut = folder / "001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    card = card_of(folder)
    data = module_of(card, error_budget=0.4, steps=8)
    seen = {key for batch in train(data, 8) for key in batch["key"]}
    assert {key for key in seen if not key.startswith("001")} == {
        f"{t}/clip{n}" for t in ("000", "002") for n in range(4)
    }
    assert 0 < len({key for key in seen if key.startswith("001")}) < 4
    assert data.stream is not None
    assert [(skip.shard, skip.key) for skip in data.stream.skipped.values()] == [("001.tar", "*")]
    with pytest.raises(UserError, match=r"1 of 3 tars cannot be read, more than error_budget 0\.1 allows: 001\.tar"):
        train(module_of(card, error_budget=0.1, steps=8), 8)


def test_a_missing_tar_is_named(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [4, 4])
    card = card_of(tmp_path / "set", splits={"train": f"{tmp_path}/set/{{000..002}}.tar"})
    data = module_of(card, error_budget=0.5)
    train(data, 8)
    assert data.stream is not None
    assert [str(skip) for skip in data.stream.skipped.values()] == [
        "002.tar:* (it cannot be read to its end (No such file or directory))"
    ]


def test_tars_without_any_clip_end_in_a_sentence(tmp_path: Path) -> None:
    write_tar(tmp_path / "set/000.tar", [("a.jpg", b"x"), ("b.cls", b"y")])
    data = module_of(card_of(tmp_path / "set"))
    with pytest.raises(UserError, match=r"no clip in 1 tars of a worker \(000\.tar\): a card's members name"):
        train(data, 1)


def test_a_tar_that_became_shorter_costs_its_clips_and_no_others(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [6, 6])
    card = card_of(tmp_path / "set")
    options: dict[str, Any] = {"error_budget": 1.0, "shuffle_buffer": 12, "steps": 6, "batch_size": 1}
    data = module_of(card, **options)
    seen = [key for batch in train(data, 3) for key in batch["key"]]
    for tar in ("000", "001"):
        write_tar(tmp_path / f"set/{tar}.tar", [m for n in range(5) for m in sample(f"clip{n}", n)])
    resumed = module_of(card, **options)
    resumed.load_state_dict(data.state_dict())
    seen += [key for batch in train(resumed, 6) for key in batch["key"]]
    assert len(set(seen)) == len(seen) == 6


def test_batches_that_were_not_trained_on_come_again(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [4, 4])
    data = module_of(card_of(tmp_path / "set"))
    first = train(data, 2)
    fetched = [next(iter(data.train_dataloader())) for _ in range(2)]
    assert fetched[0]["key"] == fetched[1]["key"] != first[1]["key"]
    assert train(data, 1)[0]["key"] == fetched[0]["key"]


def test_our_own_shards_can_be_streamed(shards: Path) -> None:
    seen = {key for batch in train(module_of(str(shards), steps=12), 12) for key in batch["key"]}
    assert len(seen) == 23 and all(key.startswith("tiny-00000") for key in seen)


def test_a_single_tar_that_is_divided_cannot_be_streamed(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "one.tar", sample("a"))
    with pytest.raises(UserError, match=r"leave data\.streaming out"):
        module_of(str(tar))
    assert set(load_card(str(tar)).splits) == {"train", "heldout"}


def test_unused_members_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "set/000.tar", [*sample("a"), ("a.cls", b"1"), ("a.depth.npz", b"1"), ("README", b"x")])
    train(module_of(card_of(tmp_path / "set"), steps=4), 4)
    assert capsys.readouterr().err == "members that are not used: .(none), .cls, .depth.npz\n"


def test_names_of_any_kind_are_those_of_the_index(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, names that WebDataset takes for its own, paths that lead out."""
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set/0.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name, data in [part for key in ("caf\xe9", "__set__/a", "../b", "/c", "d") for part in sample(key)]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    seen = []
    for streaming in (True, False):
        data = module_of(card_of(tmp_path / "set"), streaming=streaming, steps=3, batch_size=1, error_budget=1.0)
        keys = {key for batch in train(data, 3) for key in batch["key"]}
        assert data.stream is not None
        seen.append((keys, {str(skip) for skip in data.stream.skipped.values()}))
    assert seen[0] == seen[1]
    assert seen[0][0] == {"0/caf\ufffd", "0/__set__/a", "0/d"}
    assert "0.tar:../b.mp4 (its path leads out of the tar)" in seen[0][1] and len(seen[0][1]) == 4


def test_a_caption_in_utf_16_is_read_by_its_mark(tmp_path: Path) -> None:
    write_tar(tmp_path / "set/000.tar", [("a.mp4", video(1)), ("a.txt", "déjà vu".encode("utf-16"))])
    assert train(module_of(card_of(tmp_path / "set"), batch_size=1), 1)[0]["caption"] == ["déjà vu"]


def test_a_compressed_tar_is_streamed(tmp_path: Path) -> None:
    write_tar(tmp_path / "plain.tar", [*sample("a", 1), *sample("b", 2)])
    (tmp_path / "set").mkdir()
    (tmp_path / "set/0.tar.gz").write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
    batch = train(module_of(card_of(tmp_path / "set", splits={"train": f"{tmp_path}/set/0.tar.gz"})), 1)[0]
    assert sorted(batch["key"]) == ["0.tar.gz/a", "0.tar.gz/b"]


FAULT = """
from torch.utils.data import DataLoader
from anyflow.data.batches import BatchDataset
from anyflow.data.stream import ClipStream

class Broken(BatchDataset):
    world_size = rank = 1
    def __getitem__(self, index):
        raise ZeroDivisionError("a fault of ours")

batches = iter(ClipStream(Broken(), 5).loader(num_workers=2))
next(batches)
"""


def test_a_fault_in_a_worker_ends_the_process(project: Path) -> None:
    """Workers let one SIGTERM pass, which is all that they get when Python ends: it would wait for them for ever."""
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1 and "a fault of ours" in done.stderr


def test_the_budget_counts_against_all_clips_once_they_were_read(tmp_path: Path) -> None:
    """One of ten clips is bad: until the first epoch is over there may be thousands more."""
    write_tar(tmp_path / "set/0.tar", [m for n in range(5) for m in sample(f"{n}", n)])
    write_tar(
        tmp_path / "set/1.tar", [*(m for n in range(4) for m in sample(f"{n}", n)), ("x.mp4", b"x"), ("x.txt", b"x")]
    )
    data = module_of(card_of(tmp_path / "set"), error_budget=0.05, steps=20)
    with pytest.raises(UserError, match=r"1 of 10 clips cannot be used, more than error_budget 0\.05 allows: 1\.tar:x"):
        train(data, 20)
    assert data.stream is not None and 4 <= data.stream.position <= 10
