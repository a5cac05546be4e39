"""Every file of a source is taken or told of: links, hidden and unknown files, and numbers that add up."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from footage_files import encode, lenient, picture, put, put_csv, put_tar, video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyflow.data.importing import walk as walking
from anyflow.data.importing.finish import ImportReport
from anyflow.data.importing.footage import probe
from anyflow.data.importing.formats.known import detect_format
from anyflow.data.importing.recording import ImageFiles, Recording
from anyflow.data.importing.run import import_dataset
from anyflow.data.importing.walk import is_video, walk, walk_videos
from anyflow.data.shards import load_index, read_clip
from anyflow.errors import UserError, explain

FILMS = [video(number, 8, 8) for number in range(4)]


def captions_of(report: ImportReport) -> list[str]:
    folder = report.card.parent / "train"
    return [read_clip(folder, shard, sample).caption for shard, sample in load_index(folder)]


def adds_up(report: ImportReport) -> None:
    """What was found is what was taken and what was left out, recordings as well as files."""
    assert report.found == report.taken + sum(report.left_out.values())
    files = report.files
    assert files["found"] == files["footage"] + files["descriptions"] + sum(files["left_out"].values())
    assert json.loads((report.card.parent / "import.json").read_text())["files"] == files


# --- kinds of files ---------------------------------------------------------------------------------------------------

KINDS = {"gif": "gif", "ts": "libx264", "mpg": "mpeg2video", "wmv": "wmv2", "flv": "libx264", "3gp": "libx264"}


def test_every_container_is_read_by_its_suffix(tmp_path: Path) -> None:
    import av

    for number, (suffix, codec) in enumerate({**KINDS, "mp4": "libx264"}.items()):
        path = put(tmp_path / f"in/{suffix}_clip.{suffix}", b"")
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width = 48, 192
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for frame in range(24):
                image = av.VideoFrame.from_ndarray(picture(number, frame), format="rgb24")
                container.mux(stream.encode(image.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode())
        put(tmp_path / f"in/{suffix}_clip.txt", f"a clip as {suffix}")
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient(fps=16.0, default_caption=None, clips=1))
    assert sorted(captions_of(report)) == sorted(f"a clip as {suffix}" for suffix in (*KINDS, "mp4"))
    assert report.found == report.taken == 7 and report.files["left_out"] == {}


def test_typescript_is_no_video(tmp_path: Path) -> None:
    assert not is_video(put(tmp_path / "index.ts", "export const a = 1;\n"))
    assert is_video(put(tmp_path / "cut.ts", b"\x47\x40\0\x10")) and is_video(put(tmp_path / "b.MP4", b"x"))


def test_what_is_not_read_is_named_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    put(folder / "a.mp4", FILMS[0])
    for name in ("._a.mp4", ".git/x/config", "b.zip", "c.tar.gz", "notes.md", "d.wav", "weights.bin"):
        put(folder / name, b"x")
    put(folder / "e.mp4", b"")
    put(folder / "unnamed", FILMS[1])
    put(folder / "orphan.txt", "A text alone.")
    put_tar(folder / "deep/er/still/0.tar", [("x.mp4", FILMS[2])])
    os.mkfifo(folder / "pipe.mp4")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    report = import_dataset(folder, tmp_path / "out", lenient())
    adds_up(report)
    assert report.files["left_out"] == {
        "a kind that is not read (.bin)": 1,
        "a kind that is not read (.md)": 1,
        "a kind that is not read (.wav)": 1,
        "a link to nothing": 1,
        "a tar, which the format folder does not read: try --format webdataset": 1,
        "a text without a video of its name": 1,
        "a video (MP4) whose name does not end as one: rename it": 1,
        "an archive, which is not opened: unpack it": 2,
        "hidden": 2,
        "no file but a pipe, a socket or a device": 1,
    }
    assert ("._a.mp4", "hidden") in report.unread and "pipe.mp4" in dict(report.unread)
    assert report.unusable == (("e", "the file is empty"),)


def test_a_file_that_holds_what_its_name_does_not_say_is_read_and_told(tmp_path: Path) -> None:
    put(tmp_path / "in/a.mp4", video(0, 8, 8, format="matroska"))
    put(tmp_path / "in/b.mp4", FILMS[1])
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    assert report.taken == 2
    assert report.notes[0] == "read as what they are, not as their names end: a.mp4 (Matroska)"


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, data in ((b"\xff.mp4", video(0, 8, 8, format="matroska")), (b"\xfe.mp4", b"junk"), (b".\xfd", b"")):
        Path(os.fsdecode(bytes(tmp_path / "in") + b"/" + name)).write_bytes(data)
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    adds_up(report)
    assert report.notes[0] == "read as what they are, not as their names end: ?.mp4 (Matroska)"
    assert (report.unusable[0][0], report.unread) == ("?", ((".?", "hidden"),)) and report.files["footage"] == 2


def test_a_table_that_is_bad_in_part_is_a_table(tmp_path: Path) -> None:
    put(tmp_path / "in/a.mp4", FILMS[0])
    put(tmp_path / "in/metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n{')
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    assert (report.files["footage"], report.files["descriptions"], report.found) == (1, 1, 2)


def test_a_list_of_other_files_is_no_video(tmp_path: Path) -> None:
    put(tmp_path / "in/a.mp4", FILMS[0])
    put(tmp_path / "in/b.mp4", "ffconcat version 1.0\nfile a.mp4\n")
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    assert report.unusable == (("b", "it is a list of other files, not a video"),)


@pytest.mark.parametrize("name", ["a#b%20c?.mp4", "50%d.mp4", "q*[1] ü.mp4", "c:d.mp4", "-x.mp4", "ü" * 120 + ".mp4"])
def test_any_name_is_read(name: str, tmp_path: Path) -> None:
    put(tmp_path / "in" / name, FILMS[0])
    put(tmp_path / "in" / f"{name[:-4]}.txt", "Its caption.")
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient(default_caption=None))
    assert captions_of(report) == ["Its caption."] * 2


def test_a_pictures_name_is_no_pattern_of_others(tmp_path: Path) -> None:
    from PIL import Image

    for name, height in (("p%d.png", 10), ("p1.png", 20)):
        Image.new("RGB", (32, height)).save(tmp_path / name)
    path = str(tmp_path / "p%d.png")
    assert probe(Recording("a", "a", ImageFiles((path, path), (0.0, 1.0)))).height == 10


def test_a_folder_without_footage_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip", "c.wav", "README"):
        put(tmp_path / "in" / name, b"x")
    held = r"it holds 2 \.zip, 1 without a suffix, 1 \.wav \(archives are not opened: unpack them\)\. Looked for"
    with pytest.raises(UserError, match=held):
        detect_format(tmp_path / "in")


def test_a_long_name_of_a_data_set(tmp_path: Path) -> None:
    put(tmp_path / "in/a.mp4", FILMS[0])
    report = import_dataset(tmp_path / "in", tmp_path / ("ü" * 120), lenient())
    assert report.taken == 1 and len(captions_of(report)) == 2
    with pytest.raises(OSError, match="File name too long") as caught:
        import_dataset(tmp_path / "in", tmp_path / ("x" * 252), lenient())
    assert "a file's name would be too long" in str(explain(caught.value))


# --- links ------------------------------------------------------------------------------------------------------------


def test_linked_folders_are_followed_and_loops_are_told(tmp_path: Path) -> None:
    put(tmp_path / "in/day1/a.mp4", FILMS[0])
    put(tmp_path / "elsewhere/b.mp4", FILMS[1])
    put(tmp_path / "in/.pool/c.mp4", FILMS[2])
    links = {"day2": "../elsewhere", "again": "day1", "loop": ".", "up": "../..", "day1/back": "..", "shown": ".pool"}
    for name, target in {**links, "day2b": "../elsewhere"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "elsewhere/in").symlink_to("../in")
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    adds_up(report)
    assert report.taken == 3
    told = dict(report.unread)
    assert {name for name, why in told.items() if "holds it" in why} == {"loop", "up", "day1/back", "day2/in"}
    assert "under its own name" in told["again"] and "under another name" in told["day2b"]


def test_a_folder_of_links_alone_is_found(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/b.mp4", FILMS[1])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/day2").symlink_to("../elsewhere")
    assert detect_format(tmp_path / "in") == "folder"
    assert [path.name for path in walk_videos(tmp_path / "in")] == ["b.mp4"]


def test_a_folder_that_cannot_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "in/a.mp4", FILMS[0])
    put(tmp_path / "in/shut/b.mp4", FILMS[1])
    real = os.scandir

    def refusing(place: Any) -> Any:
        if Path(place).name == "shut":
            raise PermissionError(13, "Permission denied")
        return real(place)

    monkeypatch.setattr(os, "scandir", refusing)
    assert [(met.path.name, met.left) for met in walk(tmp_path / "in")] == [
        ("a.mp4", ""),
        ("shut", "it cannot be opened (Permission denied)"),
    ]


# --- tables and tars --------------------------------------------------------------------------------------------------


def test_videos_that_no_table_names_are_told(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"in/v{number}.mp4", FILMS[number])
    put_csv(tmp_path / "in/metadata.csv", [{"file_name": "v0.mp4", "text": "x"}])
    put(tmp_path / "in/metadata.jsonl", "{}")
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    adds_up(report)
    assert report.files["left_out"] == {"a video that no table names": 2, "metadata.csv beside it is read": 1}


def test_absolute_paths_and_parents_stay_inside(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"in/videos/v{number}.mp4", FILMS[number])
    put(tmp_path / "out.mp4", FILMS[2])
    (tmp_path / "link").symlink_to("in")
    rows = [
        {"video_path": str(tmp_path / "link/videos/v0.mp4"), "caption": "In full."},
        {"video_path": "../videos/v1.mp4", "caption": "By its parent."},
        {"video_path": str(tmp_path / "out.mp4"), "caption": "x"},
        {"video_path": "../../out.mp4", "caption": "x"},
        {"video_path": "/etc/passwd", "caption": "x"},
    ]
    put_csv(tmp_path / "in/tables/metadata.csv", rows)
    report = import_dataset(tmp_path / "link", tmp_path / "ds", lenient(default_caption=None))
    assert sorted(set(captions_of(report))) == ["By its parent.", "In full."]
    assert [why.endswith("leads out of the data set") for _, why in report.unusable] == [True] * 3


def test_one_key_twice_in_a_shard_is_refused_by_name(tmp_path: Path) -> None:
    """Texts cannot be told apart then: neither video is dropped in silence, nor takes the other's caption."""
    members = [("a.mp4", FILMS[0]), ("a.txt", b"first"), ("a.mp4", FILMS[1]), ("a.txt", b"second")]
    put_tar(tmp_path / "in/0.tar", [*members, ("b.mp4", FILMS[2]), ("b.txt", b"third")])
    with pytest.raises(UserError, match=r"2 of 3 recordings .*0.tar:a \(1 of 2\) \(the shard holds its key 2 times"):
        import_dataset(tmp_path / "in", tmp_path / "out", lenient(error_budget=0.01))
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    adds_up(report)
    assert captions_of(report) == ["third"] * 2 and len(report.unusable) == 2


def test_keys_with_dots_and_further_videos_of_a_sample(tmp_path: Path) -> None:
    members = [(f"take.0{n}.{part}", data) for n in (1, 2) for part, data in (("mp4", FILMS[n]), ("txt", b"%d" % n))]
    members += [("c.mp4", FILMS[0]), ("c.depth.mp4", FILMS[3]), ("c.TXT", b"plain"), ("c.wav", b"x")]
    put_tar(tmp_path / "in/0.tar", members)
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient(clips=1))
    adds_up(report)
    assert captions_of(report) == ["1", "2", "plain"]
    assert report.left_out == {"a further video of its sample": 1}
    assert report.unread == (
        ("0.tar:*.wav (1)", "members that are not read (.wav)"),
        ("0.tar:c.depth.mp4", "a further video of its sample, beside .mp4"),
    )


def test_an_import_lists_each_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for the files: on a network disk lists are slow."""
    for number in range(3):
        put(tmp_path / f"in/d{number}/v.mp4", FILMS[number])
    met: list[str] = []
    kind = walking._kind
    monkeypatch.setattr(walking, "_kind", lambda entry: met.append(entry.path) or kind(entry))
    import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    assert len(met) == len(set(met)) == 6
    put(tmp_path / "in/d3/v.mp4", FILMS[3])  # what comes later is seen by the next one
    assert import_dataset(tmp_path / "in", tmp_path / "out2", lenient()).found == 4


def test_what_a_mac_hides_in_a_tar_is_no_recording(tmp_path: Path) -> None:
    members = [("._a.mp4", b"\0\5\x16\7"), ("a.mp4", FILMS[0]), ("._a.txt", b"\0\5\x16\7"), ("a.txt", b"first")]
    put_tar(tmp_path / "in/0.tar", members)
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient(error_budget=0.0))
    adds_up(report)
    assert captions_of(report) == ["first"] * 2 and report.unread == (("0.tar:.* (2)", "hidden members"),)


def test_members_that_nobody_asks_for_make_no_recording(tmp_path: Path) -> None:
    """Also pickles, which are never read, and tars that hold nothing else, or nothing."""
    others = [("a.pkl", b"x"), ("p.pkl", b"x"), ("q.cls", b"1"), ("q.cls", b"2"), ("README", b"x")]
    put_tar(tmp_path / "in/0.tar", [("a.mp4", FILMS[0]), ("a.txt", b"first"), *others])
    put_tar(tmp_path / "in/1.tar", [("x.npz", b"x")])
    put_tar(tmp_path / "in/2.tar", [])
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient(error_budget=0.0))
    adds_up(report)
    assert captions_of(report) == ["first"] * 2 and not report.unusable
    assert report.unread == (
        ("1.tar", "a tar without a member that is read"),
        ("2.tar", "a tar without members"),
        ("0.tar:*. (1)", "members that are not read (.)"),
        ("0.tar:*.cls (2)", "members that are not read (.cls)"),
        ("0.tar:*.pkl (2)", "members that are not read (.pkl)"),
        ("1.tar:*.npz (1)", "members that are not read (.npz)"),
    )


def test_tars_deeper_down_and_loose_videos_beside_tars(tmp_path: Path) -> None:
    put_tar(tmp_path / "deep/a/b/c/0.TAR", [("x.mp4", FILMS[0])])
    assert detect_format(tmp_path / "deep") == "webdataset"
    assert import_dataset(tmp_path / "deep", tmp_path / "out", lenient()).taken == 1
    put_tar(tmp_path / "both/0.tar", [("x.mp4", FILMS[0])])
    put(tmp_path / "both/loose.mp4", FILMS[1])
    report = import_dataset(tmp_path / "both", tmp_path / "out2", lenient())
    assert report.unread == (("loose.mp4", "a video that the format webdataset does not read"),)


def test_videos_of_one_stem_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path / "in/a.mp4", FILMS[0])
    put(tmp_path / "in/a.mkv", video(1, 8, 8, format="matroska"))
    put(tmp_path / "in/a.mkv.txt", "Matroska.")
    put(tmp_path / "in/a.mp4.txt", "MP4.")
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient(clips=1))
    assert sorted(captions_of(report)) == ["MP4.", "Matroska."] and report.left_out == {}


def test_recordings_that_are_not_asked_for_are_counted(tmp_path: Path) -> None:
    from footage_files import lerobot_v2

    report = import_dataset(lerobot_v2(tmp_path / "in", 2, 8), tmp_path / "out", lenient(cameras=("top",)))
    adds_up(report)
    assert (report.found, report.taken, report.left_out) == (4, 2, {"another camera (wrist)": 2})
    assert [why for _, why in report.unread] == ["another camera (wrist)"] * 2
    limited = import_dataset(tmp_path / "in", tmp_path / "less", lenient(limit=1))
    assert limited.taken == limited.found == 1 and "--limit 1" in limited.notes[0]


# --- the law ----------------------------------------------------------------------------------------------------------

ENTRIES = {
    "film": lambda place, n: put(place / f"v{n}.mp4", FILMS[n % 4]),
    "told film": lambda place, n: (put(place / f"t{n}.MOV", FILMS[n % 4]), put(place / f"t{n}.txt", "A film.")),
    "short": lambda place, n: put(place / f"s{n}.mp4", SHORT),
    "still": lambda place, n: put(place / f"p{n}.mp4", STILL),
    "broken": lambda place, n: put(place / f"x{n}.mp4", b"junk"),
    "empty": lambda place, n: put(place / f"e{n}.avi", b""),
    "latin-1": lambda place, n: (put(place / f"l{n}.mp4", FILMS[n % 4]), put(place / f"l{n}.txt", b"caf\xe9")),
    "orphan": lambda place, n: put(place / f"o{n}.caption", "Alone."),
    "hidden": lambda place, n: put(place / f".h{n}.mp4", FILMS[0]),
    "archive": lambda place, n: put(place / f"z{n}.zip", b"PK"),
    "other": lambda place, n: put(place / f"w{n}.xyz", b"?"),
    "text": lambda place, n: put(place / f"r{n}.md", "Read me."),
    "link": lambda place, n: (place / f"k{n}").symlink_to(place / ".."),
    "lost": lambda place, n: (place / f"q{n}.mp4").symlink_to("nowhere"),
}
SHORT, STILL = video(5, 2, 8), encode([picture(6, 0)] * 8, 8)


@given(
    entries=st.lists(
        st.tuples(st.sampled_from(sorted(ENTRIES)), st.sampled_from(["", "a", "a/b", "train"])), max_size=9
    )
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_found_is_taken_or_left_out(entries: list[tuple[str, str]], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    put(tmp_path / "in/one.mp4", FILMS[0])
    for number, (kind, place) in enumerate(entries):
        (tmp_path / "in" / place).mkdir(parents=True, exist_ok=True)
        ENTRIES[kind](tmp_path / "in" / place, number)
    report = import_dataset(tmp_path / "in", tmp_path / "out", lenient(min_motion=0.5))
    adds_up(report)
    there = [(p, name) for p, _, names in os.walk(tmp_path / "in") for name in names]
    links = [
        (p, name) for p, folders, _ in os.walk(tmp_path / "in") for name in folders if (Path(p) / name).is_symlink()
    ]
    assert report.files["found"] == len(there) + len(links)
    kinds = [kind for kind, _ in entries]
    films = [kind for kind in kinds if kind in ("film", "told film", "short", "still", "broken", "empty", "latin-1")]
    assert report.found == 1 + len(films)
    assert report.left_out.get("unusable", 0) == sum(kinds.count(kind) for kind in ("broken", "empty", "latin-1"))
    assert report.left_out.get("too short", 0) == kinds.count("short")
    assert report.left_out.get("still", 0) == kinds.count("still")
    assert report.files["left_out"].get("hidden", 0) == kinds.count("hidden")
    assert len({name for name, _ in report.unread}) == sum(report.files["left_out"].values())
