"""Shards on a web server and in a bucket: fetched once, verified, resumed after faults, within the cache's bound."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_shards import FRAMES, HEIGHT, WIDTH, MakeShards
from web import Web, serve

from anyflow.data import remote
from anyflow.data.batches import ClipDataset
from anyflow.data.card import load_card
from anyflow.data.check import check_card
from anyflow.data.decode import ClipShape, DecodeError
from anyflow.data.order import Order
from anyflow.data.reader import ShardReader, find_split
from anyflow.data.shards import load_index
from anyflow.data.stream import ClipStream
from anyflow.errors import UserError

CARD = {
    "name": "tiny",
    "domain": "driving",
    "description": "Tiny.",
    "splits": {"train": "train"},
    "frames": FRAMES,
    "height": HEIGHT,
    "width": WIDTH,
    "fps": 8.0,
    "licence": "MIT",
}


@pytest.fixture(autouse=True)
def quick(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides, no long wait for an answer, and blocks smaller than a shard."""
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    monkeypatch.setattr(remote, "BLOCK", 8192)
    monkeypatch.setattr(remote, "_fresh", set())


@pytest.fixture
def web(make_shards: MakeShards) -> Iterator[Web]:
    """A data set of four shards and its card, served."""
    folder = make_shards().parent
    (folder / "card.yaml").write_text(yaml.safe_dump(CARD))
    with serve(folder) as server:
        yield server


def reader_of(url: str) -> ShardReader:
    return ShardReader([find_split(url, "train").folder])


def read_all(reader: ShardReader) -> dict[str, bytes]:
    return {
        sample.key: reader.read(number, sample, "mp4")
        for number, (_, shard) in enumerate(reader.shards)
        for sample in shard.samples
    }


def local(web: Web) -> dict[str, bytes]:
    return read_all(ShardReader([web.folder / "train"]))


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/*.tar"))


def test_two_processes_of_one_number_fetch_one_file(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two containers or machines that share the cache: the second one is done before the first gives its name."""
    replace = Path.replace

    def meanwhile(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(remote, "_fresh", set())
        assert remote.fetch_small(remote.mirror(f"{web.url}/train"), "index.json").is_file()
        return replace(path, target)

    for first in (lambda folder: folder, lambda folder: remote.fetch_small(folder, "index.json")):
        monkeypatch.setattr(Path, "replace", meanwhile)
        first(remote.mirror(f"{web.url}/train"))
    assert load_index(remote.mirror(f"{web.url}/train")).count > 0
    assert not list(remote.cache_root().rglob("*.part*"))


def test_a_data_set_on_a_web_server_reads_as_one_on_disk(web: Web) -> None:
    for address in (web.url, f"{web.url}/card.yaml"):
        assert load_card(address).name == "tiny"
        assert read_all(reader_of(address)) == local(web)
    fetched = [name for name, _ in web.asked if name.endswith(".tar")]
    assert {name for name, _ in web.asked} == {"/card.yaml", "/train/index.json", *fetched}
    asked = [(name, span) for name, span in web.asked if name.endswith(".tar")]
    assert len(asked) == len(set(asked))  # every range once: the second reader found all in the cache
    assert check_card(web.url) == []


def test_a_card_here_may_name_shards_elsewhere(web: Web, tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({**CARD, "splits": {"train": f"{web.url}/train"}}))
    assert read_all(reader_of(str(tmp_path / "card.yaml"))) == local(web)


@pytest.mark.parametrize("fault", ["error", "truncated", "stalled", "whole", "changed"])
def test_faults_pass(fault: str, web: Web) -> None:
    """Two of each in a row, on the index and on a shard: the same bytes arrive. (An index has no hash of its own.)"""
    web.faults["tiny-000001.tar"] = [fault] if fault == "changed" else [fault, fault]
    if fault != "changed":
        web.faults["index.json"] = [fault, fault]
    assert read_all(reader_of(web.url)) == local(web)
    assert not web.faults["tiny-000001.tar"]


def test_a_broken_transfer_goes_on_where_it_stopped(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.faults["tiny-000000.tar"] = []
    reader = reader_of(web.url)
    monkeypatch.setattr(remote, "TRIES", 2)
    first = reader.shards[0][1]
    blocks = -(-first.bytes // remote.BLOCK)
    web.faults[first.name] = ["ok"] * (blocks - 1) + ["error", "error"]
    with pytest.raises(UserError, match=r"it did not come in 2 tries \(.*503.*start again"):
        reader.read(0, first.samples[0], "mp4")
    before = len(web.asked)
    assert reader.read(0, first.samples[0], "mp4") == local(web)[first.samples[0].key]
    assert len(web.asked) == before + 1  # the last block alone


def test_changed_bytes_are_bad_clips(web: Web) -> None:
    """A shard that differs from its index costs its clips, each named, and is not fetched for each of them again."""
    path = web.folder / "train/tiny-000002.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    reader = reader_of(web.url)
    for sample in reader.shards[2][1].samples:
        with pytest.raises(DecodeError, match="differ from the sha256"):
            reader.read(2, sample, "mp4")
    blocks = -(-reader.shards[2][1].bytes // remote.BLOCK)
    assert sum(name.endswith("tiny-000002.tar") for name, _ in web.asked) == 2 * blocks
    dataset = ClipDataset(reader, Order(reader.identities(), 0, 4), ClipShape(FRAMES, HEIGHT, WIDTH))
    stream = ClipStream(dataset, 5, error_budget=0.5)
    for batch in stream.loader():
        stream.advance(batch)
    assert {skip.shard for skip in stream.skipped.values()} == {"tiny-000002.tar"}
    assert any("tiny-000002.tar" in problem and "sha256" in problem for problem in check_card(web.url, decode=False))


def test_a_missing_shard_is_bad_clips_and_a_missing_card_a_sentence(web: Web) -> None:
    (web.folder / "train/tiny-000003.tar").unlink()
    reader = reader_of(web.url)
    with pytest.raises(DecodeError, match="cannot be read"):
        reader.read(3, reader.sample(3, 0), "mp4")
    with pytest.raises(UserError, match=r"there is no .*/nowhere/card\.yaml"):
        load_card(f"{web.url}/nowhere")


def test_what_is_forbidden_is_not_tried_again(web: Web) -> None:
    web.faults["card.yaml"] = ["refused"] * 5
    with pytest.raises(UserError, match=r"it is forbidden.*credentials in the environment"):
        load_card(web.url)
    assert len(web.asked) == 1


def test_the_cache_keeps_to_its_bound(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two shards: all four are read, by every order, and never more than two lie there."""
    sizes = sorted(shard.bytes for shard in load_index(web.folder / "train").shards)
    monkeypatch.setenv(remote.LIMIT_VARIABLE, repr((sizes[-1] + sizes[-2]) / 1e9))
    reader = reader_of(web.url)
    monkeypatch.setattr("anyflow.data.reader.OPEN_FILES", 1)
    expected = local(web)
    for number in (0, 1, 2, 3, 2, 0):
        sample = reader.sample(number, 0)
        assert reader.read(number, sample, "mp4") == expected[sample.key]
        assert sum(path.stat().st_size for path in cached(tmp_path)) <= sizes[-1] + sizes[-2]
        assert f"tiny-{number:06d}.tar" in {path.name for path in cached(tmp_path)}


def test_shards_larger_than_the_cache_are_read_by_ranges(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(remote.LIMIT_VARIABLE, "0")
    assert read_all(reader_of(web.url)) == local(web)
    assert cached(tmp_path) == []
    assert all(span for name, span in web.asked if name.endswith(".tar"))


def _read_in_a_process(url: str, cache: str, results: Any) -> None:
    results.put(read_all(reader_of(url)))


def test_several_processes_fetch_a_shard_once(web: Web, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read_in_a_process, args=(web.url, "", results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [local(web)] * 3
    for process in processes:
        process.join()
    asked = [(name, span) for name, span in web.asked if name.endswith(".tar")]
    assert len(asked) == len(set(asked))


def test_workers_stream_from_a_web_server(web: Web) -> None:
    reader = reader_of(web.url)
    shape = ClipShape(FRAMES, HEIGHT, WIDTH)
    far = ClipStream(ClipDataset(reader, Order(reader.identities(), 0, 4), shape), 8)
    near_reader = ShardReader([web.folder / "train"])
    near = ClipStream(ClipDataset(near_reader, Order(near_reader.identities(), 0, 4), shape), 8)
    assert [batch["key"] for batch in far.loader(num_workers=2)] == [batch["key"] for batch in near.loader()]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://me:secret@host/set", "holds a name, a password or a signature"),
        ("https://host/set?X-Amz-Signature=secret", "holds a name, a password or a signature"),
        ("ftp://host/set", "https, s3, gs"),
    ],
)
def test_addresses_with_credentials_are_refused_and_not_repeated(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_card(address)
    assert "secret" not in str(caught.value)


def test_a_senseless_bound_is_a_sentence(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.LIMIT_VARIABLE, "plenty")
    with pytest.raises(UserError, match="ANYFLOW_CACHE_GB='plenty'"):
        read_all(reader_of(web.url))


# --- a bucket ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(make_shards: MakeShards, s3: Any) -> tuple[Any, Path]:
    """The data set in a bucket, and its folder here."""
    folder = make_shards().parent
    (folder / "card.yaml").write_text(yaml.safe_dump(CARD))
    for path in sorted(folder.rglob("*.*")):
        if path.is_file() and "cache" not in path.parts:
            s3.upload_file(str(path), "footage", f"sets/tiny/{path.relative_to(folder).as_posix()}")
    return s3, folder


def test_a_data_set_in_a_bucket_reads_as_one_on_disk(bucket: Any, tmp_path: Path) -> None:
    _, folder = bucket
    reader = reader_of("s3://footage/sets/tiny")
    assert read_all(reader) == read_all(ShardReader([folder / "train"]))
    assert check_card("s3://footage/sets/tiny") == []
    kept = "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.json"))
    assert "test-secret" not in kept and "test-key" not in kept
    with pytest.raises(UserError, match=r"there is no s3://footage/nothing/card\.yaml"):
        load_card("s3://footage/nothing")


def test_changed_bytes_in_a_bucket_are_bad_clips(bucket: Any) -> None:
    client, folder = bucket
    data = (folder / "train/tiny-000000.tar").read_bytes()
    client.put_object(Bucket="footage", Key="sets/tiny/train/tiny-000000.tar", Body=data[:-1] + b"x")
    reader = reader_of("s3://footage/sets/tiny")
    with pytest.raises(DecodeError, match="differ from the sha256"):
        reader.read(0, reader.sample(0, 0), "mp4")
    client.put_object(Bucket="footage", Key="sets/tiny/train/tiny-000001.tar", Body=data[: len(data) // 2])
    with pytest.raises(UserError, match="did not come"):
        reader.read(1, reader.sample(1, 0), "mp4")


def test_a_data_set_in_a_google_bucket_reads_as_one_on_disk(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Google's own client, against a server that answers as the JSON interface does; faults are tried again too."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", web.url)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask for the bucket's kind by gRPC
    gcsfs = pytest.importorskip("gcsfs", reason="pip install '.[remote]'")
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    gcsfs.GCSFileSystem.clear_instance_cache()
    web.faults["tiny-000001.tar"] = ["error", "truncated"]
    reader = reader_of("gs://footage")
    assert read_all(reader) == read_all(ShardReader([web.folder / "train"]))
    assert any(path.startswith("/download/storage/v1/b/footage/o/train%2F") and span for path, span in web.asked)
    with pytest.raises(UserError, match=r"there is no gs://footage/nothing/card\.yaml"):
        load_card("gs://footage/nothing")
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_a_mirrors_mark_is_plain(web: Web) -> None:
    folder = remote.mirror(f"{web.url}/train/")
    assert json.loads((folder / remote.MARK).read_text()) == {"url": f"{web.url}/train"}
    assert remote.mirror(f"{web.url}/train") == folder and re.fullmatch(r"[A-Za-z0-9.-]+", folder.name)
