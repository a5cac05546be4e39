"""Somebody else's tars: named in any way, indexed by their headers, and then read as shards of our own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tar_files import sample, video, write_set, write_tar
from test_buckets import TALL, WIDE, parts
from tiny_shards import FRAMES, HEIGHT, WIDTH
from typer.testing import CliRunner
from web import serve

from anyflow.cli.main import app
from anyflow.data import places, remote, tar_index
from anyflow.data.card import check_shards, load_card
from anyflow.data.check import check_card
from anyflow.data.contact_sheet import contact_sheet
from anyflow.data.decode import DecodeError
from anyflow.data.describe import describe_card
from anyflow.data.members import Members, load_npy, parse_members
from anyflow.data.module import VideoDataModule
from anyflow.data.reader import ShardReader, find_split
from anyflow.data.shards import load_index
from anyflow.data.tar_index import left_out_of, scan
from anyflow.data.tars import expand, is_tars, load_set, short_name
from anyflow.errors import UserError
from anyflow.recipe import load_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BACK_OFF", 0.01)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Forget what this process looked at: as a new one would begin."""

    def forget() -> None:
        tar_index._ready.clear()
        if "s3fs" in sys.modules:
            sys.modules["s3fs"].S3FileSystem.clear_instance_cache()

    return forget


def reader_of(card: str, split: str = "train") -> ShardReader:
    found = find_split(card, split)
    return ShardReader([found.folder], [found.caption])


def captions(reader: ShardReader) -> dict[str, str]:
    """Key -> caption of every clip; its video is read as well."""
    found = {}
    for number, (_, shard) in enumerate(reader.shards):
        for one in shard.samples:
            assert reader.video(number, one)[4:8] == b"ftyp"
            found[one.key] = reader.describe(number, one)["caption"]
    return found


def card_of(folder: Path, tars: Any, **changes: Any) -> str:
    """A card beside a folder, whose training split is these tars."""
    facts = {"name": "mine", "domain": "video", "description": "Mine.", "licence": "MIT", "splits": {"train": tars}}
    path = folder / "card.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**facts, **changes}))
    return str(path)


def module_of(card: str, **options: Any) -> VideoDataModule:
    shape: dict[str, Any] = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "batch_size": 2, "steps": 10}
    data = VideoDataModule(card, **{**shape, **options})
    data.setup()
    return data


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
        ({"txt": b"\xff\xfe"}, "not UTF-8"),
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
        ("mp4", "give keys with values"),
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


# --- the index -------------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.tar"
    write_tar(
        path,
        [
            *sample("good", 1),
            ("twice.mp4", video(2)),
            ("twice.txt", b"first"),
            ("twice.txt", b"second"),
            ("alone.txt", b"no video"),
            ("good.cls", b"1"),
            ("README", b"x"),
            ("twice.cls", b"1"),
            ("evil.pkl", b"x"),
            ("../out.mp4", b"x"),
        ],
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    card = card_of(tmp_path, "a.tar")
    assert captions(reader_of(card)) == {"a/good": "a caption", "a/twice": "first"}
    reasons = {key: reason for _, key, reason in left_out_of(find_split(card, "train").folder)}
    assert reasons == {
        "twice": "its txt member is there twice: the first is taken",
        "alone": "no video among its members (txt)",
        "evil.pkl": "a pickle is never read",
        "../out.mp4": "its path leads out of the tar",
        "link.mp4": "it is a link or a device, no file",
    }
    told = capsys.readouterr().err
    assert "not used: 2 .cls, 1 .(none)" in told and "left out: a.tar:alone (no video" in told
    with pytest.raises(UserError, match=r"5 of 7 clips cannot be used, more than error_budget 0\.01"):
        module_of(card)
    assert module_of(card, error_budget=0.8).stream is not None


def test_members_need_not_stand_together(tmp_path: Path) -> None:
    """A tar of a folder in the order of its disk: all texts before all videos."""
    texts = [(f"./c{n}.txt", f"clip {n}".encode()) for n in range(3)]
    write_tar(tmp_path / "a.tar", [*texts, *((f"./c{n}.mp4", video(n)) for n in (2, 0, 1))])
    assert captions(reader_of(card_of(tmp_path, "a.tar"))) == {f"a/./c{n}": f"clip {n}" for n in range(3)}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_kind_and_depth(tmp_path: Path, form: int) -> None:
    keys = ["deep/er/clip", "v1.0/clip", "long/" + "x" * 80 + "/" + "y" * 60, "KEY"]
    keys += ["stra\u00dfe/\u8eca"] if form != tarfile.USTAR_FORMAT else []
    members = [member for key in keys for member in ((f"{key}.MP4", video(1)), (f"{key}.Txt", key.encode()))]
    write_tar(tmp_path / "a.tar", members, form)
    assert captions(reader_of(card_of(tmp_path, "a.tar"))) == {f"a/{key}": key for key in keys}


def test_equal_keys_in_several_tars_are_several_clips(tmp_path: Path) -> None:
    for tar in range(3):
        write_tar(tmp_path / f"set/{tar}.tar", [*sample("000000", tar), *sample("000001", tar)])
    data = module_of(card_of(tmp_path, "set/{0..2}.tar"), steps=3)
    assert data.stream is not None
    keys = [key for batch in data.train_dataloader() for key in batch["key"]]
    assert len(set(keys)) == 6


def test_a_damaged_tar_gives_what_stands_before(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [4, 4, 4])
    for name, keep in (("000", 0.5), ("001", 0.0)):
        path = tmp_path / f"set/{name}.tar"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    card = card_of(tmp_path, "set/{000..003}.tar")
    folder = find_split(card, "train").folder
    assert [len(shard.samples) for shard in load_index(folder).shards] == [2, 4]
    problems = {shard: reason for shard, key, reason in left_out_of(folder) if key == "*"}
    assert set(problems) == {"000.tar", "001.tar", "003.tar"}
    assert "cut off" in problems["000.tar"] and "not there" in problems["003.tar"]
    with pytest.raises(UserError, match=r"3 of 4 tars cannot be read, more than error_budget 0\.5 allows: 000\.tar"):
        module_of(card, error_budget=0.5)
    assert module_of(card, error_budget=0.9).stream is not None


def test_a_compressed_tar_is_told_how(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("a"))
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "a.tar", "x.mp4")
    with pytest.raises(
        UserError, match=r"no clip among 1 tars: .*must be unpacked, or streamed by data\.streaming=true"
    ):
        find_split(card_of(tmp_path, "b.tar.gz"), "train")


@given(st.data())
def test_whatever_a_tar_holds_its_index_stays_inside_it(data: st.DataObject) -> None:
    """Bytes changed anywhere: never an exception, never a place outside of the file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.mp4", "a.txt", "b.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 5000))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    found = scan(io.BytesIO(bytes(content)), len(content))
    assert all(offset >= 0 and offset + size <= len(content) for _, offset, size in found.members)


def test_an_index_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: Any) -> None:
    write_set(tmp_path / "set", [2] * 6)
    card = card_of(tmp_path, "set/{000..005}.tar")
    opened: list[str] = []

    def broken(address: str, ahead: bool = False) -> Any:
        opened.append(Path(address).name)
        if len(opened) == 4:
            raise KeyboardInterrupt
        return open(address, "rb")

    monkeypatch.setattr(tar_index, "THREADS", 1)
    monkeypatch.setattr(tar_index, "open_at", broken)
    with pytest.raises(KeyboardInterrupt):
        find_split(card, "train")
    first, opened[:] = [name for n, name in enumerate(opened) if n != 3], ["already"] * 4
    find_split(card, "train")
    assert sorted(first + opened[4:]) == [f"{n:03d}.tar" for n in range(6)]  # each once
    again()
    opened[:] = ["already"] * 4
    find_split(card, "train")
    assert not opened[4:]  # nothing changed


def test_a_tar_that_changed_is_read_again_and_a_run_is_told(tmp_path: Path, again: Any) -> None:
    write_set(tmp_path / "set", [2, 2, 2])
    card = card_of(tmp_path, "set/{000..002}.tar")
    data = module_of(card)
    state = data.state_dict()
    again()
    module_of(card).load_state_dict(state)
    write_tar(tmp_path / "set/001.tar", [*sample("new1"), *sample("new2"), *sample("new3")])
    again()
    assert "001/new3" in captions(reader_of(card))
    with pytest.raises(UserError, match=r"number of clips \(was 6, is 7\), contents of the shards changed"):
        module_of(card).load_state_dict(state)


def test_a_run_goes_on_where_its_tars_have_moved(tmp_path: Path) -> None:
    write_set(tmp_path / "here/set", [2, 2, 2])
    write_set(tmp_path / "there/other", [2, 2, 2])
    before = module_of(card_of(tmp_path / "here", "set/{000..002}.tar"))
    after = module_of(card_of(tmp_path / "there", "other/{000..002}.tar"))
    after.load_state_dict(before.state_dict())
    assert [b["key"] for b in before.train_dataloader()] == [b["key"] for b in after.train_dataloader()]


def test_a_strangers_index_names_no_other_place(tmp_path: Path) -> None:
    """Neither a data set on disk nor one that is fetched can make us read other files."""
    write_tar(tmp_path / "a.tar", sample("a"))
    folder = find_split(card_of(tmp_path, "a.tar"), "train").folder
    stolen = tmp_path / "stolen"
    stolen.mkdir()
    for name in ("index.json", "tars.json"):
        (stolen / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="a shard lies elsewhere"):
        load_index(stolen)
    assert load_set(stolen) is None


def test_clips_of_several_shapes(tmp_path: Path) -> None:
    """Shapes are not in a tar's headers: they are read when a run has buckets."""
    members = []
    for number, shape in enumerate([WIDE] * 4 + [TALL] * 4):
        members += [(f"{number}.mp4", parts(shape, number)["mp4"]), (f"{number}.txt", b"a")]
    write_tar(tmp_path / "a.tar", [*members, ("bad.mp4", b"x"), ("bad.txt", b"a")])
    card = card_of(tmp_path, "a.tar")
    options = {"frames": WIDE[0], "height": WIDE[1], "width": WIDE[2], "buckets": [TALL], "error_budget": 0.5}
    data = module_of(card, **options, steps=4)
    shapes = {tuple(batch["frames"].shape[1:4]) for batch in data.train_dataloader()}
    assert shapes == {WIDE, TALL}
    assert data.stream is not None and [skip.key for skip in data.stream.skipped.values()] == ["a/bad"]
    assert len(captions(reader_of(card))) == 8  # an index with shapes serves runs without buckets


# --- looking at them -------------------------------------------------------------------------------------------------


def test_show_and_check(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "set/0.tar", [*sample("a", 1), *sample("b", 2, caption=None), ("c.mp4", b"x"), ("c.txt", b"c")]
    )
    write_tar(tmp_path / "set/1.tar", sample("d", 3))
    facts = describe_card(f"{tmp_path}/set")
    assert facts["splits"]["train"]["clips"] == 3 and facts["splits"]["train"]["captions"]["missing"] == 1
    problems = check_card(f"{tmp_path}/set", workers=0)
    assert len(problems) == 2 and "'0/b'" in problems[0] and "no caption" in problems[0] and "'0/c'" in problems[1]
    sheet = contact_sheet(f"{tmp_path}/set", "heldout", 1, tmp_path / "sheet.png")
    assert sheet.stat().st_size > 1000
    shown = CliRunner().invoke(app, ["data", "show", f"{tmp_path}/set", "--count", "0"])
    assert (
        shown.exit_code == 0
        and "of any length and size" in shown.output
        and "train: 3 clips in 1 shards" in shown.output
    )


def test_check_finds_a_tar_that_changed_under_its_index(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("a"))
    card = card_of(tmp_path, "a.tar")
    find_split(card, "train")
    write_tar(tmp_path / "a.tar", sample("b"))
    assert any("was changed meanwhile" in problem for problem in check_shards(card))


# --- elsewhere -------------------------------------------------------------------------------------------------------


def test_tars_on_a_web_server_are_indexed_by_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers alone are asked for, through faults; clips then come as from this machine."""
    big = os.urandom(300_000)
    for tar in range(3):
        members = [m for n in range(4) for m in (*sample(f"{n}", n), (f"{n}.bin", big))]
        write_tar(tmp_path / f"web/set/{tar}.tar", members)
    size = sum(path.stat().st_size for path in (tmp_path / "web/set").iterdir())
    with serve(tmp_path / "web") as web:
        web.faults["1.tar"] = ["error", "truncated"]
        card = f"{web.url}/set/{{0..2}}.tar"
        find_split(card, "train"), find_split(card, "heldout")
        spans = [tuple(map(int, span[6:].split("-"))) for _, span in web.asked if span]
        assert sum(end - start + 1 for start, end in spans) < 0.5 * size
        assert len(captions(reader_of(card))) == 8
        found = {
            key: caption for split in ("train", "heldout") for key, caption in captions(reader_of(card, split)).items()
        }
        assert found == captions_of_files(tmp_path / "web/set")
        with pytest.raises(UserError, match=r"there is no .*/set/card\.yaml.*nor are there tars .*pattern such as"):
            load_card(f"{web.url}/set")


def captions_of_files(folder: Path) -> dict[str, str]:
    return {f"{path.stem}/{n}": "a caption" for path in folder.iterdir() for n in range(4)}


def test_tars_on_a_web_server_are_streamed(tmp_path: Path) -> None:
    keys = write_set(tmp_path / "web/set", [4, 4])
    with serve(tmp_path / "web") as web:
        web.faults["000.tar"] = ["error", "ok", "truncated"]
        card = card_of(tmp_path, f"{web.url}/set/{{000..001}}.tar")
        data = module_of(card, streaming=True, steps=4)
        assert sorted(key for batch in data.train_dataloader() for key in batch["key"]) == keys
        web.faults["000.tar"] = ["refused"] * 3
        with pytest.raises(UserError, match=r"it is forbidden.*credentials"):
            list(module_of(card, streaming=True, steps=4).train_dataloader())


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with three tars, of a real S3 server on this machine."""
    pytest.importorskip("s3fs", reason="pip install '.[dev]'")
    server_module = pytest.importorskip("moto.server", reason="pip install '.[dev]'")
    import boto3
    import s3fs

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket="footage")
    write_set(tmp_path / "set", [3, 3, 2])
    for path in (tmp_path / "set").iterdir():
        client.upload_file(str(path), "footage", f"my/set/{path.name}")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_tars_in_a_bucket(bucket: Any, tmp_path: Path, again: Any) -> None:
    """By a pattern and by their folder, indexed and streamed; one that is replaced, by as many bytes, is read anew."""
    by_pattern = captions(reader_of("s3://footage/my/set/{000..002}.tar"))
    assert by_pattern == captions(reader_of("s3://footage/my/set")) and len(by_pattern) == 6
    card = card_of(tmp_path, "s3://footage/my/set/{000..002}.tar")
    streamed = module_of(card, streaming=True, steps=4)
    assert len({key for batch in streamed.train_dataloader() for key in batch["key"]}) == 8
    other = write_tar(
        tmp_path / "other.tar", [m for n in range(3) for m in sample(f"clip{n}", n, f"CLIP {n} of tar 0")]
    )
    assert other.stat().st_size == (tmp_path / "set/000.tar").stat().st_size
    bucket.upload_file(str(other), "footage", "my/set/000.tar")
    again()
    assert captions(reader_of(card))["000/clip1"] == "CLIP 1 of tar 0"


@given(st.lists(st.integers(0, 400_000), min_size=1, max_size=8), st.booleans())
def test_a_file_elsewhere_reads_as_one_here(jumps: list[int], ahead: bool) -> None:
    content = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8).tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "BLOCK", 70_000)
        patch.setattr(remote, "read_at", lambda address, start, end: content[start:end])
        with places.RangeFile("s3://x/y", len(content), ahead) as file:
            here = io.BytesIO(content)
            for jump in jumps:
                file.seek(jump), here.seek(jump)
                for count in (1, 513, 100_000):
                    assert file.read(count) == here.read(count)
                    assert file.tell() == here.tell()


def test_expand_is_relative_to_the_card() -> None:
    assert expand("a/{0..1}.tar", "/home/me") == ["/home/me/a/0.tar", "/home/me/a/1.tar"]
    assert expand(["a.tar", "s3://b/c.tar"], "https://host/set") == ["https://host/set/a.tar", "s3://b/c.tar"]
