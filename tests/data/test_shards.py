"""Shards: what is written is what the index finds, the same bytes each time, and damage is named."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyflow.data.clip import Clip
from anyflow.data.shards import (
    INDEX_NAME,
    check_folder,
    load_index,
    read_clip,
    read_parts,
    write_samples,
    write_shards,
)
from anyflow.errors import UserError


def clip(number: int, size: int = 300) -> Clip:
    return Clip(key=f"c-{number:03d}", caption=f"Clip {number}.", fps=8.0, domain="test", mp4=bytes([number]) * size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards([clip(n) for n in range(5)], tmp_path / "s", "test", per_shard=2)
    return tmp_path / "s"


def test_round_trip(folder: Path) -> None:
    index = load_index(folder)
    assert [len(shard.samples) for shard in index.shards] == [2, 2, 1]
    assert [read_clip(folder, shard, sample) for shard, sample in index] == [clip(n) for n in range(5)]
    assert index.count == 5
    assert index.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert check_folder(folder) == []


def test_index_file_has_the_documented_form(folder: Path) -> None:
    document = json.loads((folder / INDEX_NAME).read_text())
    assert document["version"] == 1
    first = document["shards"][0]
    assert first["name"] == "test-000000.tar"
    assert set(first) == {"name", "bytes", "sha256", "samples"}
    assert first["samples"][0]["key"] == "c-000"
    offset, size = first["samples"][0]["parts"]["mp4"]
    assert (folder / first["name"]).read_bytes()[offset : offset + size] == bytes([0]) * 300


def test_shards_are_plain_webdataset_tars(folder: Path) -> None:
    with tarfile.open(folder / "test-000000.tar") as tar:
        assert sorted(tar.getnames()) == ["c-000.json", "c-000.mp4", "c-001.json", "c-001.mp4"]
        assert {member.mtime for member in tar} == {0}


def test_same_clips_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_shards([clip(n) for n in range(5)], tmp_path / "again", "test", per_shard=2)
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_some_members_only(folder: Path) -> None:
    index = load_index(folder)
    shard = index.shards[0]
    assert set(read_parts(folder, shard, shard.samples[0], names=("json",))) == {"json"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.dictionaries(
        st.text("abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=90),
        st.fixed_dictionaries({"mp4": st.binary(max_size=3000), "json": st.binary(max_size=40)}),
        min_size=1,
        max_size=9,
    ),
    per_shard=st.integers(1, 4),
)
def test_any_bytes_come_back_by_offset(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, dict[str, bytes]], per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("any") / "s"
    write_samples(samples.items(), folder, "p", per_shard)
    index = load_index(folder)
    assert {sample.key: read_parts(folder, shard, sample) for shard, sample in index} == samples
    assert [sample.key for _, sample in index] == list(samples)
    assert check_folder(folder) == []


def test_a_used_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="already holds shards"):
        write_shards([clip(9)], folder, "test")


def test_no_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no clip was given"):
        write_shards([], tmp_path / "s", "test")


def test_equal_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'c-001' occurs twice"):
        write_shards([clip(1), clip(1)], tmp_path / "s", "test")
    assert not (tmp_path / "s" / INDEX_NAME).exists()


def test_a_broken_source_leaves_no_index(tmp_path: Path) -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield clip(0)
        raise RuntimeError("the simulator died")

    with pytest.raises(RuntimeError):
        write_shards(broken(), tmp_path / "s", "test", per_shard=1)
    assert not (tmp_path / "s" / INDEX_NAME).exists()


def test_no_index_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no index\.json"):
        load_index(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1, "shards": [{}]}'])
def test_a_foreign_index_is_a_users_mistake(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(UserError, match="not a shard index"):
        load_index(tmp_path)


def test_a_newer_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text('{"version": 7, "shards": []}')
    with pytest.raises(UserError, match="version 7 is unknown"):
        load_index(tmp_path)


def test_a_truncated_tar_is_named(folder: Path) -> None:
    path = folder / "test-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    assert [p for p in check_folder(folder) if "truncated" in p and path.name in p]
    shard = load_index(folder).shards[1]
    with pytest.raises(UserError, match=r"test-000001\.tar.*truncated at sample 'c-002'"):
        read_clip(folder, shard, shard.samples[0])


def test_a_missing_tar_is_named(folder: Path) -> None:
    (folder / "test-000002.tar").unlink()
    assert ["test-000002.tar" in problem and "missing" in problem for problem in check_folder(folder)] == [True]


def test_a_changed_byte_is_found(folder: Path) -> None:
    path = folder / "test-000000.tar"
    data = bytearray(path.read_bytes())
    offset, _ = load_index(folder).shards[0].samples[0].parts["mp4"]
    data[offset] ^= 1
    path.write_bytes(data)
    assert ["sha256 differs" in problem for problem in check_folder(folder)] == [True]


def test_a_tar_beside_the_index_is_found(folder: Path) -> None:
    (folder / "stray-000000.tar").write_bytes(b"")
    assert ["not in the index" in problem for problem in check_folder(folder)] == [True]


def test_a_sample_without_video_is_found(tmp_path: Path) -> None:
    write_samples([("a", {"json": b"{}"})], tmp_path / "s", "p")
    assert ["'a' has only ['json']" in problem for problem in check_folder(tmp_path / "s")] == [True]
