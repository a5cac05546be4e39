"""The import itself: cuts, captions, budgets, the same bytes for the same input, and going on after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drive_files import scenes, vpt
from footage_files import encode, lerobot_v2, picture, put, put_csv, read_frame, video
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from anyflow.data.card import check_shards, load_card
from anyflow.data.clip import Clip
from anyflow.data.decode import ClipShape, decode_clip
from anyflow.data.importing import finish as import_finish
from anyflow.data.importing import run as importing
from anyflow.data.importing.cutting import CutReport, Cutting, cut, find_duplicates
from anyflow.data.importing.finish import ImportReport
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import Recording, VideoFile
from anyflow.data.importing.run import Progress, import_dataset
from anyflow.data.shards import load_index, read_clip
from anyflow.errors import UserError

DEFAULT = "Footage."


def small(**options: Any) -> ImportOptions:
    return ImportOptions(**{"frames": 8, "workers": 0, "heldout": 0.0, "default_caption": DEFAULT, **options})


def films(folder: Path, count: int = 3, frames: int = 16) -> Path:
    for number in range(count):
        put(folder / f"v{number}.mp4", video(number, frames, 8))
    return folder


def clips_of(report: ImportReport) -> list[Clip]:
    folder = report.card.parent / "train"
    return [read_clip(folder, shard, sample) for shard, sample in load_index(folder)]


def shards_of(folder: Path) -> dict[str, bytes]:
    """All files but the card, which names its folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.name != "card.yaml"
    }


def first_frames(report: ImportReport) -> list[int]:
    starts = []
    for clip in clips_of(report):
        assert clip.mp4 is not None
        starts.append(read_frame(decode_clip(clip.mp4, ClipShape(1, 48, 192))[0])[1])
    return starts


# --- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({}, [0, 8, 16, 24, 32]),
        ({"stride": 0.5}, list(range(0, 33, 4))),
        ({"stride": 2.0}, [0, 16, 32]),
        ({"clips": 2}, [0, 8]),
        ({"fps": 4}, [0, 16]),
    ],
)
def test_clips_begin_where_the_stride_says(options: Any, starts: list[int], tmp_path: Path) -> None:
    report = import_dataset(films(tmp_path / "in", 1, 40), tmp_path / "out", small(scene_cuts=0.0, **options))
    assert first_frames(report) == starts


def test_clips_do_not_cross_scene_cuts(tmp_path: Path) -> None:
    """Shots of 20, 6 and 17 frames give 2, 0 and 2 clips of 8; without cuts they give 5."""
    put(tmp_path / "in/film.mp4", scenes([20, 6, 17]))
    report = import_dataset(tmp_path / "in", tmp_path / "out", small())
    assert report.clips == {"train": 4} and report.scenes == 2
    report = import_dataset(tmp_path / "in", tmp_path / "all", small(scene_cuts=0.0))
    assert report.clips == {"train": 5} and report.scenes == 0


def test_fast_motion_is_no_cut(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    backdrop = generator.integers(0, 255, (6, 24, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    put(tmp_path / "in/film.mp4", encode([np.roll(backdrop, 24 * t, axis=1) for t in range(24)], 8))
    report = import_dataset(tmp_path / "in", tmp_path / "out", small(keep_duplicates=True))
    assert report.clips == {"train": 3} and report.scenes == 0


def test_still_clips_are_left_out(tmp_path: Path) -> None:
    put(tmp_path / "in/still.mp4", encode([picture(0, 0)] * 16, 8))
    put(tmp_path / "in/moving.mp4", video(1, 16, 8))
    report = import_dataset(tmp_path / "in", tmp_path / "out", small(min_motion=0.5))
    assert report.clips == {"train": 2} and report.dropped == {"still": 2}


def test_duplicates_leave_the_training_split_first(tmp_path: Path) -> None:
    """The same footage under two names, once recompressed: one copy stays, and the held-out one if there is any."""
    films(tmp_path / "in", 6, 8)
    put(tmp_path / "in/copy.mp4", encode([picture(0, t) for t in range(8)], 8, gop=3))
    report = import_dataset(tmp_path / "in", tmp_path / "out", small())
    assert report.clips == {"train": 6} and report.dropped == {"duplicate": 1}
    assert check_shards(report.card) == []
    kept = import_dataset(tmp_path / "in", tmp_path / "kept", small(keep_duplicates=True))
    assert kept.clips == {"train": 7}
    for seed in range(4):
        out = tmp_path / f"split{seed}"
        report = import_dataset(tmp_path / "in", out, small(heldout=0.5, seed=seed))
        assert report.clips["heldout"] == 4 or report.dropped == {"duplicate": 1}
        assert sum(report.clips.values()) == 6


@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 24), st.just(12)), elements=st.integers(0, 30)))
def test_duplicates_are_those_of_the_plain_definition(prints: np.ndarray) -> None:
    """Against all pairs: same if no cell differs by more than 6 levels and the means by more than 1."""
    sums = prints.sum(axis=1, dtype=int)
    kept: list[int] = []
    repeats = []
    for clip in range(len(prints)):
        same = [
            earlier
            for earlier in kept
            if abs(sums[earlier] - sums[clip]) <= prints.shape[1]
            and np.abs(prints[earlier].astype(int) - prints[clip].astype(int)).max() <= 6
        ]
        if same:
            repeats.append((clip, same[0]))
        else:
            kept.append(clip)
    assert find_duplicates(prints) == repeats


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 40))
def test_the_expected_number_of_clips_is_the_number_of_places(frames: int, stride: int, length: int) -> None:
    cutting = Cutting(frames, 8.0, 2, 2, stride)
    assert cutting.expected(length / 8) == len(range(0, length - frames + 1, stride))


def test_footage_is_cropped_never_stretched(tmp_path: Path) -> None:
    report = import_dataset(films(tmp_path / "in", 1), tmp_path / "out", small(size=(48, 48)))
    clip = clips_of(report)[0]
    assert clip.mp4 is not None and load_card(report.card).width == 48
    image = decode_clip(clip.mp4, ClipShape(8, 48, 48))[0]
    assert image.std() < 3  # of 192 columns the middle 48 are left: the bar of the first frames lies outside


def test_damage_keeps_the_clips_before_it(tmp_path: Path) -> None:
    data = bytearray(video(0, 40, 8, format="matroska"))
    data[len(data) * 3 // 4 :] = os.urandom(len(data) - len(data) * 3 // 4)
    put(tmp_path / "in/v.mkv", bytes(data))
    recording = Recording("v", "v", VideoFile(str(tmp_path / "in/v.mkv")))
    made = []
    cutting = Cutting(8, 8.0, 48, 192, 8, cut_threshold=0.0)
    try:
        for clip in cut(recording, cutting, "test", "", {}, CutReport()):
            made.append(clip)
    except Exception as error:
        assert type(error).__name__ == "DecodeError"
    assert 1 <= len(made) < 5


# --- captions ---------------------------------------------------------------------------------------------------------


def test_captions_from_a_file_win_over_all_else(tmp_path: Path) -> None:
    films(tmp_path / "in", 3, 8)
    put(tmp_path / "in/v0.txt", "The source's own.")
    put_csv(tmp_path / "captions.csv", [{"file": "v1.mp4", "caption": "The file's."}])
    asked = small(caption="A film: {caption}", captions=tmp_path / "captions.csv", default_caption="The default.")
    report = import_dataset(tmp_path / "in", tmp_path / "out", asked)
    # A clip without a caption is stored without: the card's default stands in for it.
    assert [clip.caption for clip in clips_of(report)] == ["A film: The source's own.", "The file's.", ""]
    assert load_card(report.card).caption == "The default."


def test_recordings_without_a_caption_are_refused_unless_there_is_a_default(tmp_path: Path) -> None:
    films(tmp_path / "in", 2, 8)
    put(tmp_path / "in/v0.txt", "A film.")
    with pytest.raises(UserError, match=r"1 of 2 recordings cannot be used.*v1 \(no caption\).*raise the budget"):
        import_dataset(tmp_path / "in", tmp_path / "out", small(default_caption=None))
    report = import_dataset(tmp_path / "in", tmp_path / "out", small(default_caption=None, error_budget=0.5))
    assert report.clips == {"train": 1} and report.unusable == (("v1", "no caption"),)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{task", "expected '}'"),
        ("{task.__class__}", "is no field's name"),
        ("{0}", "is no field's name"),
        ("{colour}", r"no field 'colour' for its caption \(it has camera, caption, robot, task\)"),
    ],
)
def test_a_template_is_checked(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_dataset(
            lerobot_v2(tmp_path / "in", 2, 8), tmp_path / "out", small(caption=template, default_caption=None)
        )


# --- budgets, splits, options -----------------------------------------------------------------------------------------


def test_bad_files_are_counted_named_and_skipped_within_the_budget(tmp_path: Path) -> None:
    films(tmp_path / "in", 8, 8)
    put(tmp_path / "in/v2.mp4", b"not a video")
    put(tmp_path / "in/v5.mp4", video(5, 8, 8)[:300])
    with pytest.raises(
        UserError, match=r"2 of 8 recordings cannot be used, more than --error-budget 0.1 allows: v2 \("
    ):
        import_dataset(tmp_path / "in", tmp_path / "out", small(error_budget=0.1))
    assert not (tmp_path / "out").exists()
    named = json.loads((tmp_path / ".out.import/import.json").read_text())["unusable"]
    assert [name for name, _ in named] == ["v2", "v5"]
    report = import_dataset(tmp_path / "in", tmp_path / "out", small(error_budget=0.25))  # goes on
    assert report.clips == {"train": 6} and [name for name, _ in report.unusable] == ["v2", "v5"]
    assert json.loads((tmp_path / "out/import.json").read_text())["unusable"] == named
    assert not (tmp_path / ".out.import").exists()


def test_groups_are_held_out_whole(tmp_path: Path) -> None:
    folder = films(tmp_path / "in", 6, 8)
    put_csv(folder / "metadata.csv", [{"file_name": f"v{n}.mp4", "text": "x", "ride": n // 2} for n in range(6)])
    report = import_dataset(folder, tmp_path / "out", small(heldout=0.3, group_by="ride"))
    card = load_card(report.card)
    rides = {
        split: {str(read_clip(place, *found).attributes["ride"]) for found in load_index(place)}
        for split, place in card.splits.items()
    }
    assert len(rides["heldout"]) == 1 and not rides["heldout"] & rides["train"]
    put_csv(folder / "metadata.csv", [{"file_name": f"v{n}.mp4", "text": "x", "ride": 1} for n in range(6)])
    with pytest.raises(UserError, match="all recordings are of one group"):
        import_dataset(folder, tmp_path / "again", small(heldout=0.3, group_by="ride"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout": 1.0}, "--heldout 1: give a share"),
        ({"error_budget": -1.0}, "--error-budget -1"),
        ({"size": (47, 48)}, "--size 47x48: H.264 needs an even"),
        ({"cameras": ("left",)}, "--cameras left: the source has"),
        ({"frames": 99}, r"no clip of 99 frames came out for the split 'train' \(left out: 2 too short\)"),
        ({"fps": -1.0}, "--fps -1: give more than 0"),
        ({"default_caption": "domain", "domain": "opera"}, "'opera' has none, only driving"),
    ],
)
def test_options_are_checked(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_dataset(films(tmp_path / "in", 2, 8), tmp_path / "out", small(**options))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.import").exists() == ("frames" in options)  # only work that was done is kept


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path / "out/mine.txt", "mine")
    with pytest.raises(UserError, match="is in use"):
        import_dataset(films(tmp_path / "in", 2, 8), tmp_path / "out", small())
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


# --- the same bytes, and going on -------------------------------------------------------------------------------------


@pytest.fixture
def one_recording_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "CLIPS_PER_JOB", 1)


@pytest.mark.usefixtures("one_recording_a_job")
def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    films(tmp_path / "in", 4)
    put(tmp_path / "in/v1.mp4", b"broken")
    put(tmp_path / "in/copy.mp4", encode([picture(2, t) for t in range(16)], 8, gop=3))
    told: list[Progress] = []
    options = {"error_budget": 0.5, "heldout": 0.3}
    for workers in (0, 2):
        report = import_dataset(
            tmp_path / "in", tmp_path / f"w{workers}/out", small(workers=workers, **options), told.append
        )
    assert shards_of(tmp_path / "w0/out") == shards_of(tmp_path / "w2/out")
    assert report.dropped == {"duplicate": 2} and len(report.unusable) == 1
    assert [entry.recordings for entry in told[:5]] == [1, 2, 3, 4, 5] and told[-1].seconds_left == 0


@pytest.mark.usefixtures("one_recording_a_job")
@pytest.mark.parametrize("broken", ["_write_split", "_write_card", "write_report"])
def test_the_end_can_be_broken_off_anywhere(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    films(tmp_path / "in", 4)
    put(tmp_path / "in/copy.mp4", encode([picture(2, t) for t in range(16)], 8, gop=3))
    import_dataset(tmp_path / "in", tmp_path / "whole/out", small(heldout=0.3))
    real = getattr(import_finish, broken)
    calls = iter(range(10))

    def stop(*words: Any, **named: Any) -> Any:
        if broken == "_write_split" and next(calls) == 0:
            return real(*words, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(import_finish, broken, stop)
        with pytest.raises(KeyboardInterrupt):
            import_dataset(tmp_path / "in", tmp_path / "cut/out", small(heldout=0.3))
    assert not (tmp_path / "cut/out").exists()
    with monkeypatch.context() as patched:  # every job is taken over
        patched.setattr(importing, "run_job", None)
        import_dataset(tmp_path / "in", tmp_path / "cut/out", small(heldout=0.3))
    assert shards_of(tmp_path / "whole/out") == shards_of(tmp_path / "cut/out")


@pytest.mark.usefixtures("one_recording_a_job")
def test_what_has_changed_is_done_again(tmp_path: Path) -> None:
    films(tmp_path / "in", 3)
    put(tmp_path / "in/v1.mp4", b"broken")
    with pytest.raises(UserError, match="1 of 3"):
        import_dataset(tmp_path / "in", tmp_path / "out", small())
    put(tmp_path / "in/v1.mp4", video(1, 16, 8))
    report = import_dataset(tmp_path / "in", tmp_path / "out", small())
    assert report.clips == {"train": 6} and report.unusable == ()


def test_changed_controls_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The videos are the same, one file of ticks is not: what was done with it is not taken over."""
    folder = vpt(tmp_path / "in", 2)
    with monkeypatch.context() as patched:
        patched.setattr(importing, "assemble", None)
        with pytest.raises(TypeError):
            import_dataset(folder, tmp_path / "out", small())
    ticks = sorted(folder.glob("*.jsonl"))[0]
    put(ticks, ticks.read_text().replace('"hotbar": 3', '"hotbar": 7'))
    report = import_dataset(folder, tmp_path / "out", small())
    assert {action["hotbar"] for clip in clips_of(report) for action in clip.controls["actions"]} == {3, 7}


def test_going_on_after_sigkill(tmp_path: Path) -> None:
    """Killed once a few jobs are done: the workers end as well, and the second call makes what one call makes."""
    films(tmp_path / "in", 8, 47)
    words = ["--frames", "4", "--stride", "0.125", "--default-caption", "x", "--heldout", "0.2", "--keep-duplicates"]
    words += ["--clips", "40", "--scene-cuts", "0"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "anyflow", "data", "import", str(tmp_path / "in"), "--to", str(out)]
        return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    work = tmp_path / "killed/.out.import"
    process = start(tmp_path / "killed/out")
    limit = time.monotonic() + 120
    while len(list(work.glob("*.json"))) < 1 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(work.glob("*.json")) and not (tmp_path / "killed/out").exists()
    assert start(tmp_path / "killed/out").wait() == 0
    whole = small(frames=4, stride=0.125, default_caption="x", heldout=0.2, keep_duplicates=True)
    import_dataset(tmp_path / "in", tmp_path / "whole/out", dataclasses.replace(whole, clips=40, scene_cuts=0.0))
    assert shards_of(tmp_path / "killed/out") == shards_of(tmp_path / "whole/out")
