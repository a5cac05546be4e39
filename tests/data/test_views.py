"""Several cameras in one picture: where each lies, that all show one moment, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import drive_files
import numpy as np
import pytest
from drive_files import SPEED, circle
from footage_files import CAMERAS, lerobot_v2, put, read_frame, video
from hypothesis import given
from hypothesis import strategies as st
from robot_files import FRAMES, annotated, as_images, change, lerobot_unlike, two_arms
from test_importers import run

from anyflow.data.card import load_card
from anyflow.data.clip import Clip
from anyflow.data.decode import ClipShape, decode_clip
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import Recording, Unusable, VideoFile
from anyflow.data.importing.run import import_dataset
from anyflow.data.importing.views import Box, boxes, synchronised, together
from anyflow.errors import UserError

ANY: dict[str, Any] = {"keep_duplicates": True, "default_caption": "A robot.", "error_budget": 1.0}
CLIP = 8


def cameras_of(clip: Clip, height: int, width: int, places: list[Box]) -> list[list[tuple[int, int]]]:
    """(grey, frame) of every picture, camera by camera."""
    assert clip.mp4 is not None
    pictures = decode_clip(clip.mp4, ClipShape(CLIP, height, width))
    cut = [pictures[:, b.top : b.top + b.height, b.left : b.left + b.width] for b in places]
    return [[read_frame(image) for image in camera] for camera in cut]


def test_cameras_side_by_side_show_one_moment_at_one_height(tmp_path: Path) -> None:
    """The wrist camera is half as large: both are brought to its height, in order, and their frames agree."""
    folder = lerobot_unlike(tmp_path / "robot")
    report, clips = run(folder, tmp_path / "out", views="wide", **ANY)
    assert report.recordings == 4 and len(clips) == 12
    assert report.views == "top | wrist, scaled to one height (top 192x48, wrist 96x24)"
    card = load_card(report.card)
    assert (card.height, card.width) == (24, 192) and report.views in card.description
    assert card.provenance["views"] == report.views and card.attributes["camera"] == ["top+wrist"]
    for clip in clips:
        actions = np.array(clip.controls["actions"]).astype(int)
        top, wrist = cameras_of(clip, 24, 192, [Box(0, 0, 24, 96), Box(0, 96, 24, 96)])
        assert top == [(e, t) for t, e in actions] and wrist == [(e + 3, t) for t, e in actions]


def test_names_choose_and_order(tmp_path: Path) -> None:
    _, clips = run(annotated(tmp_path / "robot"), tmp_path / "out", views="2+0", caption="{camera} sees", **ANY)
    assert len(clips) == 12 and {clip.caption for clip in clips} == {"2+0 sees"}
    for clip in clips:
        first, second = cameras_of(clip, 48, 384, [Box(0, 0, 48, 192), Box(0, 192, 48, 192)])
        episode = clip.attributes["episode_id"]
        assert {grey for grey, _ in first} == {episode + 6} and {grey for grey, _ in second} == {episode}
        assert [frame for _, frame in first] == [frame for _, frame in second]


def test_a_grid_is_near_square_and_a_size_is_shared_out(tmp_path: Path) -> None:
    """Three cameras in two rows, the last one in the middle; at another shape, no camera reaches into another's box."""
    report, clips = run(annotated(tmp_path / "robot"), tmp_path / "out", views="grid", size=(192, 64), **ANY)
    assert report.views == "0 | 1 / 2"
    places = [Box(0, 0, 32, 96), Box(0, 96, 32, 96), Box(32, 48, 32, 96)]
    for clip in clips:
        greys = [{grey for grey, _ in camera} for camera in cameras_of(clip, 64, 192, places)]
        episode = clip.attributes["episode_id"]
        assert greys == [{episode}, {episode + 3}, {episode + 6}]
        assert clip.mp4 is not None
        corner = decode_clip(clip.mp4, ClipShape(CLIP, 64, 192))[:, 34:62, :44]
        assert corner.max() < 40  # black


@pytest.mark.parametrize("write", [lerobot_v2, as_images])
def test_every_kind_of_footage_can_be_put_together(write: Any, tmp_path: Path) -> None:
    """A file an episode, and pictures in a table beside a part of a file."""
    report, clips = run(write(tmp_path / "robot"), tmp_path / "out", views="wrist+top", **ANY)
    assert report.recordings == 4 and not report.unusable and len(clips) == 12
    for clip in clips:
        wrist, top = cameras_of(clip, 48, 384, [Box(0, 0, 48, 192), Box(0, 192, 48, 192)])
        assert wrist == top == [(e, t) for t, e in np.array(clip.controls["actions"]).astype(int)]


def test_an_episode_of_one_picture_is_short_and_not_damaged(tmp_path: Path) -> None:
    folder = lerobot_unlike(tmp_path / "robot", frames=1, fps=30)
    with pytest.raises(UserError, match=r"no clip of 8 frames came out .*left out: 4 too short"):
        run(folder, tmp_path / "out", views="wide")


def shift(folder: Path, camera: str, seconds: float, without: int) -> None:
    """Let a camera's clock be late, and take its first pictures away."""

    def late(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if f"/{camera}/" in row["filename"]:
                row["timestamp"] += round(seconds * 1e6)

    for scene in range(3):
        files = sorted(folder.glob(f"s*s/{camera}/scene-{scene:04d}*"), key=lambda path: path.stem.rpartition("__")[2])
        for path in files[:without]:
            path.unlink()
    change(folder / "v1.0-mini/sample_data.json", late)


def test_cameras_are_synchronised_by_their_clocks_and_so_are_the_controls(tmp_path: Path) -> None:
    """The front camera is 30 ms late and begins 7 pictures later: frames agree, the path is that of these frames."""
    folder = drive_files.nuscenes(tmp_path / "nu")
    shift(folder, "CAM_FRONT", 0.03, 7)
    report, clips = run(folder, tmp_path / "out", views="CAM_BACK+CAM_FRONT", heldout=0.0, fps=12, **ANY)
    assert not report.unusable and len(clips) == 15
    for clip in clips:
        back, front = cameras_of(clip, 48, 384, [Box(0, 0, 48, 192), Box(0, 192, 48, 192)])
        assert back == front
        first = back[0][1]
        steering = np.array(clip.controls["steering"])
        assert np.allclose(steering, [((first + k) / 12 + 0.03) * 10 for k in range(CLIP)], atol=0.2)
        assert np.allclose(clip.controls["trajectory"], [circle(k / 12) for k in range(CLIP)], atol=0.02)
        assert np.allclose(clip.controls["speed"], SPEED, rtol=0.02)
    assert min(cameras_of(clip, 48, 384, [Box(0, 0, 48, 192)])[0][0][1] for clip in clips) == 7


def test_a_gap_of_one_camera_cuts_all(tmp_path: Path) -> None:
    folder = drive_files.nuscenes(tmp_path / "nu")
    files = sorted(folder.glob("s*s/CAM_BACK/scene-0001*"), key=lambda path: path.stem.rpartition("__")[2])
    files[20].unlink()
    report, clips = run(folder, tmp_path / "out", views="wide", heldout=0.0, **ANY)
    assert report.recordings == 4 and not report.unusable
    for clip in clips:
        back, front = cameras_of(clip, 48, 384, [Box(0, 0, 48, 192), Box(0, 192, 48, 192)])
        assert back == front and (1, 20) not in back


def pause(folder: Path, camera: str, first: int, last: int) -> None:
    """Take a camera's pictures of scene 1 out of the tables: nobody says that any are missing."""
    files = sorted(folder.glob(f"s*s/{camera}/scene-0001*"), key=lambda path: int(path.stem.rpartition("__")[2]))
    gone = {path.relative_to(folder).as_posix() for path in files[first:last]}
    change(
        folder / "v1.0-mini/sample_data.json",
        lambda rows: rows.__setitem__(slice(None), [row for row in rows if row["filename"] not in gone]),
    )


def test_a_pause_of_one_camera_cuts_the_clips_of_all_and_is_told(tmp_path: Path) -> None:
    """Only the back camera pauses; no clip bridges it, labels stay with their pictures, and the camera is named."""
    folder = drive_files.nuscenes(tmp_path / "nu")
    pause(folder, "CAM_BACK", 18, 30)
    report, clips = run(folder, tmp_path / "out", views="CAM_FRONT+CAM_BACK", heldout=0.0, fps=12, **ANY)
    assert not report.unusable
    shown = []
    for clip in clips:
        front, back = cameras_of(clip, 48, 384, [Box(0, 0, 48, 192), Box(0, 192, 48, 192)])
        first = back[0][1]
        assert front == back and [frame for _, frame in back] == list(range(first, first + CLIP))
        assert np.allclose(clip.controls["steering"], [(first + k) / 12 * 10 for k in range(CLIP)], atol=0.2)
        shown += [first] if back[0][0] == 1 else []
    assert sorted(shown) == [0, 8, 30, 38]
    paused = next(note for note in report.notes if note.startswith("pauses in the recording"))
    assert paused.endswith("(1: scene-0001/CAM_BACK)")


def test_what_is_guessed_of_any_camera_is_told_by_its_name(tmp_path: Path) -> None:
    report, _ = run(lerobot_v2(tmp_path / "robot"), tmp_path / "out", views="wide", **ANY)
    colours = next(note for note in report.notes if note.startswith("colours without a tag"))
    assert "(8: episode_" in colours and "/top, " in colours and "/wrist, " in colours


def test_a_camera_of_another_rate_than_stated_is_refused_by_name(tmp_path: Path) -> None:
    folder = lerobot_v2(tmp_path / "robot")
    for path in folder.glob(f"videos/**/{CAMERAS[1]}/*.mp4"):
        put(path, video(0, 24, 10))
    with pytest.raises(UserError, match="camera wrist: its description states 12 frames a second, its video has 10"):
        import_dataset(folder, tmp_path / "x", ImportOptions(frames=CLIP, workers=0, views="wide"))


def test_a_recording_without_a_camera_is_named_and_left_out(tmp_path: Path) -> None:
    folder = annotated(tmp_path / "robot", two_arms)
    with pytest.raises(UserError, match=r"1 of 4 recordings cannot be used.*train/2 \(camera wrist is missing"):
        import_dataset(folder, tmp_path / "x", ImportOptions(frames=CLIP, workers=0, views="wide"))
    report, clips = run(folder, tmp_path / "out", views="wide", **ANY)
    assert [name for name, _ in report.unusable] == ["train/2"] and len(clips) == 9
    _, clips = run(folder, tmp_path / "front", views="front", **ANY)
    assert len(clips) == 12


def test_every_camera_is_accounted_for(tmp_path: Path) -> None:
    """What is not asked for, and what another camera's lack spoils, is counted; no file of it is called unknown."""
    folder = annotated(tmp_path / "robot", two_arms)
    front, _ = run(folder, tmp_path / "front", views="front", **ANY)
    assert (front.found, front.taken, front.left_out) == (7, 4, {"another camera (wrist)": 3})
    wide, _ = run(folder, tmp_path / "wide", views="wide", **ANY)
    assert (wide.found, wide.taken, wide.left_out) == (4, 3, {"unusable": 1})
    for report in (front, wide):
        assert (report.files["footage"], report.files["descriptions"], report.files["left_out"]) == (7, 4, {})


def test_a_camera_whose_file_is_gone_or_ends_early_is_named(tmp_path: Path) -> None:
    folder = annotated(tmp_path / "robot")
    (folder / "videos/train/0/1.mp4").unlink()
    put(folder / "videos/train/1/2.mp4", video(7, FRAMES - 8, 5))
    report, clips = run(folder, tmp_path / "out", views="wide", **ANY)
    reasons = dict(report.unusable)
    assert "camera 1 is missing (there is no videos/train/0/1.mp4)" in reasons["train/0"]
    broken = "broken off after clips that were taken: camera 2 ends more than 0.5 s before the others (1: train/1)"
    assert broken in report.notes and set(reasons) == {"train/0"}
    assert len(clips) == 8


def test_a_damaged_moment_does_not_shape_the_layout_of_the_others(tmp_path: Path) -> None:
    """The first episode lacks its camera 1, the second lists them backwards: the others lie as they would alone."""
    folder = annotated(tmp_path / "robot")
    first, second = sorted(folder.glob("annotation/**/*.json"))[:2]
    change(first, lambda document: document["videos"][1].update(video_path="../1.mp4"))
    change(
        second,
        lambda document: [
            video.update(video_path=path, camera=str(2 - number))
            for number, (video, path) in enumerate(
                zip(document["videos"], [video["video_path"] for video in document["videos"]][::-1], strict=True)
            )
        ],
    )
    report, _ = run(folder, tmp_path / "out", views="wide", **ANY)
    assert report.views == "0 | 1 | 2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": "top+hand"}, r"there is no camera 'hand'; the source has top, wrist"),
        ({"views": "wdie"}, r"there is no camera 'wdie'; the source has top, wrist \(write apart, wide, grid"),
        ({"views": "top+top"}, "names a camera twice"),
        ({"views": "wide", "cameras": ("top", "hand")}, "there is no camera 'hand'"),
        ({"views": "top+wrist", "cameras": ("top",)}, "leave --cameras out"),
    ],
)
def test_cameras_that_are_not_there_are_a_sentence(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_dataset(lerobot_v2(tmp_path / "robot"), tmp_path / "out", ImportOptions(workers=0, **options))


def test_footage_without_cameras_cannot_be_put_together(tmp_path: Path) -> None:
    put(tmp_path / "plain/a.mp4", video(0, 8, 8))
    with pytest.raises(UserError, match="name no cameras; leave --views out"):
        import_dataset(tmp_path / "plain", tmp_path / "out", ImportOptions(views="grid"))


def test_cameras_and_wide_keep_the_order_given(tmp_path: Path) -> None:
    options = {"views": "wide", "cameras": ("wrist", "top"), **ANY}
    report, clips = run(lerobot_v2(tmp_path / "robot"), tmp_path / "out", **options)
    assert report.views == "wrist | top" and len(clips) == 12


def test_the_command_line_takes_views(tmp_path: Path, anyflow: Any) -> None:
    folder, out = annotated(tmp_path / "robot"), tmp_path / "out"
    words = ("--frames", "8", "--workers", "0", "--default-caption", "domain", "--keep-duplicates")
    done = anyflow("data", "import", str(folder), "--to", str(out), "--views", "grid", *words)
    assert done.returncode == 0 and "in one picture: 0 | 1 / 2" in done.stdout
    assert json.loads((out / "import.json").read_text())["views"] == "0 | 1 / 2"
    done = anyflow("data", "import", str(folder), "--to", str(tmp_path / "x"), "--views", "0+9", *words)
    assert done.returncode == 2 and "the source has 0, 1, 2" in done.stderr


def test_what_is_damaged_is_never_lost() -> None:
    """A camera that is damaged in every moment is not among those known, but is named all the same."""
    good = [Recording(f"e{n}/top", f"e{n}", VideoFile("a"), camera="top") for n in range(2)]
    bad = [Unusable(f"e{n}/wrist", "damaged") for n in range(2)] + [Unusable("e7", "no description")]
    made = list(together([*good, *bad], "wide", ()))
    assert [item.name for item in made] == ["e0/top", "e0/wrist", "e1/top", "e1/wrist", "e7"]
    assert [item.name for item in together([*good, *bad], "top", ())] == ["e0/top", "e1/top", "e7"]


def test_pauses_and_late_cameras_stay_in_step() -> None:
    """Ten pictures a second; one camera starts 0.36 s late, the other pauses from 0.8 to 2 s."""
    times = [[k / 10 for k in range(40)], [0.36 + k / 10 for k in range(5)] + [2 + k / 10 for k in range(20)]]
    streams = [iter([(np.array([time]), time, time == 2) for time in stream]) for stream in times]
    made = [(float(a[0]), float(b[0]), apart) for (a, b), _, apart in synchronised("ab", streams, 10)]
    assert all(abs(a - b) <= 0.05 for a, b, _ in made) and len(made) == 25
    assert [round(a, 1) for a, _, apart in made if apart] == [0.4, 2.0]


@given(
    st.lists(st.tuples(st.integers(24, 1200), st.integers(24, 2000)), min_size=1, max_size=7),
    st.integers(1, 7),
    st.integers(64, 1000),
    st.integers(64, 2000),
)
def test_boxes_lie_inside_and_apart(sizes: list[tuple[int, int]], columns: int, height: int, width: int) -> None:
    places = boxes(sizes, min(columns, len(sizes)), height, width)
    painted = np.zeros((height, width), dtype=np.uint8)
    for box in places:
        assert box.top >= 0 and box.top + box.height <= height and box.left >= 0 and box.left + box.width <= width
        painted[box.top : box.top + box.height, box.left : box.left + box.width] += 1
    assert painted.max() == 1 and len(places) == len(sizes)
    heights = {box.height for box in places}
    assert max(heights) - min(heights) <= 1


def test_a_size_without_room_for_a_camera_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="camera 0 would have 3x2 of the 8x2 pixels: give a larger --size"):
        run(annotated(tmp_path / "robot"), tmp_path / "out", views="wide", size=(8, 2), default_caption="A robot.")


def test_equal_cameras_fill_the_picture() -> None:
    assert boxes([(192, 320)] * 3, 3, 192, 960) == [Box(0, 320 * n, 192, 320) for n in range(3)]
    assert boxes([(48, 96)] * 4, 2, 96, 192)[3] == Box(48, 96, 48, 96)
