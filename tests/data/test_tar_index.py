"""The index of somebody else's tars: what is in it and what is not, when it is made anew, here and elsewhere."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tar_cards import captions, card_of, module_of, reader_of
from tar_files import sample, video, write_set, write_tar
from test_buckets import TALL, WIDE, parts
from test_cache import MeanCodec, encode
from typer.testing import CliRunner

from anyflow.cli.main import app
from anyflow.data import tar_headers, tar_index
from anyflow.data.card import check_shards
from anyflow.data.check import check_card
from anyflow.data.contact_sheet import contact_sheet
from anyflow.data.describe import describe_card
from anyflow.data.reader import find_split
from anyflow.data.shards import load_index
from anyflow.data.tar_headers import scan
from anyflow.data.tar_index import left_out_of
from anyflow.data.tars import load_set
from anyflow.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


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
            ("good.PKL", b"x"),
            ("../out.mp4", b"x"),
        ],
    )
    with tarfile.open(path, "a") as tar:
        for name in ("link.mp4", "good.latest"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    card = card_of(tmp_path, "a.tar")
    assert captions(reader_of(card)) == {"a/good": "a caption"}
    reasons = {key: reason for _, key, reason in left_out_of(find_split(card, "train").folder)}
    assert reasons == {
        "twice": "a member of its key is there twice, so which video has which caption cannot be told",
        "alone": "no video among its members (txt)",
        "../out.mp4": "its path leads out of the tar",
        "link.mp4": "it is a link or a device, no file",
    }
    told = capsys.readouterr().err
    assert "not used: 2 .cls, 2 .pkl, 1 .latest, 1 .(none)" in told and "left out: a.tar:alone (no video" in told
    with pytest.raises(UserError, match=r"4 of 5 clips cannot be used, more than error_budget 0\.01"):
        module_of(card, batch_size=1)
    assert module_of(card, error_budget=0.8, batch_size=1).stream is not None


@pytest.mark.parametrize("more", ["x.mp4", "x.txt", "x.cls", "x.MP4"])
@pytest.mark.parametrize("between", [False, True])
def test_of_a_key_that_is_there_twice_nothing_is_taken(tmp_path: Path, more: str, between: bool) -> None:
    """Two recordings under one key, or two texts of one: no video may come with the words of another."""
    first, other = [("x.mp4", video(1)), ("x.cls", b"1"), ("x.txt", b"of the first")], sample("y")
    whole = [*first, *other] if between else [*other, *first]
    write_tar(tmp_path / "a.tar", [*whole, (more, video(2) if more.lower() == "x.mp4" else b"of the other")])
    assert captions(reader_of(card_of(tmp_path, "a.tar"))) == {"a/y": "a caption"}


def test_what_nobody_asks_for_may_be_of_any_kind_and_size(tmp_path: Path) -> None:
    """Extensions that are not read make no clip that lacks something, whatever they are."""
    write_tar(tmp_path / "a.tar", [*sample("a"), ("a.pkl", b"x"), ("p.pkl", b"x"), ("p.npz", b"x"), ("q.PTH", b"x")])
    card = card_of(tmp_path, "a.tar")
    assert captions(reader_of(card)) == {"a/a": "a caption"}
    assert left_out_of(find_split(card, "train").folder) == []
    write_tar(tmp_path / "b.tar", [("p.pkl", b"x"), ("q.npz", b"x")])
    with pytest.raises(UserError, match=r"no clip among 1 tars: not used: 1 \.pkl, 1 \.npz; a card's members name"):
        find_split(card_of(tmp_path, "b.tar"), "train")


@pytest.mark.parametrize("members", [{"video": "pkl"}, {"caption": ["txt", "PTH"]}, {"controls": {"a": "x.pickle"}}])
def test_a_card_that_asks_for_a_pickle_is_refused(tmp_path: Path, members: dict[str, Any]) -> None:
    write_tar(tmp_path / "a.tar", sample("a"))
    with pytest.raises(UserError, match=rf"members\.{next(iter(members))} names .*a pickle is never read"):
        reader_of(card_of(tmp_path, "a.tar", members=members))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11, 200])
def test_some_clips_of_a_single_tar_are_held_out_and_some_are_not(tmp_path: Path, count: int) -> None:
    write_set(tmp_path, [count])
    parts = []
    for split in ("train", "heldout"):
        if count == 1:
            with pytest.raises(UserError, match=r"one clip \(000/clip0\) cannot both be trained on and held out: add"):
                find_split(str(tmp_path / "000.tar"), split)
        else:
            parts.append(load_index(find_split(str(tmp_path / "000.tar"), split).folder).count)
    if parts:
        assert parts == [count - parts[1], max(1, min(16, count // 5))]


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
    monkeypatch.setattr(tar_headers, "open_at", broken)
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


def test_damaged_clips_are_not_shown_but_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [("bad.mp4", b"no video"), ("bad.txt", b"x"), *sample("a"), *sample("b")])
    card = card_of(tmp_path, "a.tar")
    whole = contact_sheet(card, "train", 2, tmp_path / "sheet.png").stat().st_size
    assert whole > contact_sheet(card, "train", 1, tmp_path / "one.png").stat().st_size
    assert capsys.readouterr().err.count("not shown: a.tar:a/bad (") == 2
    write_tar(tmp_path / "b.tar", [("bad.mp4", b"no video"), ("bad.txt", b"x")])
    with pytest.raises(UserError, match=r"1 clips in a row cannot be used: b\.tar:b/bad \(.*repair the shards"):
        contact_sheet(card_of(tmp_path, "b.tar"), "train", 2, tmp_path / "none.png")


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


def test_latents_of_tars(tmp_path: Path) -> None:
    """Equal keys in two tars, folders and dots in keys: each clip's latents come back as its own."""
    for tar in range(2):
        write_tar(
            tmp_path / f"set/{tar}.tar",
            [*sample("x/v1.0_a", 2 * tar), *sample("x/v1.0_b", 2 * tar + 1), ("x/c.txt", b"no video")],
        )
    card = card_of(tmp_path, "set/{0..1}.tar", members={"key_ends_at": "last dot"})
    codec = MeanCodec()
    with pytest.raises(UserError, match=r"2 of 6 clips cannot be used.*0\.tar:x/c \(no video"):
        encode(Path(card), codec)
    cache = encode(Path(card), codec, error_budget=0.5)
    data = module_of(card, cache=cache, codec_hash=codec.fingerprint, steps=2, error_budget=0.5)
    assert data.stream is not None and len(data.stream.skipped) == 2
    found = {
        key: row for batch in data.train_dataloader() for key, row in zip(batch["key"], batch["latents"], strict=True)
    }
    assert {key.replace("%2E", ".") for key in found} == set(captions(reader_of(card)))
    brightness = [float(found[key].mean()) * 255 for key in sorted(found)]
    assert all(abs(value - 10 * number) < 5 for number, value in enumerate(brightness))
