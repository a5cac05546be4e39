"""Robot data sets: annotations as IRASim and Ctrl-World write them, LeRobot's rarer layouts, partial nuScenes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drive_files
import numpy as np
import pytest
from drive_files import circle
from footage_files import CAMERAS, lerobot_v2, lerobot_v3, put
from robot_files import (
    FRAMES,
    RATE,
    RAW,
    Annotation,
    annotated,
    as_images,
    bridge,
    change,
    change_rows,
    ctrl_world,
    irasim_2d,
    irasim_3d,
    two_arms,
)
from test_importers import run, seen

from anyflow.data.card import load_card
from anyflow.data.importing.formats import irasim, lerobot
from anyflow.data.importing.formats.known import detect_format
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import LeftOut
from anyflow.data.importing.run import import_dataset
from anyflow.data.shards import load_index
from anyflow.errors import UserError

ANY = {"error_budget": 1.0, "default_caption": "A robot.", "keep_duplicates": True}
INFO = "meta/info.json"
ROWS = "data/chunk-000/file-000.parquet"


def keys(report: Any, split: str) -> set[str]:
    return {sample.key for _, sample in load_index(report.card.parent / split)}


@pytest.mark.parametrize("annotation", [ctrl_world, irasim_3d, irasim_2d, two_arms])
def test_annotations_of_every_project(annotation: Annotation, tmp_path: Path) -> None:
    """Text, own split, and the numbers of each clip's frames: the state of frame t is t."""
    report, clips = run(annotated(tmp_path / "robot", annotation), tmp_path / "out", **ANY)
    assert report.format == "irasim" and not report.unusable
    cameras = {ctrl_world: 3, irasim_3d: 1, irasim_2d: 1, two_arms: 2}[annotation]
    missing = 3 if annotation is two_arms else 0  # clips of the camera that one episode lacks
    assert len(clips) == 4 * cameras * 3 - missing
    assert all(key.startswith("val") for key in keys(report, "heldout"))
    assert all(key.startswith("train") for key in keys(report, "train"))
    for clip in clips:
        frames = [frame for _, frame in seen(clip)]
        told = clip.controls.get("state", clip.controls.get("actions"))
        assert [np.ravel(row)[0] for row in told] == frames and clip.fps == RATE
        assert clip.caption in {"", "Task 0", "Task 1", "Task 2", "Task 3"} and clip.domain == "robotics"


def test_ctrl_worlds_raw_streams_are_read_at_their_own_rate(tmp_path: Path) -> None:
    report, clips = run(annotated(tmp_path / "robot"), tmp_path / "out", **ANY)
    assert {clip.caption for clip in clips} == {"", "Task 1", "Task 2", "Task 3"}
    assert {clip.attributes["camera"] for clip in clips} == {"0", "1", "2"}
    for clip in clips:
        frames = [frame for _, frame in seen(clip)]
        assert np.allclose(clip.controls["actions"], np.tile(np.array(frames)[:, None], 7))
        assert np.allclose(np.array(clip.controls["action.joint_velocity"])[:, 0], frames)
    card = load_card(report.card)
    assert f"{RATE} rows a second" in card.controls["state"].holds and "metres" in card.controls["state"].holds
    assert f"{RAW * RATE} rows a second" in card.controls["actions"].holds
    pose = card.controls["actions"]
    assert (pose.width, pose.at, pose.unit[3], pose.numbers[-1]) == (7, "transition", "rad", "gripper")
    velocity = card.controls["action.joint_velocity"]
    assert (velocity.at, velocity.skipped) == ("transition", "mean")


def test_an_episodes_last_action_holds_at_its_last_frame(tmp_path: Path) -> None:
    _, clips = run(annotated(tmp_path / "robot", irasim_3d), tmp_path / "out", **ANY)
    last = [clip for clip in clips if seen(clip)[-1][1] == FRAMES - 1]
    assert len(last) == 4
    for clip in last:
        assert [row[0] for row in clip.controls["actions"][-2:]] == [FRAMES - 2.0, FRAMES - 2.0]
        assert clip.controls["gripper"][-1] == FRAMES - 1.0


def test_cameras_keep_their_names_where_an_episode_lacks_some(tmp_path: Path) -> None:
    report, clips = run(annotated(tmp_path / "robot", bridge), tmp_path / "out", **ANY)
    greys = [(seen(clip)[0][0] - int(clip.attributes["episode_id"])) % 10 for clip in clips]
    seen_by = {(clip.attributes["camera"], grey) for clip, grey in zip(clips, greys, strict=True)}
    assert seen_by == {("image_0", 0), ("image_1", 3), ("image_2", 6), ("image_3", 9)} and not report.unusable


@pytest.mark.parametrize(
    ("path", "camera"),
    [
        ("videos/train/7/0.mp4", "0"),
        ("videos/train/7/2/rgb.mp4", "2"),
        ("videos/train/7/rgb.mp4", "rgb"),
        ("videos/7.mp4", ""),
        ("/data/bridge/videos/val/7/front_left.mp4", "front_left"),
        ("videos/cam_high/7.mp4", "cam_high"),
        ("videos/train/other/top.mp4", "top"),
    ],
)
def test_a_camera_is_named_by_what_its_path_has_beside_the_episode(path: str, camera: str) -> None:
    assert irasim._cameras([{"video_path": path}], {"7"}) == {camera: path}


def test_annotations_without_splits_are_held_out_by_draw(tmp_path: Path) -> None:
    folder = annotated(tmp_path / "robot", irasim_3d)
    for path in sorted(folder.glob("annotation/*/*.json")):
        put(folder / "annotations" / path.name, path.read_bytes())
        path.unlink()
    report, clips = run(folder, tmp_path / "out", **ANY)
    assert report.format == "irasim" and len(clips) == 12 and report.clips["heldout"] == 3


def test_pickled_latents_stay_shut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(annotated(tmp_path / "robot"), tmp_path / "out", **ANY)
    assert "12 pickles were not opened" in caplog.text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda a: a.update(states=a["states"][:10]), "states has 10 rows, its video 24 frames"),
        (lambda a: a["states"].__setitem__(3, [None]), "states has rows that are no numbers or of several lengths"),
        (lambda a: a["states"].__setitem__(0, "x"), "states has rows that are no numbers or of several lengths"),
        (lambda a: a.update(states=[]), "states has 0 rows, its video 24 frames"),
        (lambda a: a["states"][3].pop(), "states has rows that are no numbers or of several lengths"),
        (lambda a: a["videos"][0].update(video_path="../0.mp4"), "leads out of the data set"),
        (lambda a: a["videos"][0].update(video_path="videos/train/7/0.mp4"), "there is no videos/train/7/0.mp4"),
        (lambda a: a.update(videos=[]), "names no video"),
        (lambda a: a.update(videos=[3]), "names no video"),
    ],
)
def test_a_damaged_annotation_spoils_its_own_episode_alone(
    damage: Callable[[Any], Any], reason: str, tmp_path: Path
) -> None:
    folder = annotated(tmp_path / "robot")
    change(folder / "annotation/train/0.json", damage)
    assert detect_format(folder) == "irasim"
    report, clips = run(folder, tmp_path / "out", **ANY)
    assert {name.rsplit("/", 2)[0] if name.count("/") == 2 else name for name, _ in report.unusable} <= {
        "train",
        "train/0",
    }
    assert all(reason in why for _, why in report.unusable) and report.unusable
    assert len({clip.key.split("-")[0] for clip in clips if not clip.key.startswith("train_0")}) == 9


def test_depth_maps_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for flag in ({"info": {"video.is_depth_map": True}}, {"video_info": {"is_depth_map": True}}):
        name = next(iter(flag))
        folder = lerobot_v3(tmp_path / name)
        change(folder / INFO, lambda info, flag=flag: info["features"][CAMERAS[1]].update(flag))
        report, clips = run(folder, tmp_path / f"{name}-out", keep_duplicates=True)
        assert report.left_out == {"a depth map": 4} and report.files["left_out"] == {}
        assert {clip.attributes["camera"] for clip in clips} == {"top"}
        assert "depth maps are no colour and were left out: wrist" in caplog.text
        caplog.clear()
        with pytest.raises(UserError, match="--cameras wrist: the source has top"):
            import_dataset(folder, tmp_path / "x", ImportOptions(cameras=("wrist",)))


@pytest.mark.parametrize(
    ("cameras", "depth"),
    [
        (("top", "wrist_depth"), {"wrist_depth"}),
        (("top", "Depth.left", "depth_color", "indepth"), {"Depth.left"}),
        (("depth", "depth_wrist"), set()),  # no other camera is left: but a name
    ],
)
def test_depth_in_colours_is_known_by_its_name(cameras: tuple[str, ...], depth: set[str], tmp_path: Path) -> None:
    """LeRobot itself writes of every camera that it is none."""
    feature = {"dtype": "video", "shape": [48, 192, 3], "info": {"video.is_depth_map": False}}
    folder = lerobot_v2(tmp_path / "robot", episodes=1)
    features = {f"observation.images.{camera}": feature for camera in cameras}
    change(folder / INFO, lambda info: info.update(features=features))
    found = list(lerobot.recordings(folder))
    assert {item.name for item in found if isinstance(item, LeftOut)} == {f"episode_000000/{name}" for name in depth}
    assert len(found) == len(cameras)


def test_pictures_in_lerobots_tables(tmp_path: Path) -> None:
    """Bytes in the table, paths in the table, and files beside it give the same clips; each shows its actions."""

    def by_path(place: Path, data: bytes) -> dict[str, Any]:
        put(tmp_path / "path" / place, data)
        return {"bytes": None, "path": place.as_posix()}

    def by_name(place: Path, data: bytes) -> None:
        put(tmp_path / "files" / place, data)

    folders = [
        as_images(tmp_path / "bytes"),
        as_images(tmp_path / "path", by_path),
        as_images(tmp_path / "files", by_name),
    ]
    made = [run(folder, tmp_path / f"{folder.name}-out", cameras=("top",), **ANY)[1] for folder in folders]
    for clips in made:
        assert len(clips) == 12
        for clip in clips:
            assert [(e, t) for t, e in np.array(clip.controls["actions"]).astype(int)] == seen(clip)
    assert [clip.mp4 for clip in made[0]] == [clip.mp4 for clip in made[1]] == [clip.mp4 for clip in made[2]]


def test_the_size_of_lerobots_chunks_is_obeyed(tmp_path: Path) -> None:
    folder = lerobot_v2(tmp_path / "robot")
    change(folder / INFO, lambda info: info.update(chunks_size=2))
    for path in sorted(folder.rglob("episode_00000[23].*")):
        moved = Path(str(path).replace("chunk-000", "chunk-001"))
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
    report, clips = run(folder, tmp_path / "out", keep_duplicates=True)
    assert not report.unusable and len(clips) == 24


@pytest.mark.parametrize("frame", [0, 11])
def test_an_annotation_without_one_state_lacks_the_clips_that_need_it(frame: int, tmp_path: Path) -> None:
    """A null is never passed over: the states behind it stay those of their frames."""
    folder = annotated(tmp_path / "robot")
    for number, value in enumerate((None, [0.0, None, *[0.0] * 5])):
        path = folder / f"annotation/train/{number}.json"
        change(path, lambda document, value=value: document["states"].__setitem__(frame, value))
    report, clips = run(folder, tmp_path / "out", **ANY)
    assert not report.unusable and report.dropped == {"with a label missing": 6} and len(clips) == 30
    assert all(np.ravel(clip.controls["state"])[0] == seen(clip)[0][1] for clip in clips)


@pytest.mark.parametrize("action", [None, [None, 1.0], [float("nan"), 1.0]])
def test_a_missing_action_spoils_the_clips_that_need_it(action: Any, tmp_path: Path) -> None:
    folder = lerobot_v3(tmp_path / "robot")
    change_rows(folder / ROWS, lambda rows: rows[30].update(action=action))
    report, clips = run(folder, tmp_path / "out", heldout=0.0, **ANY)
    assert not report.unusable and report.dropped == {"with a label missing": 2} and len(clips) == 22
    assert all([(e, t) for t, e in np.array(clip.controls["actions"]).astype(int)] == seen(clip) for clip in clips)


def test_an_action_of_another_length_spoils_one_episode(tmp_path: Path) -> None:
    folder = lerobot_v3(tmp_path / "robot")
    change_rows(folder / ROWS, lambda rows: rows[30].update(action=[1.0]))
    report, clips = run(folder, tmp_path / "out", heldout=0.0, **ANY)
    assert {name for name, _ in report.unusable} == {"episode_000001/top", "episode_000001/wrist"}
    assert all("its action" in reason for _, reason in report.unusable) and len(clips) == 18


@pytest.mark.parametrize(
    ("row", "reason"), [("episode_index", "23 rows, its description 24"), ("timestamp", "timestamp")]
)
def test_a_row_without_its_episode_or_time_spoils_one_episode(row: str, reason: str, tmp_path: Path) -> None:
    folder = lerobot_v3(tmp_path / "robot")
    change_rows(folder / ROWS, lambda rows: rows[30].update({row: None}))
    report, clips = run(folder, tmp_path / "out", heldout=0.0, **ANY)
    assert {name for name, _ in report.unusable} == {"episode_000001/top", "episode_000001/wrist"}
    assert all(reason in why for _, why in report.unusable) and len(clips) == 18


def test_a_video_of_another_rate_than_lerobot_states_is_refused(tmp_path: Path) -> None:
    folder = lerobot_v3(tmp_path / "robot", fps=12)
    change(folder / INFO, lambda info: info.update(fps=10))
    with pytest.raises(UserError, match=r"in row 4, which at 10 rows a second is at 0\.4"):
        run(folder, tmp_path / "out")


def test_every_split_of_lerobot_that_is_not_train_is_held_out(tmp_path: Path) -> None:
    folder = lerobot_v2(tmp_path / "robot")
    change(folder / INFO, lambda info: info.update(splits={"train": "0:2", "val": "2:3", "test": "3:4"}))
    report, _ = run(folder, tmp_path / "out")
    assert {key[:14] for key in keys(report, "heldout")} == {"episode_000002", "episode_000003"}


def test_the_card_names_lerobots_joints_and_other_data_sets_features_are_found(tmp_path: Path) -> None:
    folder = lerobot_v3(tmp_path / "robot")
    change(folder / INFO, lambda info: info["features"].update(actions=info["features"].pop("action")))
    change_rows(folder / ROWS, lambda rows: [row.update(actions=row.pop("action")) for row in rows])
    report, clips = run(folder, tmp_path / "out", keep_duplicates=True)
    told = load_card(report.card).controls["actions"]
    assert "(frame, episode; 12 a second in the source)" in told.holds
    assert (told.width, told.numbers, told.at, told.skipped) == (2, ("frame", "episode"), "transition", "last")
    first = np.concatenate([np.array(clip.controls["actions"]) for clip in clips if clip.key in keys(report, "train")])
    assert np.allclose([told.low, told.high], np.quantile(first, [0.01, 0.99], axis=0), rtol=1e-5)
    assert all("actions" in clip.controls for clip in clips)


def drive(folder: Path, kept: Callable[[int, int], bool]) -> Path:
    """nuScenes without the pictures (number in its scene, scene) that are not kept."""
    drive_files.nuscenes(folder)
    for scene in range(3):
        for camera in ("CAM_FRONT", "CAM_BACK"):
            for number, path in enumerate(sorted(folder.glob(f"s*s/{camera}/scene-{scene:04d}*.jpg"), key=time_of)):
                if not kept(scene, number):
                    path.unlink()
    return folder


def time_of(path: Path) -> int:
    return int(path.stem.rpartition("__")[2])


def test_key_frames_alone_are_clips_at_two_a_second(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    folder = drive(tmp_path / "nu", lambda scene, number: number % 6 == 0 or number == 1)
    report, clips = run(folder, tmp_path / "out", heldout=0.0, frames=4, keep_duplicates=True)
    assert report.clips == {"train": 12} and "of 6 cameras' scenes key frames alone" in caplog.text
    for clip in clips:
        assert clip.fps == 2 and np.diff([frame for _, frame in seen(clip)]).tolist() == [6, 6, 6]
        assert np.allclose(clip.controls["trajectory"], [circle(k / 2) for k in range(4)], atol=0.02)


def test_a_missing_sweep_costs_a_cut_and_not_the_scene(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = drive(tmp_path / "nu", lambda scene, number: (scene, number) != (1, 20))
    report, clips = run(folder, tmp_path / "out", heldout=0.0, keep_duplicates=True)
    assert not report.unusable and "2 pictures are missing (sweeps/CAM_BACK/scene-0001" in caplog.text
    shown = {(clip.key.split("-0")[0], *place) for clip in clips for place in seen(clip)}
    assert all((place[1], place[2]) != (1, 20) for place in shown)
    assert {place[2] for place in shown if place[1] == 1} == {*range(16), *range(21, 45)}


def test_a_camera_without_pictures_or_poses_is_named(tmp_path: Path) -> None:
    folder = drive(tmp_path / "nu", lambda scene, number: scene != 1)

    def no_place(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["token"] == "scene-0002-CAM_BACK-5").pop("rotation")

    change(folder / "v1.0-mini/ego_pose.json", no_place)
    report, _ = run(folder, tmp_path / "out", heldout=0.0, keep_duplicates=True, error_budget=1.0)
    reasons = dict(report.unusable)
    assert set(reasons) == {"scene-0001/CAM_FRONT", "scene-0001/CAM_BACK", "scene-0002/CAM_BACK"}
    assert "there is no samples/CAM_BACK" in reasons["scene-0001/CAM_BACK"]
    assert "a row is damaged (KeyError('rotation'))" in reasons["scene-0002/CAM_BACK"]
