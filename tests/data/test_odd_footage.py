"""Footage with something odd about its times, its end or its labels: clips are right or left out, and it is told."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from drive_files import comma2k19, nuscenes, vpt
from footage_files import encode, lenient, lerobot_v3, picture, put, read_frame, video
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from robot_files import annotated, irasim_2d

from anyflow.data.card import load_card
from anyflow.data.clip import SPLITS, Clip
from anyflow.data.decode import ClipShape, decode_clip, open_stream, timed_frames
from anyflow.data.frame_times import HEAD
from anyflow.data.importing.cutting import CutReport, Cutting, cut
from anyflow.data.importing.finish import ImportReport
from anyflow.data.importing.labels import NoLabelError, controls_at
from anyflow.data.importing.recording import Recording, Track, VideoFile
from anyflow.data.importing.run import import_dataset
from anyflow.data.shards import load_index, read_clip
from anyflow.errors import UserError


def film(
    stamps: Sequence[int],
    tick: Fraction = Fraction(1, 1000),
    container: str = "matroska",
    claimed: int = 8,
    codec: str = "libx264",
    **options: str,
) -> bytes:
    """Picture k from the stamp of number k on; ``claimed`` is the header's rate."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"live": "1"} if container == "webm" else {}) as output:
        stream = output.add_stream(codec, rate=claimed, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 192, "yuv420p"
        stream.codec_context.time_base = stream.time_base = tick
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(picture(0, number), format="rgb24")
            frame.pts, frame.time_base = stamp, tick
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def imported(source: Path, out: Path, **options: Any) -> ImportReport:
    """All clips, whatever they look like."""
    return import_dataset(source, out, lenient(**{"scene_cuts": 0.0, "keep_duplicates": True, **options}))


def clips_of(report: ImportReport) -> dict[str, Clip]:
    card = load_card(report.card)
    places = [card.splits[split] for split in SPLITS if split in card.splits]
    clips = [read_clip(place, *found) for place in places for found in load_index(place)]
    return {clip.key: clip for clip in clips}


def numbers(clip: Clip, frames: int = 4) -> list[int]:
    """Which pictures a clip shows."""
    assert clip.mp4 is not None
    return [read_frame(image)[1] for image in decode_clip(clip.mp4, ClipShape(frames, 48, 192))]


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_knows_no_times_and_its_frames_come_in_order(codec: str, tmp_path: Path) -> None:
    """B-frames in AVI: FFmpeg gives them the times of others."""
    data = film(range(40), Fraction(1, 16), "avi", 16, codec, bf="3" if codec == "libx264" else "2")
    put(tmp_path / "in/v.avi", data)
    report = imported(tmp_path / "in", tmp_path / "out", frames=8)
    assert [numbers(clip, 8) for clip in clips_of(report).values()] == [list(range(k, k + 8)) for k in range(0, 40, 8)]
    assert load_card(report.card).fps == 16
    assert any("taken in the order of showing" in note and "v)" in note for note in report.notes)


@pytest.mark.parametrize("between", [0, 1, 2])
@pytest.mark.parametrize("stamps", [[*range(40), *range(43, 60)], [0, 1, *range(4, 20), *range(22, 36)]])
def test_frames_that_avi_lacks_are_missing_at_their_own_place(stamps: list[int], between: int) -> None:
    """However many frames the decoder holds back, and also among the first."""
    data = film(stamps, Fraction(1, 16), "avi", 16, bf=str(between), **{"x264-params": "b-adapt=0"})
    with av.open(io.BytesIO(data)) as container:
        _, shown = timed_frames(container, open_stream(container))
        starts = [round(frame.start * 16, 3) for frame in shown]
    assert starts == stamps


def test_a_browsers_header_of_1000_frames_a_second_is_not_believed(tmp_path: Path) -> None:
    stamps = [round(1000 * number / 30) for number in range(40)]
    put(tmp_path / "in/v.webm", film(stamps, container="webm", claimed=1000, codec="libvpx", deadline="realtime"))
    report = imported(tmp_path / "in", tmp_path / "out", frames=8)
    assert load_card(report.card).fps == 30 and report.clips == {"train": 5}
    assert [numbers(clip, 8)[0] for clip in clips_of(report).values()] == [0, 8, 16, 24, 32]
    assert any(note.startswith("header of 1000 frames a second, time stamps of 30") for note in report.notes)


def test_one_lying_header_shapes_no_other_recording(tmp_path: Path) -> None:
    """It is the first by name: neither its rate nor its size becomes everybody's."""
    small = [picture(0, number)[:16, :16] for number in range(12)]
    put(tmp_path / "in/a.mp4", encode(small, 120))
    for number in range(3):
        put(tmp_path / f"in/v{number}.mp4", video(number, 8, 8))
    card = load_card(imported(tmp_path / "in", tmp_path / "out").card)
    assert (card.fps, card.height, card.width) == (8, 48, 192)


@pytest.mark.parametrize("first", [-2000, 0, 500, 2**31])
def test_the_first_frame_is_time_zero(first: int, tmp_path: Path) -> None:
    stamps = [first + 125 * number for number in range(16)]
    put(tmp_path / "v.nut", film(stamps, container="nut"))
    track = Track(np.arange(16) / 8, np.arange(16.0))
    clips = list(cut(recording(tmp_path / "v.nut"), CUTTING, "", "", {"number": track}, CutReport()))
    assert [made.clip.controls["number"] for made in clips] == [[k, k + 1, k + 2, k + 3] for k in (0, 4, 8, 12)]
    assert [numbers(made.clip) for made in clips] == [[k, k + 1, k + 2, k + 3] for k in (0, 4, 8, 12)]


CUTTING = Cutting(4, 8.0, 48, 192, 4, cut_threshold=0.0)


def recording(path: Path, **more: Any) -> Recording:
    return Recording("v", "v", VideoFile(str(path)), **more)


@settings(max_examples=12)
@example([1] * 14 + [2] * 5 + [3] * 8 + [9, 3, 1], 8.0)  # most frames stay for two: nine of one are no pause
@given(
    st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 3, 9, 40]), min_size=30, max_size=44), st.sampled_from([8.0, 4.0])
)
def test_no_clip_bridges_a_pause_and_labels_stay_with_their_pictures(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], fps: float
) -> None:
    """Frames that are missing, a few or many: a clip holds for a few, ends at many, and its labels are of its pictures.

    The label of a frame is its number, and comes with its time; so labels and pictures must agree, or be one apart
    where a time falls on the border of two frames.
    """
    stamps = [sum(steps[:number]) * 125 for number in range(len(steps))]
    path = put(tmp_path_factory.mktemp("film") / "v.mkv", film(stamps, preset="ultrafast"))
    track = Track(np.array(stamps) / 1000, np.arange(len(stamps)))
    report = CutReport()
    clips = list(cut(recording(path), Cutting(4, fps, 48, 192, 4, 0.0), "", "", {"number": track}, report))
    between = steps[:-1]
    head = between[: HEAD - 1]  # what the rate is told by
    middle = sorted(head)[len(head) // 2]
    near = [step for step in head if 0.5 <= step / middle <= 1.5]
    usual = np.mean(near if 3 * len(near) >= 2 * len(head) else [step for step in head if step <= 5 * middle])
    assume(all(abs(step - 5 * usual) > 0.5 for step in between))  # no matter how the rate is rounded
    pauses = {number for number, step in enumerate(between, start=1) if step > 5 * usual}
    for made in clips:
        shown, labels = numbers(made.clip), made.clip.controls["number"]
        assert not any(shown[0] < pause <= shown[-1] for pause in pauses)
        assert max(abs(np.array(shown) - np.array(labels))) <= (0 if fps == 8 else 1)
    assert any("pauses" in text for text in report.notes) == bool(pauses)


def test_a_camera_that_paused_is_cut_there(tmp_path: Path) -> None:
    """nuScenes with pictures missing in the middle: two stretches, and the poses are those of the pictures."""
    folder = nuscenes(tmp_path / "in", scenes=1)
    tables = next(folder.glob("v1.0-*"))
    rows = json.loads((tables / "sample_data.json").read_text())
    begin = min(row["timestamp"] for row in rows)
    put(tables / "sample_data.json", [row for row in rows if not 0.7 < (row["timestamp"] - begin) / 1e6 < 1.9])
    report = imported(folder, tmp_path / "out", cameras=("CAM_FRONT",))
    shown = [numbers(clip) for clip in clips_of(report).values()]
    assert shown == [[0, 1, 2, 3], [4, 5, 6, 7], *[[k, k + 1, k + 2, k + 3] for k in range(23, 44, 4)]]
    assert any("pauses" in note for note in report.notes)


def test_edit_lists_say_where_a_video_begins(tmp_path: Path) -> None:
    """The first 6 pictures are needed to decode the rest, and are not shown: time 0 is that of picture 6."""
    data = bytearray(film(range(24), Fraction(1, 8), "mp4", bf="0", g="24"))
    with av.open(io.BytesIO(bytes(data))) as container:
        tick = container.streams.video[0].time_base
    assert tick is not None
    place = data.index(b"elst") + 12  # of one entry: length, begin, rate
    begin = int.from_bytes(data[place + 4 : place + 8]) + round(Fraction(6, 8) / tick)
    data[place : place + 8] = (2250).to_bytes(4) + begin.to_bytes(4)  # milliseconds, and ticks
    path = put(tmp_path / "v.mp4", bytes(data))
    track = Track(np.arange(18) / 8, np.arange(6, 24))
    report = CutReport()
    clips = list(cut(recording(path), CUTTING, "", "", {"number": track}, report))
    assert [numbers(made.clip)[0] for made in clips] == [6, 10, 14, 18]
    assert all(numbers(made.clip) == made.clip.controls["number"] for made in clips)
    assert not any("truncated" in text for text in report.notes)


# --- rates and labels -------------------------------------------------------------------------------------------------


def test_a_description_of_another_rate_is_refused(tmp_path: Path) -> None:
    """LeRobot's table counts 12 a second, its videos play the same pictures at 10: rows and pictures are apart."""
    folder = lerobot_v3(tmp_path / "in")
    for path in folder.rglob("*.mp4"):
        put(path, encode([picture(e, t) for e in range(4) for t in range(24)], 10))
    with pytest.raises(UserError, match="no clip"):
        imported(folder, tmp_path / "out")
    with pytest.raises(UserError, match="states 12 frames a second, its video has 10"):
        imported(folder, tmp_path / "strict", error_budget=0.0)


@pytest.mark.parametrize("container", ["mp4", "avi"])
def test_an_annotations_rows_are_of_the_frames_whenever_these_are_shown(container: str, tmp_path: Path) -> None:
    """IRASim has a row a frame, and knows no times: row t is of frame t, also where frames are missing."""
    steps = [1, 1, 2, 1, 1, 3, 1, 1, 2, 1, 1, 1] * 2
    stamps = [sum(steps[:number]) for number in range(len(steps))]
    folder = annotated(tmp_path / "in", irasim_2d)
    for path in folder.glob("videos/*/*.mp4"):
        path.write_bytes(film(stamps, Fraction(1, 8), container, bf="2"))
    report = imported(folder, tmp_path / "out", format="irasim", fps=8.0)
    clips = clips_of(report).values()
    assert len(clips) == 4 * (sum(steps) // 4) and not report.unusable
    for clip in clips:
        assert [round(row[0]) for row in clip.controls["actions"]] == numbers(clip)


def test_clips_end_where_their_labels_end(tmp_path: Path) -> None:
    folder = vpt(tmp_path / "vpt", 1)
    ticks = next(folder.glob("*.jsonl"))
    put(ticks, "".join(line + "\n" for line in ticks.read_text().splitlines()[:19]))
    report = imported(folder, tmp_path / "a")
    assert report.clips == {"train": 4} and report.dropped == {"beyond the labels": 6}
    folder = comma2k19(tmp_path / "comma", 1, 1, 40)
    for path in folder.rglob("frame_*"):
        with path.open("rb") as file:
            array = np.load(file)
        with path.open("wb") as file:
            np.save(file, array[:19])
    report = imported(folder, tmp_path / "b")
    assert report.clips == {"train": 4} and report.dropped == {"beyond the labels": 6}


def test_a_label_that_is_none_spoils_its_clip_alone(tmp_path: Path) -> None:
    path = put(tmp_path / "v.mp4", video(0, 40, 8))
    values = [[float(number), 0.0] for number in range(40)]
    values[9][1] = float("nan")
    held = {"pose": Track(np.arange(40) / 8, np.array(values)), "keys": Track(np.arange(40) / 8, [["w"]] * 39 + [None])}
    report = CutReport()
    clips = list(cut(recording(path), CUTTING, "", "", held, report))
    assert [numbers(made.clip)[0] for made in clips] == [0, 4, 12, 16, 20, 24, 28, 32]
    assert report.dropped == {"with a label missing": 2}
    linear = {"pose": Track(np.arange(40) / 8, np.array(values), linear=True)}
    assert len(list(cut(recording(path), CUTTING, "", "", linear, CutReport()))) == 9


def test_labels_with_a_pause_of_their_own(tmp_path: Path) -> None:
    """No GPS in a tunnel: what lies between the fixes before and after is not made up."""
    path = put(tmp_path / "v.mp4", video(0, 40, 8))
    fixes = np.array([*range(12), *range(24, 40)]) / 8
    report = CutReport()
    clips = list(cut(recording(path), CUTTING, "", "", {"speed": Track(fixes, fixes, linear=True)}, report))
    assert [numbers(made.clip)[0] for made in clips] == [0, 4, 8, 24, 28, 32, 36]
    assert report.dropped == {"across a pause of the labels": 3}


@settings(max_examples=200)
@given(st.lists(st.sampled_from([1, 1, 1, 2, 5, 6, 30]), min_size=3), st.integers(1, 12), st.integers(1, 3))
def test_a_held_value_never_outlives_a_pause(steps: list[int], frames: int, stride: int) -> None:
    """Wherever a clip begins, ends or lies: what a frame is given was on record within the usual time before it."""
    assume(np.median(steps) == 1)
    times = np.concatenate([[0], np.cumsum(steps)]) / 10
    track = {"number": Track(times, np.arange(len(times)))}
    alive = [sum(times <= at / 30 + 1e-6) - 1 for at in range(int(times[-1] * 30) + 3)]
    for first in range(0, len(alive) - frames * stride, 5):
        moments = np.arange(first, first + frames * stride, stride)
        held = [alive[at] for at in moments]
        pauses = [row for row in range(len(steps)) if steps[row] > 5]
        bridged = any(held[0] <= row < held[-1] for row in pauses)
        stale = any(held[-1] == row and moments[-1] / 30 >= times[row] + 0.1 - 6e-4 for row in pauses)
        try:
            made = controls_at(track, moments / 30)["number"]
        except NoLabelError as error:
            assert (bridged or stale) and "pause" in str(error)
        else:
            assert made == held and not bridged and not stale


@pytest.mark.parametrize("times", [[0.0, 2.0, 1.0], [0.0, float("nan"), 1.0]])
def test_labels_whose_times_do_not_ascend_spoil_their_recording(times: list[float], tmp_path: Path) -> None:
    path = put(tmp_path / "v.mp4", video(0, 8, 8))
    with pytest.raises(Exception, match="times of its speed do not ascend"):
        list(cut(recording(path), CUTTING, "", "", {"speed": Track(np.array(times), [1, 2, 3])}, CutReport()))


# --- one bad entry ----------------------------------------------------------------------------------------------------


def test_a_truncated_file_keeps_what_comes_before_and_is_named(tmp_path: Path) -> None:
    whole = film([125 * number for number in range(40)], container="mp4", g="8", movflags="+faststart")
    for name, data in {
        "a": encode([picture(0, t) for t in range(40)], 8, format="matroska", gop=4),
        "b": film([125 * number for number in range(40)], container="matroska", g="4"),
    }.items():
        put(tmp_path / f"in/{name}.mkv", data[: len(data) * 2 // 3])
    put(tmp_path / "in/c.mp4", whole)
    report = imported(tmp_path / "in", tmp_path / "out")
    keys = [key[0] for key in clips_of(report)]
    assert keys.count("c") == 10 and 3 <= keys.count("a") < 10 and 3 <= keys.count("b") < 10
    named = str([note for note in report.notes if "truncated" in note or "broken off after clips" in note])
    assert all(name in named for name in (": a)", ": b)")) or "(2: a, b)" in named
    assert not report.unusable and report.taken == 3 and not report.left_out


def test_videos_without_pictures_or_without_sense_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(3):
        put(folder / f"v{number}.mp4", video(number, 8, 8))
    empty = io.BytesIO()
    with av.open(empty, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 192, "yuv420p"
        stream.codec_context.open()
        output.start_encoding()
    put(folder / "empty.mp4", empty.getvalue())
    put(folder / "nothing.mp4", b"")
    put(folder / "tiny.mp4", encode([picture(0, t)[:2, :2] for t in range(8)], 8))
    report = imported(folder, tmp_path / "out")
    assert report.clips == {"train": 6}
    reasons = dict(report.unusable)
    assert set(reasons) == {"empty", "nothing", "tiny"} and "too small" in reasons["tiny"]


def test_depth_maps_are_left_out_by_name_and_charge_no_budget(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"in/v{number}.mp4", video(number, 8, 8))
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 192, "gray16le"
        for number in range(8):
            image = np.full((48, 192), 1000 * number, dtype=np.uint16)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray16le")))
        output.mux(stream.encode())
    put(tmp_path / "in/depth.mkv", file.getvalue())
    report = imported(tmp_path / "in", tmp_path / "out", error_budget=0.0)
    assert report.clips == {"train": 4} and report.unusable == ()
    assert report.without == (("depth", "16-bit gray: a depth map or the like, no colour"),)


# --- the held-out split -----------------------------------------------------------------------------------------------


def test_held_out_is_drawn_among_what_gave_clips(tmp_path: Path) -> None:
    """Whichever recording is too short: the split has clips, and whole groups, and what was drawn before stays."""
    for number in range(6):
        put(tmp_path / f"in/v{number}.mp4", video(number, 8, 8))
    first = {sample.key[:2] for sample in held_out(imported(tmp_path / "in", tmp_path / "all", heldout=0.3))}
    assert len(first) == 2
    for number in range(6):
        folder = tmp_path / f"without{number}"
        for other in range(6):
            put(folder / f"v{other}.mp4", video(other, 2 if other == number else 8, 8))
        report = imported(folder, tmp_path / f"out{number}", heldout=0.3)
        held = {sample.key[:2] for sample in held_out(report)}
        assert len(held) == 2 and sum(report.clips.values()) == 10 and report.clips["heldout"] == 4
        assert first - {f"v{number}"} <= held
        assert report.without == ((f"v{number}", "too short"),)


def test_a_sources_own_held_out_folder_that_gives_nothing(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path / f"in/train/v{number}.mp4", video(number, 8, 8))
    put(tmp_path / "in/test/w.mp4", video(9, 2, 8))
    report = imported(tmp_path / "in", tmp_path / "out", heldout=0.3)
    assert report.clips == {"train": 6, "heldout": 2}
    assert "own held-out recordings gave no clip" in report.notes[0]
    with pytest.raises(UserError, match="no clip of 4 frames"):
        only = tmp_path / "only"
        put(only / "train/v.mp4", video(0, 8, 8))
        put(only / "test/w.mp4", video(9, 2, 8))
        imported(only, tmp_path / "no", heldout=0.3)


def held_out(report: ImportReport) -> list[Any]:
    return [sample for _, sample in load_index(load_card(report.card).splits["heldout"])]
