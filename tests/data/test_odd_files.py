"""Odd files: what they hold besides, where they begin, what is damaged in them; nothing passed over in silence."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from footage_files import encode, lenient, picture, put, put_tar, video
from test_odd_footage import clips_of, film, imported, numbers

from anyflow.data.importing import run
from anyflow.data.importing.run import import_dataset
from anyflow.errors import UserError


def films_in_one(first: int, second: int) -> bytes:
    """A file of two video streams, of 24 pictures of two episodes."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        streams = []
        for _ in range(2):
            stream = output.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = 48, 192, "yuv420p"
            streams.append(stream)
        for number in range(24):
            for stream, episode in zip(streams, (first, second), strict=True):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(episode, number), format="rgb24")))
        for stream in streams:
            output.mux(stream.encode())
    return file.getvalue()


def test_a_second_video_stream_is_told(tmp_path: Path) -> None:
    put(tmp_path / "in/two.mkv", films_in_one(0, 5))
    put(tmp_path / "in/one.mp4", video(3, 24, 8))
    report = imported(tmp_path / "in", tmp_path / "out")
    assert "further video streams in the file: the first one was taken (1: two)" in report.notes
    assert len(clips_of(report)) == 12


@pytest.mark.parametrize("container", ["matroska", "nut", "mpegts", "mp4"])
def test_a_late_beginning_is_no_missing_end(container: str, tmp_path: Path) -> None:
    """All 24 pictures are there; their stamps begin at 5 s."""
    put(tmp_path / "in/v.mkv", film([5000 + 125 * number for number in range(24)], container=container))
    report = imported(tmp_path / "in", tmp_path / "out")
    assert [numbers(clip)[0] for clip in clips_of(report).values()] == [0, 4, 8, 12, 16, 20]
    assert not any("truncated" in note for note in report.notes)


def test_damage_in_the_middle_keeps_the_clips_before_it_whatever_the_budget(tmp_path: Path) -> None:
    """It is taken, and told: it stands in one column alone."""
    data = encode([picture(0, t) for t in range(40)], 8, format="matroska", gop=4)
    middle = len(data) * 2 // 3
    put(tmp_path / "in/v.mkv", data[:middle] + bytes(np.random.default_rng(0).bytes(len(data) - middle)))
    report = imported(tmp_path / "in", tmp_path / "out", error_budget=0.0)
    assert 3 <= len(clips_of(report)) < 10
    assert (report.found, report.taken, report.left_out, report.unusable) == (1, 1, {}, ())
    assert any("broken off after clips that were taken" in n or "truncated" in n for n in report.notes), report.notes


def test_an_import_that_stops_names_all_whose_headers_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the first job alone: they are mended in one go."""
    monkeypatch.setattr(run, "CLIPS_PER_JOB", 1)
    for number in range(8):
        put(tmp_path / f"in/v{number}.mp4", video(number, 8, 8))
    for number in (1, 4, 6):
        put(tmp_path / f"in/v{number}.mp4", b"no video at all" * 40)
    with pytest.raises(UserError, match=r"3 of 8 recordings cannot be used.* v1 \(.*; v4 \(.*; v6 \("):
        import_dataset(tmp_path / "in", tmp_path / "out", lenient(error_budget=0.0, frames=4, size=(192, 48)))


def test_a_small_picture_that_is_enlarged_is_told(tmp_path: Path) -> None:
    put(tmp_path / "in/a.mp4", encode([picture(0, t)[:16, :18] for t in range(8)], 8))
    put(tmp_path / "in/b.mp4", video(3, 8, 8))
    report = imported(tmp_path / "in", tmp_path / "out", size=(192, 48))
    assert "pictures lower or narrower than the clips: enlarged (1: a)" in report.notes


def test_an_empty_tar_among_good_ones_is_called_one(tmp_path: Path) -> None:
    put_tar(tmp_path / "in/0.tar", [("a.mp4", video(0, 8, 8)), ("a.txt", b"A.")])
    put_tar(tmp_path / "in/1.tar", [])
    put_tar(tmp_path / "in/2.tar", [("._a.mp4", b"x")])
    report = imported(tmp_path / "in", tmp_path / "out")
    assert report.files["left_out"] == {"a tar without members": 1, "a tar without a member that is read": 1}
    assert not any("try --format webdataset" in reason for _, reason in report.unread)


def test_only_what_is_read_counts_as_beside_the_footage(tmp_path: Path) -> None:
    put(tmp_path / "in/v.mp4", video(0, 8, 8))
    put(tmp_path / "in/v.txt", "A.")
    for name in ("README.md", "sub/notes.md", "page.html", "setup.yaml"):
        put(tmp_path / "in" / name, "words")
    report = imported(tmp_path / "in", tmp_path / "out")
    assert report.files["descriptions"] == 2  # v.txt, and the README, which may state a licence
    assert set(report.files["left_out"]) == {f"a kind that is not read ({kind})" for kind in (".md", ".html", ".yaml")}
