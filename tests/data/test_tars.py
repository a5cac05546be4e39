"""Somebody else's tars: named in any way, indexed by their headers, and then read as shards of our own."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tar_cards import captions, card_of, reader_of
from tar_files import sample, video, write_set, write_tar

from anyflow.data.card import check_shards, load_card
from anyflow.data.decode import DecodeError
from anyflow.data.find import is_tars
from anyflow.data.members import Members, load_npy, parse_members
from anyflow.data.reader import find_split
from anyflow.data.tar_index import left_out_of
from anyflow.data.tars import load_set, short_name
from anyflow.errors import UserError
from anyflow.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


# --- naming them -----------------------------------------------------------------------------------------------------


def test_a_path_a_pattern_a_list_and_a_folder_name_the_same_tars(tmp_path: Path, again: Any) -> None:
    keys = write_set(tmp_path / "set", [2, 3, 1])
    folder = f"{tmp_path}/set"
    joined = "::".join(f"{folder}/{n:03d}.tar" for n in range(3))
    for named in (
        f"{folder}/{{000..002}}.tar",
        f"{folder}/00{{0,1,2}}.tar",
        folder,
        f"{folder}/",
        f"{folder}/*.tar",
        joined,
    ):
        assert is_tars(named)
        assert set(captions(reader_of(named))) == {key for key in keys if not key.startswith("002")}
        assert set(captions(reader_of(named, "heldout"))) == {"002/clip0"}  # the last tar
    assert not is_tars("driving") and not is_tars("s3://bucket/set") and is_tars("s3://bucket/{0..9}.tar")


def test_a_folder_with_another_index_or_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WebDataset's own index has the name of ours; a card in data/ is meant before a folder of the same name."""
    write_set(tmp_path / "driving", [1, 1])
    (tmp_path / "driving/index.json").write_text(
        '{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": []}'
    )
    assert is_tars(tmp_path / "driving")
    monkeypatch.chdir(tmp_path)
    assert is_tars("./driving/") and not is_tars("driving")
    assert load_card("driving").frames == 17


def test_one_tar_holds_its_last_clips_out(tmp_path: Path) -> None:
    write_set(tmp_path, [20])
    train, held = (set(captions(reader_of(f"{tmp_path}/000.tar", split))) for split in ("train", "heldout"))
    assert held == {f"000/clip{n}" for n in range(16, 20)} and len(train) == 16
    assert check_shards(f"{tmp_path}/000.tar") == []  # no clip is in both


@pytest.mark.parametrize(
    ("names", "heldout"),
    [
        (["train/000.tar", "train/001.tar", "val/000.tar"], {"val/000"}),
        (["set-0.tar", "set-1.tar", "test-0.tar"], {"test-0"}),
        (["a.tar", "b.tar", "testimony.tar"], {"testimony"}),  # as the last, not by its name
    ],
)
def test_folders_and_names_tell_what_is_held_out(tmp_path: Path, names: list[str], heldout: set[str]) -> None:
    for name in names:
        write_tar(tmp_path / "set" / name, sample("a"))
    found = load_set(find_split(f"{tmp_path}/set", "heldout").folder)
    assert (
        found is not None
        and {tar.removeprefix(f"{tmp_path}/set/").removesuffix(".tar") for tar in found.tars} == heldout
    )


def test_the_last_tar_that_is_there_is_held_out(tmp_path: Path) -> None:
    """The others that a pattern names are missing from training, and count there."""
    write_set(tmp_path / "set", [1, 1, 1, 1])
    card = f"{tmp_path}/set/{{000..006}}.tar"
    assert set(captions(reader_of(card, "heldout"))) == {"003/clip0"}
    assert set(captions(reader_of(card, "train"))) == {f"{n:03d}/clip0" for n in range(3)}
    assert len(left_out_of(find_split(card, "train").folder)) == 3


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
@pytest.mark.parametrize("below", ["", "more"])
def test_a_folder_of_compressed_tars(tmp_path: Path, suffix: str, below: str) -> None:
    for number in range(3):
        plain = write_tar(tmp_path / f"{number}.tar", sample(f"c{number}"))
        (tmp_path / "set" / below).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / below / f"{number}{suffix}").write_bytes(gzip.compress(plain.read_bytes()))
    found = load_set(find_split(f"{tmp_path}/set", "train", index=False).folder)
    assert found is not None and [Path(tar).name for tar in found.tars] == [f"0{suffix}", f"1{suffix}"]
    with pytest.raises(UserError, match=r"must be unpacked, or streamed by data\.streaming=true"):
        find_split(f"{tmp_path}/set", "train")


def test_what_is_no_tar_is_a_sentence(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("a"))
    for named, told in [
        (f"{tmp_path}/{{a.tar", "is no pattern of tars"),
        (f"{tmp_path}/a.tar::{tmp_path}/{{a,b}}.tar", "is named twice"),
        (f"{tmp_path}/{{0..99999999}}.tar", "more than 1000000 tars"),
        (f"{tmp_path}/*.tar.gz", "holds no tar"),
        (f"{tmp_path}/nowhere/*.tar", "cannot be listed"),
        ("s3://me:secret@bucket/{0..3}.tar", "holds a name, a password"),
        ("ftp://host/{0..3}.tar", "are known"),
    ]:
        with pytest.raises(UserError, match=told):
            load_card(named)
    with pytest.raises(UserError, match=r"none of the 2 tars is there, such as .*/x0\.tar"):
        find_split(f"{tmp_path}/{{x0,x1,x2}}.tar", "train")


def test_names_of_sets() -> None:
    for card, name in [
        ("s3://bucket/my-set/{000000..001999}.tar", "my-set"),
        ("/data/drive-{0..9}.tar", "drive"),
        ("a/b.tar::a/c.tar", "b"),
        ("{0..9}.tar", "tars"),
    ]:
        assert short_name(card) == name


def test_a_list_on_the_command_line_is_one_data_set_and_an_expanded_pattern_is_told() -> None:
    joined = load_recipe("finetune/driving", overrides=["data.card=[x/a.tar,x/b.tar]"])
    assert joined.data.card == ["x/a.tar::x/b.tar"]
    weighted = load_recipe("finetune/driving", overrides=["data.card=[x/a.tar,x/b.tar]", "data.weights=[1,2]"])
    assert weighted.data.card == ["x/a.tar", "x/b.tar"]
    pattern = load_recipe("finetune/driving", overrides=["data.card=s3://bucket/{000..003}.tar"])
    assert pattern.data.card == ["s3://bucket/{000..003}.tar"]
    with pytest.raises(UserError, match=r"data\.card is given 2 times .* as a shell makes of braces"):
        load_recipe("finetune/driving", overrides=["data.card=x/0.tar", "data.card=x/1.tar"])


def test_streaming_says_what_it_cannot_do() -> None:
    streamed = load_recipe("finetune/driving", overrides=["data.streaming=true"])
    assert not streamed.data.precompute  # the stage file asks for it, and yields
    for more in ("data.precompute=true", "data.buckets=[5x64x64]", "data.weights=[1]"):
        with pytest.raises(UserError, match=r"needs an index of the clips, and data\.streaming=true makes none"):
            load_recipe("finetune/driving", overrides=["data.streaming=true", more])


# --- what their members hold -----------------------------------------------------------------------------------------


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


def test_a_card_says_which_members_hold_what(tmp_path: Path) -> None:
    for number in range(2):
        facts = {
            "meta": {"text.en": f"clip {number}", "pose": [[1, 2], [3, 4]]},
            "attributes": {"lane": "left"},
            "fps": 8,
        }
        members = [
            (f"a/b/clip{number}.rear.mp4", b"another camera"),
            (f"a/b/clip{number}.front.mp4", video(number)),
            (f"a/b/clip{number}.info.json", json.dumps(facts).encode()),
            (f"a/b/clip{number}.Actions.NPY", npy([[0.5, 1.0]] * 5)),
        ]
        write_tar(tmp_path / f"sets/{number}.tar", members)
    card = card_of(
        tmp_path,
        ["sets/0.tar", "sets/1.tar"],
        members={
            "video": "front.mp4",
            "caption": ["txt", "info.json:meta.text.en"],
            "controls": {"actions": ".actions.npy", "pose": "info.json:meta.pose"},
        },
    )
    with pytest.raises(DecodeError, match="no caption"):  # "meta.text.en" would be an object "text" in an object "meta"
        captions(reader_of(card))
    document = yaml.safe_load(Path(card).read_text())
    document["members"]["caption"] = "info.json:title"
    Path(card).write_text(yaml.safe_dump({**document, "caption": "A road."}))
    reader = reader_of(card)
    assert captions(reader) == {"0/a/b/clip0": "A road.", "1/a/b/clip1": "A road."}
    told = reader.describe(0, reader.sample(0, 0))
    assert told["controls"] == {"actions": [[0.5, 1.0]] * 5, "pose": [[1, 2], [3, 4]]}


def describe(members: Members, parts: dict[str, bytes]) -> dict[str, Any]:
    return members.describe(parts, parts.__getitem__)


def test_captions_are_found_where_they_usually_stand() -> None:
    usual = Members()
    for parts_, caption in [
        ({"mp4": b"", "txt": b"\xef\xbb\xbf A road.\n"}, "A road."),
        ({"mp4": b"", "txt": b"  ", "json": b'{"text": "B"}'}, "B"),
        ({"mp4": b"", "json": b'{"caption": "", "prompt": "C"}'}, "C"),
        ({"mp4": b"", "en.txt": b"D"}, "D"),
        ({"mp4": b"", "cls": b"3"}, ""),
    ]:
        assert describe(usual, parts_)["caption"] == caption
    for parts_, told in [
        ({"txt": b"\xe9"}, "not UTF-8"),
        ({"json": b"[1]"}, "holds no JSON object"),
        ({"json": b'{"caption": ["a", "b"]}'}, "its caption is no text"),
        ({"json": b"{"}, "is not JSON"),
        ({"en.txt": b"a", "de.txt": b"b"}, r"2 captions \(de\.txt, en\.txt\): name one in a card's members\.caption"),
    ]:
        with pytest.raises(DecodeError, match=told):
            describe(usual, parts_)


def test_controls_that_are_missing_or_no_numbers() -> None:
    keep = parse_members({"controls": {"speed": "npy", "path": "json:a.b"}}, "card")
    assert describe(keep, {"json": b'{"a": {"b": [1]}}'})["controls"] == {"path": [1]}
    skip = parse_members({"controls": {"speed": "npy"}, "missing_controls": "skip"}, "card")
    with pytest.raises(DecodeError, match=r"its control 'speed' \(npy\) is missing"):
        describe(skip, {"json": b"{}"})
    assert describe(skip, {"npy": npy([1, 2.5])})["controls"] == {"speed": [1.0, 2.5]}
    with pytest.raises(DecodeError, match="not numbers"):
        describe(skip, {"npy": npy(["a"])})


def test_no_pickle_and_no_bomb_is_loaded() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match="not numbers"):
        load_npy(file.getvalue(), "npy")
    huge = npy([1.0, 2.0]).replace(b"(2,)", b"(9999999999999,)"[:16].ljust(4))
    with pytest.raises(DecodeError, match="no npy of numbers"):
        load_npy(huge, "npy")


@given(st.binary(max_size=300), st.integers(0, 140))
def test_bytes_that_are_no_array_are_refused(noise: bytes, place: int) -> None:
    whole = npy([[1.0, 2.0]])
    for data in (noise, whole[:place] + noise, whole[:place]):
        with contextlib.suppress(DecodeError):
            assert load_npy(data, "npy").size <= len(data)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"vidoe": "mp4"}, r"unknown key members\.vidoe"),
        ({"video": 3}, r"members\.video=3: give an extension"),
        ({"video": []}, r"members\.video"),
        ({"controls": "npy"}, r"members\.controls='npy': give names with members"),
        ({"controls": {"a": 1}}, r"members\.controls"),
        ({"missing_controls": "drop"}, "give 'keep' or 'skip'"),
        ({"key_ends_at": "dot"}, "give 'first dot' or 'last dot'"),
        ("mp4", "give a mapping of keys to values"),
    ],
)
def test_mistakes_in_members_are_sentences(tmp_path: Path, members: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_card(card_of(tmp_path, "x.tar", members=members))


def test_keys_with_dots(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*sample("v1.0_clip0", 0), *sample("v1.0_clip1", 1)])
    with pytest.raises(UserError, match=r"2 videos \(0_clip0\.mp4, 0_clip1\.mp4\).*key_ends_at: last dot"):
        find_split(card_of(tmp_path, "a.tar"), "train")
    card = card_of(tmp_path, "a.tar", members={"key_ends_at": "last dot"})
    assert set(captions(reader_of(card))) == {"a/v1.0_clip0", "a/v1.0_clip1"}
