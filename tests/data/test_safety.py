"""What strangers wrote: refused or skipped, counted and named, whatever the bytes are."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import av
import drive_files
import footage_files
import numpy as np
import pytest
from footage_files import encode, lenient, lerobot_v2, picture, put, put_csv, put_tar, video
from hypothesis import given
from hypothesis import strategies as st
from tiny_shards import FRAMES, MakeShards, card_of, clip_parts

from anyflow.data import decode
from anyflow.data.check import check_card
from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.importing import footage
from anyflow.data.importing.run import import_dataset
from anyflow.data.reader import parse_metadata
from anyflow.data.safety import MAX_CAPTION, clean_caption, inside, plain
from anyflow.data.shards import INDEX_NAME, load_index
from anyflow.errors import UserError

EVIL_NAMES = ("../up.mp4", "/etc/passwd", "a/../../b.mp4", "..", "C:/x.mp4", "..\\up.mp4", "a\0b.mp4", "")


# --- names and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="leads out of the data set"):
        inside(tmp_path, name)


@given(st.text(max_size=40))
def test_names_stay_inside_or_are_refused(name: str) -> None:
    folder = Path("/data/set")
    try:
        path = inside(folder, name)
    except DecodeError:
        return
    assert Path(*path.parts[: len(folder.parts)]) == folder and ".." not in path.parts


@given(st.text() | st.integers() | st.none() | st.lists(st.text()))
def test_captions_are_clean_or_refused(text: Any) -> None:
    try:
        caption = clean_caption(text)
    except DecodeError:
        return
    assert caption == " ".join(caption.split()) and len(caption) <= MAX_CAPTION
    caption.encode()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)


@given(VALUES)
def test_plain_values_are_json_that_everybody_reads(value: Any) -> None:
    try:
        simple = plain(value)
    except DecodeError:
        return
    assert json.loads(json.dumps(simple, allow_nan=False).encode()) == simple


# --- importers --------------------------------------------------------------------------------------------------------


def named(report: Any) -> dict[str, str]:
    return dict(report.unusable)


def test_a_tars_members_are_refused_by_name(tmp_path: Path) -> None:
    good = [(f"good{n}.mp4", video(n, 8, 8)) for n in range(2)]
    evil = [(name, video(3, 8, 8)) for name in ("../up.mp4", "/etc/passwd.mp4", "a/../../b.mp4")]
    path = put_tar(tmp_path / "in/0.tar", [*good, *evil, ("x.pickle", b"cos\nsystem\n"), ("dark.mp4", b"")])
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "soft.mp4"), (tarfile.LNKTYPE, "hard.mp4"), (tarfile.CHRTYPE, "dev.mp4")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    reasons = named(report)
    assert report.clips == {"train": 4}
    assert [reasons[f"0.tar:{name}"] for name, _ in evil] == ["the member's path leads out of the shard"] * 3
    assert [reasons[f"0.tar:{name}.mp4"] for name in ("soft", "hard", "dev")] == [
        "the member is a link or a device, no file"
    ] * 3
    assert ("0.tar:*.pickle (1)", "members that are not read (.pickle)") in report.unread
    assert "0/dark" in reasons


def test_compressed_and_truncated_tars_are_named(tmp_path: Path) -> None:
    path = put_tar(tmp_path / "in/b.tar", [(f"v{n}.mp4", video(n, 8, 8)) for n in range(3)])
    with tarfile.open(path) as tar:
        path.write_bytes(path.read_bytes()[: tar.getmembers()[2].offset_data + 100])
    with tarfile.open(tmp_path / "in/a.tar", "w:gz") as tar:
        tar.add(path, "v.mp4")
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    reasons = named(report)
    assert "cannot be read to its end" in reasons["a.tar"] and report.clips["train"] >= 2
    assert any(
        "truncated" in reason or "to its end" in reason for name, reason in reasons.items() if name.startswith("b")
    )


@pytest.mark.parametrize("name", EVIL_NAMES[:-2])
def test_paths_in_tables_stay_inside(name: str, tmp_path: Path) -> None:
    put(tmp_path / "up.mp4", video(0, 8, 8))
    put(tmp_path / "in/good.mp4", video(1, 8, 8))
    put_csv(tmp_path / "in/metadata.csv", [{"file_name": name, "text": "x"}, {"file_name": "good.mp4", "text": "x"}])
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    assert report.clips == {"train": 2} and "leads out of the data set" in report.unusable[0][1]


def test_paths_in_lerobots_templates_stay_inside(tmp_path: Path) -> None:
    folder = lerobot_v2(tmp_path / "in", 2, 8)
    info = json.loads((folder / "meta/info.json").read_text())
    for template in ("../{video_key}.mp4", "/etc/{episode_index}", "{episode_index.__class__}", "{nothing}"):
        put(folder / "meta/info.json", {**info, "video_path": template})
        with pytest.raises(UserError, match=r"holds no recordings|none of the first|cannot be used|no plain field"):
            import_dataset(folder, tmp_path / "out", lenient())


def test_captions_that_are_no_captions_are_named(tmp_path: Path) -> None:
    for number in range(5):
        put(tmp_path / f"in/v{number}.mp4", video(number, 8, 8))
    put(tmp_path / "in/v0.txt", "x" * 1_000_000)
    put(tmp_path / "in/v1.txt", b"\xff\xfe\xfa")
    put(tmp_path / "in/v2.json", "{" * 100_000)
    put(tmp_path / "in/v3.json", '{"caption": "\\ud800"}')
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    reasons = named(report)
    assert report.clips == {"train": 2} and len(reasons) == 4
    assert "1000000 characters" in reasons["v0"] and "not UTF-8" in reasons["v1.mp4"]
    assert "not JSON" in reasons["v2.mp4"] and "not UTF-8" in reasons["v3"]


def test_bad_rows_do_not_take_the_table_with_them(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"in/v{number}.mp4", video(number, 8, 8))
    lines = ['{"file_name": "v0.mp4", "text": "fine"}', "{", "[1]", '{"text": "x"}', '{"file_name": 5, "text": "x"}']
    lines.append('{"file_name": "v1.mp4", "text": "' + "x" * 1_000_000 + '"}')
    put(tmp_path / "in/metadata.jsonl", "\n".join(lines).encode() + b'\n{"file_name": "v1.mp4", "text": "\xff"}')
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    assert report.clips == {"train": 2} and len(report.unusable) == 6


# --- bombs ------------------------------------------------------------------------------------------------------------


def test_a_gap_of_years_between_two_pictures_is_not_filled(tmp_path: Path) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 192, "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(picture(0, number), format="rgb24")
            frame.pts = number if number < 10 else 10**7 + number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    put(tmp_path / "in/v.mkv", file.getvalue())
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient(fps=8.0))
    assert report.clips == {"train": 2} and report.unusable == () and "pauses" in str(report.notes)


def test_pictures_larger_than_any_camera_makes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(0, 4, 8)
    assert decode_clip(data, ClipShape(4, 48, 192)).shape == (4, 48, 192, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 48 * 192 // 2)
    with pytest.raises(DecodeError, match="cannot be decoded"):
        decode_clip(data, ClipShape(4, 48, 192))


def test_a_recording_has_a_budget_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "in/v.mp4", video(0, 40, 8))
    monkeypatch.setattr(footage, "PIXEL_BUDGET", 48 * 192 * 10)
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    assert report.clips == {"train": 2} and any("more pixels" in note for note in report.notes)


def test_a_rate_that_no_camera_has_is_refused() -> None:
    with pytest.raises(DecodeError, match="claims 30000 frames a second"):
        decode_clip(encode([picture(0, t) for t in range(4)], 100_000, format="matroska"), ClipShape(4, 48, 192, 8))


def test_an_array_that_claims_more_than_its_file_is_refused(tmp_path: Path) -> None:
    folder = drive_files.comma2k19(tmp_path / "in", 1, 1, 8)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40, 3)})
    poses = next(folder.rglob("frame_positions"))
    poses.write_bytes(header.getvalue() + b"\0" * 64)
    with pytest.raises(UserError, match="no clip"):
        import_dataset(folder, tmp_path / "out", lenient())
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    poses.write_bytes(objects.getvalue())
    with pytest.raises(UserError, match="no clip"):
        import_dataset(folder, tmp_path / "again", lenient())


# --- shards and the check ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x.tar"},
        {"name": "/etc/passwd"},
        {"bytes": -5},
        {"samples": [{"key": "a", "parts": {"mp4": [-512, 10]}}]},
        {"samples": [{"key": "a", "parts": {"mp4": [512, 10**15]}}]},
        {"samples": [{"key": "a", "parts": {"mp4": [512, -1]}}]},
        {"samples": [{"key": "a", "parts": [1]}]},
        {"bytes": 1e400},
    ],
)
def test_an_index_that_points_elsewhere_is_refused(change: dict[str, Any], shards: Path) -> None:
    document = json.loads((shards / INDEX_NAME).read_text())
    document["shards"][0] |= change
    (shards / INDEX_NAME).write_text(json.dumps(document))
    with pytest.raises(UserError, match="not a shard index"):
        load_index(shards)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (b'{"caption": "' + b"x" * 1_000_000 + b'"}', "1000000 characters"),
        (b'{"caption": "\xff"}', "malformed"),
        (b'{"caption": "\\ud800"}', "not UTF-8"),
        (b"[" * 200_000, "malformed"),
        (b" " * (2**24 + 1), "16777217 bytes"),
    ],
)
def test_descriptions_beyond_bounds_are_bad_clips(metadata: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        parse_metadata(metadata)


def test_the_check_reports_every_problem(make_shards: MakeShards) -> None:
    metadata = {"caption": "fine", "fps": 8, "domain": "driving"}
    bad = {
        1: {"mp4": b"junk", "json": json.dumps(metadata).encode()},
        4: {**clip_parts(4), "json": b"{"},
        9: clip_parts(9, caption=""),
        11: clip_parts(11, fps=30),
        12: clip_parts(12, controls={"actions": [1, 2]}),
        20: clip_parts(20),
    }
    folder = make_shards(bad)
    card = card_of(folder)
    (folder / "tiny-000003.tar").unlink()
    found = check_card(card)
    assert len(found) == 6
    for key, reason in (
        ("clip-001", "cannot be decoded"),
        ("clip-004", "malformed"),
        ("clip-009", "no caption"),
        ("clip-011", "its rate is 30, the card says 8"),
        ("clip-012", "its actions have 2 values"),
        ("tiny-000003.tar", "is missing"),
    ):
        assert [problem for problem in found if key in problem and reason in problem], (key, found)
    assert len(check_card(card, decode=False)) == 5
    assert any("too few frames" in problem for problem in check_card(card_of(folder, frames=FRAMES + 1)))


def test_the_helpers_read_what_they_draw() -> None:
    """So that the other tests mean something: a picture tells its episode and frame, at another size as well."""
    for episode, frame in ((0, 0), (5, 17), (9, footage_files.BAR - 1)):
        assert footage_files.read_frame(picture(episode, frame)) == (episode, frame)
        assert footage_files.read_frame(picture(episode, frame)[::2, ::2]) == (episode, frame)
