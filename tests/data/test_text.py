"""Text that people wrote: encodings, line ends, tables with odd headers, captions in several; nothing read wrongly."""

from __future__ import annotations

import ast
import io
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from footage_files import lenient, put, put_csv, put_tar, video
from hypothesis import given
from hypothesis import strategies as st

from anyflow.data.decode import DecodeError
from anyflow.data.importing.finish import ImportReport
from anyflow.data.importing.run import import_dataset
from anyflow.data.safety import decode_text, lines_of
from anyflow.data.shards import load_index, read_clip
from anyflow.data.tables import read_rows
from anyflow.errors import UserError, first_line

FILMS = [video(number, 16, 8) for number in range(4)]
ODD = "one\u2028two\u0085three\x0bfour\x1cfive"
"""Python's splitlines breaks it into five."""


def films(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names or ("v0.mp4", "v1.mp4", "v2.mp4")):
        put(folder / name, FILMS[number % 4])
    return folder


def notes_of(report: ImportReport) -> tuple[str, ...]:
    """What is told, but for the colours, which these films do not name."""
    return tuple(note for note in report.notes if not note.startswith("colours without a tag"))


def captions_of(report: ImportReport) -> dict[str, str]:
    folder = report.card.parent / "train"
    clips = [read_clip(folder, shard, sample) for shard, sample in load_index(folder)]
    return {clip.key.rpartition("-")[0]: clip.caption for clip in clips}


def imported(folder: Path, **options: Any) -> ImportReport:
    number = len(list(folder.parent.glob("out*")))
    return import_dataset(folder, folder.parent / f"out{number}", lenient(**{"default_caption": "DEFAULT", **options}))


# --- lines and encodings ----------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), min_size=1))
def test_lines_end_at_newlines_alone(lines: list[str]) -> None:
    assert lines_of("\n".join(lines) + "\n") == lines == lines_of("\r\n".join(lines) + "\r\n")


def test_nobody_splits_text_at_what_is_no_newline() -> None:
    package = Path(first_line.__code__.co_filename).parent
    for path in package.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert not [node.lineno for node in calls if node.attr == "splitlines"], path
    assert first_line(ValueError(f"{ODD}\nmore")) == ODD


def test_lists_keep_their_lines_together(tmp_path: Path) -> None:
    films(tmp_path / "in")
    put(tmp_path / "in/videos.txt", "v0.mp4\r\nv1.mp4\r\nv2.mp4\r\n")
    put(tmp_path / "in/captions.txt", f"{ODD}\nsecond\nthird\n")
    assert captions_of(imported(tmp_path / "in")) == {"v0": "one two three four five", "v1": "second", "v2": "third"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(encoding: str, tmp_path: Path) -> None:
    films(tmp_path / "in")
    put(tmp_path / "in/v0.txt", "Grüße, 你好".encode(encoding))
    put(tmp_path / "captions.csv", "file_name,caption\r\nv1,Größe\r\n".encode(encoding))
    put(tmp_path / "captions.jsonl", '{"file_name": "v1", "caption": "Größe"}\n'.encode(encoding))
    for table in ("captions.csv", "captions.jsonl"):
        found = captions_of(imported(tmp_path / "in", captions=tmp_path / table))
        assert found["v0"] == "Grüße, 你好" and found["v1"] == "Größe"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("café".encode("latin-1"), r"is not UTF-8 \(byte 3 is 0xe9; Latin-1 or Windows-1252\?\): save it as UTF-8"),
        ("A plain text.".encode("utf-16-le"), "is not UTF-8 but UTF-16 without a byte order mark"),
        ("A plain text.".encode("utf-16-be"), "is not UTF-8 but UTF-16 without a byte order mark"),
        (b"\xff\xfeA\0b", "is not UTF-8, and not the UTF-16 that it begins as"),
    ],
)
def test_a_wrong_encoding_is_named(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=f"^x.txt {reason}"):
        decode_text(data, "x.txt")
    films(tmp_path / "in")
    put(tmp_path / "in/v0.txt", data)
    report = imported(tmp_path / "in")
    assert [name for name, _ in report.unusable] == ["v0.mp4"] and report.taken == 2


@given(st.binary(max_size=60))
def test_any_bytes_are_a_text_or_refused(data: bytes) -> None:
    try:
        decode_text(data, "x").encode()
    except DecodeError as error:
        assert "not UTF-8" in str(error)


def test_nuls_and_long_lines(tmp_path: Path) -> None:
    films(tmp_path / "in")
    put(tmp_path / "in/v0.txt", "A car\0 drives.\0")
    put(tmp_path / "in/v1.txt", "x" * 4001)
    report = imported(tmp_path / "in")
    assert captions_of(report)["v0"] == "A car drives."
    assert report.unusable == (("v1", "its caption has 4001 characters, more than 4000"),)


# --- texts beside videos ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4.txt", "a.caption", "a.TXT", "a.Cap", "a.text", "a.mp4.JSON", "a.json"])
def test_a_text_beside_a_video_may_end_in_many_ways(name: str, tmp_path: Path) -> None:
    films(tmp_path / "in", "a.mp4", "a.b.mp4")
    put(tmp_path / "in" / name, {"caption": "Its own."} if name.lower().endswith("json") else "Its own.")
    put(tmp_path / "in/a.b.txt", "With a dot.")
    found = imported(tmp_path / "in", clips=1)
    assert sorted(captions_of(found).values()) == ["Its own.", "With a dot."]


def test_a_text_and_a_document_add_up(tmp_path: Path) -> None:
    films(tmp_path / "in", "a.mp4")
    put(tmp_path / "in/a.txt", "The text.")
    put(tmp_path / "in/a.json", {"caption": "The document's.", "weather": "rain"})
    assert captions_of(imported(tmp_path / "in", caption="{caption} {weather}")) == {"a": "The text. rain"}


def test_a_list_of_texts_beside_a_video_is_its_captions(tmp_path: Path) -> None:
    films(tmp_path / "in", "v0.mp4", "v1.mp4")
    put(tmp_path / "in/v0.json", ["one", "one"])
    put(tmp_path / "in/v1.json", json.dumps("two"))
    assert captions_of(imported(tmp_path / "in")) == {"v0": "one", "v1": "two"}
    members = [("a.mp4", FILMS[0]), ("a.json", b'["one"]'), ("b.mp4", FILMS[1]), ("b.json", b"[1]")]
    put_tar(tmp_path / "tars/0.tar", members)
    report = imported(tmp_path / "tars")
    assert set(captions_of(report).values()) == {"one"}
    assert report.unusable == (("0.tar:b", "its json member holds no JSON object, and no list of texts"),)


def test_captions_beside_a_video_that_differ_are_told(tmp_path: Path) -> None:
    films(tmp_path / "in", "v0.mp4", "v1.mp4")
    for number, other in enumerate(("Other.", " The  text. ")):
        put(tmp_path / f"in/v{number}.txt", "The text.")
        put(tmp_path / f"in/v{number}.json", {"caption": other})
    report = imported(tmp_path / "in")
    assert captions_of(report) == {"v0": "The text.", "v1": "The text."}
    assert notes_of(report) == (
        "captions beside a video that differ in .txt and .json: that of .txt was taken (1: v0)",
    )
    put_tar(tmp_path / "tars/0.tar", [("a.mp4", FILMS[0]), ("a.json", b'{"caption": "Other."}'), ("a.txt", b"Text.")])
    assert "that of .txt was taken (1: 0/a)" in str(notes_of(imported(tmp_path / "tars")))


def test_one_of_several_captions_is_drawn_for_each_clip(tmp_path: Path) -> None:
    """By the clip's own name and the seed: the same whatever else is imported, and all of them are used."""
    texts = ["First.", "Second.", " ", "First.", "Third."]
    films(tmp_path / "in", "a.mp4")
    put(tmp_path / "in/a.json", {"caption": texts})
    many = {"frames": 2, "stride": 0.125, "scene_cuts": 0.0, "keep_duplicates": True}
    reports = [imported(tmp_path / "in", seed=seed, **many) for seed in (0, 0, 1)]
    drawn = []
    for report in reports:
        folder = report.card.parent / "train"
        drawn.append({clip.key: clip.caption for clip in (read_clip(folder, *found) for found in load_index(folder))})
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0].values()) == {"First.", "Second.", "Third."}
    films(tmp_path / "in", "a.mp4", "b.mp4")
    folder = imported(tmp_path / "in", seed=0, **many).card.parent / "train"
    more = {clip.key: clip.caption for clip in (read_clip(folder, *found) for found in load_index(folder))}
    assert {key: more[key] for key in drawn[0]} == drawn[0]
    assert notes_of(reports[0]) == ("recordings with several captions, of which each clip takes one by --seed: 1",)


def test_a_text_of_several_lines_is_one_caption_and_told(tmp_path: Path) -> None:
    films(tmp_path / "in", "a.mp4")
    put(tmp_path / "in/a.txt", "A car\nin the rain.\n")
    report = imported(tmp_path / "in")
    assert set(captions_of(report).values()) == {"A car in the rain."}
    assert notes_of(report) == ("texts of several lines, each taken as one caption (a list in JSON is several): 1",)


def test_rows_of_one_video_are_its_captions(tmp_path: Path) -> None:
    films(tmp_path / "in", "a.mp4", "b.mp4")
    rows = [{"file_name": name, "text": text} for name, text in (("a.mp4", "One."), ("b.mp4", "B."), ("a.mp4", "Two."))]
    put_csv(tmp_path / "in/metadata.csv", rows)
    report = imported(tmp_path / "in", frames=2, scene_cuts=0.0, keep_duplicates=True)
    folder = report.card.parent / "train"
    found = Counter(read_clip(folder, shard, sample).caption for shard, sample in load_index(folder))
    assert set(found) == {"One.", "Two.", "B."} and report.unusable == () and report.found == 2


def test_captions_that_are_read_in_part_are_told(tmp_path: Path) -> None:
    films(tmp_path / "in", "a.mp4", "b.mp4")
    put(tmp_path / "in/a.txt", "car " * 512)
    put(tmp_path / "in/b.txt", "car " * 511)
    (note,) = notes_of(imported(tmp_path / "in"))
    assert note == "recordings with captions of 512 words or more, of which Wan reads the beginning: 1"


def test_a_prompt_that_is_cut_is_told(small_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    from anyflow.backbone.codec import MAX_TEXT_TOKENS, Codec

    codec = Codec.from_folder(small_model)
    assert len(codec.embed("x" * 400)) < MAX_TEXT_TOKENS and not caplog.records
    for number in range(12):
        assert len(codec.embed(f"{number} " * 600)) == MAX_TEXT_TOKENS
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "512 tokens that are read of one: 1 so far" in told[0] and "10 so far" in told[1]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_names_with_dots_and_rows_that_match_nothing(tmp_path: Path) -> None:
    films(tmp_path / "in", "take.01.mp4", "take.02.mp4", "x.mp4", "sub/x.mov")
    put(tmp_path / "in/sub/x.mov", video(3, 16, 8, format="mov"))
    films(tmp_path / "in", "a/y.mp4", "b/y.mp4")
    table = "file_name,caption\ntake.01,First\ntake.02.mp4,Second\nx,Third\nno_such,Fourth\nnone.mp4,\ny,Fifth\n"
    put(tmp_path / "captions.csv", table)
    report = imported(tmp_path / "in", captions=tmp_path / "captions.csv", clips=1, keep_duplicates=True)
    assert sorted(captions_of(report).values()) == ["", "Fifth", "Fifth", "First", "Second", "Third"]
    assert notes_of(report) == (
        "--captions captions.csv: rows that name no recording: 1 (no_such)",
        "--captions captions.csv: rows that stand for several recordings each: 1 (y)",
        "--captions captions.csv: rows without a caption: 1 (line 6)",
    )


@pytest.mark.parametrize(
    ("row", "captions"),
    [
        ("{home}/v1.mp4", {"v1": "Mine", "sub_v1": "", "more_v1": ""}),
        ("./v1.mp4", {"v1": "Mine", "sub_v1": "", "more_v1": ""}),
        ("v1.mp4", {"v1": "Mine", "sub_v1": "", "more_v1": ""}),
        ("v1", {"v1": "Mine", "sub_v1": "", "more_v1": ""}),
        ("sub/v1", {"v1": "", "sub_v1": "Mine", "more_v1": ""}),
        ("{home}/elsewhere/v1.mp4", {"v1": "", "sub_v1": "", "more_v1": ""}),
    ],
)
def test_a_row_that_names_one_file_captions_no_other(row: str, captions: dict[str, str], tmp_path: Path) -> None:
    home = films(tmp_path / "in", "v1.mp4", "sub/v1.mp4", "more/v1.mp4")
    put(tmp_path / "c.csv", f"file_name,caption\n{row.replace('{home}', str(home))},Mine\n")
    report = imported(home, captions=tmp_path / "c.csv", clips=1)
    assert {re.sub(r"-\w{8}$", "", key): text for key, text in captions_of(report).items()} == captions


def test_of_two_files_of_one_name_each_has_the_row_of_its_suffix(tmp_path: Path) -> None:
    """Only one of the two that the table names is there: it has its own row, not the first of its stem."""
    films(tmp_path / "in", "v.mp4")
    put(tmp_path / "c.csv", "file_name,caption\nv.mkv,Other\nv.mp4,Mine\n")
    assert set(captions_of(imported(tmp_path / "in", captions=tmp_path / "c.csv")).values()) == {"Mine"}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_may_be_one_character_or_two(forms: tuple[str, str], tmp_path: Path) -> None:
    disk, table = (unicodedata.normalize(form, "caf\u00e9") for form in forms)
    films(tmp_path / "in", f"{disk}.mp4")
    put(tmp_path / "c.csv", f"file_name,caption\n{table}.mp4,Coffee\n")
    assert set(captions_of(imported(tmp_path / "in", captions=tmp_path / "c.csv")).values()) == {"Coffee"}


def test_captions_that_name_nothing_are_told_where_the_import_stops(tmp_path: Path) -> None:
    films(tmp_path / "in", "v0.mp4", "v1.mp4")
    put(tmp_path / "c.csv", "file_name,caption\nclip-a,A\nclip-b,B\n")
    with pytest.raises(
        UserError, match=r"v0 \(no caption, nor a row of c\.csv\).*name no recording: 2 \(clip-a, clip-b"
    ):
        imported(tmp_path / "in", captions=tmp_path / "c.csv", default_caption=None, error_budget=0.0)


@pytest.mark.parametrize("name", ["c.csv", "in/metadata.csv"])
def test_a_table_in_latin_1_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    films(tmp_path / "in", "v0.mp4", "v1.mp4")
    path = put(tmp_path / name, "file_name,caption\nv0.mp4,Plain\nv1.mp4,Caf\u00e9\n".encode("latin-1"))
    given = {} if "/" in name else {"captions": path}
    with pytest.raises(UserError, match=r"(c|metadata)\.csv:3 is not UTF-8 in its caption \(Latin-1"):
        imported(tmp_path / "in", error_budget=0.0, **given)


@pytest.mark.parametrize(
    "table",
    [
        "File Name ; CAPTION\nv0.mp4;A car, fast\n",
        "Filename\tText\nv0\tA car, fast\n",
        'video_path, prompt\n./v0.mp4, "A car, fast"\n',
        'caption,PATH,caption\n"A car, fast",{home}/v0.mp4,again\n',
        "\n\nVideo_ID|Sentence\n\nv0|A car, fast\n\n",
    ],
)
def test_odd_headers_are_understood(table: str, tmp_path: Path) -> None:
    films(tmp_path / "in")
    put(tmp_path / "c.csv", table.replace("{home}", str(tmp_path / "in")))
    report = imported(tmp_path / "in", captions=tmp_path / "c.csv")
    assert captions_of(report)["v0"] == "A car, fast" and notes_of(report) == ()


def test_captions_in_parquet_and_json(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    films(tmp_path / "in")
    rows = {"video": ["v0.mp4", "v1.mp4"], "Caption": [["A car."], ["Rain."]], "frames": [b"\0", b"\1"]}
    parquet.write_table(arrow.table(rows), tmp_path / "c.parquet")
    put(tmp_path / "c.json", {"v0.mp4": ["A car."], "v1": "Rain."})
    for name in ("c.parquet", "c.json"):
        found = captions_of(imported(tmp_path / "in", captions=tmp_path / name))
        assert found == {"v0": "A car.", "v1": "Rain.", "v2": ""}


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("c.csv", "a,b\nx,y\n", r"c.csv:2 has no file_name \(its columns: a, b\)"),
        ("c.csv", "file_name,words\nv0,y\n", r"has no row with a caption \(its columns: file_name, words\)"),
        ("c.csv", "file_name,caption\nv0,A car, fast\n", "c.csv:2 has 3 cells under 2 columns: put texts with a comma"),
        ("c.jsonl", "[1]\n", "c.jsonl:1 is no JSON object"),
        ("c.parquet", "junk", "c.parquet is no parquet table"),
        ("c.csv", "", "has no row with a caption"),
        ("c.txt", "v0 a car\n", r"c\.txt:1 is not JSON .*; give a table: \.csv, \.tsv, \.jsonl, \.json, \.parquet"),
    ],
)
def test_a_captions_file_that_cannot_be_used_is_one_sentence(
    name: str, table: str, message: str, tmp_path: Path
) -> None:
    films(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "in", captions=put(tmp_path / name, table))


def test_an_open_quotation_mark_does_not_swallow_the_rows_after_it(tmp_path: Path) -> None:
    films(tmp_path / "in")
    put(tmp_path / "in/metadata.csv", 'file_name,text\nv0.mp4,"A car\nv1.mp4,Rain\nv2.mp4,"Two\nlines, quoted"\n')
    report = imported(tmp_path / "in")
    assert captions_of(report) == {"v1": "Rain", "v2": "Two lines, quoted"}
    assert report.unusable[0][0] == "metadata.csv:2" and "quotation mark that is not closed" in report.unusable[0][1]


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)


@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=8))
def test_tables_come_back_as_they_were_written(rows: list[tuple[str, str]], tmp_path_factory: Any) -> None:
    import csv

    path = tmp_path_factory.mktemp("table") / "t.csv"
    sink = io.StringIO(newline="")
    csv.writer(sink, quoting=csv.QUOTE_ALL).writerows([("file_name", "caption"), *rows])
    path.write_bytes(sink.getvalue().encode())
    expected = [{"file_name": a, "caption": b} for a, b in rows if a.strip() or b.strip()]
    assert [row for _, row in read_rows(path)] == expected
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in expected), encoding="utf-8")
    assert [row for _, row in read_rows(lines)] == expected


@given(data=st.binary(max_size=200), kind=st.sampled_from(["csv", "jsonl", "json", "tsv"]))
def test_any_bytes_are_rows_or_refused(data: bytes, kind: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("table") / f"t.{kind}"
    path.write_bytes(data)
    try:
        assert all(isinstance(row, dict | DecodeError) and number > 0 for number, row in read_rows(path))
    except DecodeError as error:
        assert str(error)


def test_a_shards_captions(tmp_path: Path) -> None:
    members = [("a.mp4", FILMS[0]), ("a.txt", b"caf\xe9"), ("b.mp4", FILMS[1]), ("b.json", b'{"Caption": ["B."]}')]
    put_tar(tmp_path / "in/0.tar", [*members, ("c.mp4", FILMS[2]), ("c.txt", "Grüße".encode("utf-16"))])
    report = imported(tmp_path / "in")
    assert sorted(captions_of(report).values()) == ["B.", "Grüße"]
    assert report.unusable[0][0] == "0.tar:a" and "its caption is not UTF-8 (byte 3 is 0xe9" in report.unusable[0][1]
