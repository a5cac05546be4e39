"""Importers: each format, written as it is published, gives clips that show what their controls and captions say."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import drive_files
import numpy as np
import pytest
from drive_files import SPEED, TURN, circle
from footage_files import (
    TASKS,
    lerobot_v2,
    lerobot_v3,
    put,
    put_csv,
    put_lines,
    put_tar,
    read_frame,
    video,
)

from anyflow.data.card import check_shards, load_card
from anyflow.data.clip import Clip
from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.importing.finish import ImportReport
from anyflow.data.importing.formats import bdd100k, gf_minecraft, huggingface
from anyflow.data.importing.formats.known import FORMATS, detect_format, snapshot, source_of
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import Recording, VideoFile
from anyflow.data.importing.run import import_dataset
from anyflow.data.shards import load_index, read_clip
from anyflow.errors import UserError

FRAMES = 8
DEFAULT = "Footage."


def run(folder: Path, out: Path, **options: Any) -> tuple[ImportReport, list[Clip]]:
    """Import in this process; the report and all clips, held-out ones last."""
    chosen = ImportOptions(**{"frames": FRAMES, "workers": 0, "heldout": 0.3, "scene_cuts": 0.0, **options})
    report = import_dataset(folder, out, chosen)
    card = load_card(report.card)
    assert check_shards(card) == []
    clips = [
        read_clip(card.splits[split], shard, sample)
        for split in card.splits
        for shard, sample in load_index(card.splits[split])
    ]
    assert len(clips) == sum(report.clips.values())
    return report, clips


def seen(clip: Clip) -> list[tuple[int, int]]:
    """(episode, frame) read from every picture of a clip."""
    assert clip.mp4 is not None
    card_size = decode_clip(
        clip.mp4, ClipShape(len(next(iter(clip.controls.values()))) if clip.controls else FRAMES, 48, 192)
    )
    return [read_frame(image) for image in card_size]


def by_key(clips: list[Clip]) -> dict[str, Clip]:
    return {clip.key: clip for clip in clips}


@pytest.mark.parametrize("write", [lerobot_v3, lerobot_v2])
def test_lerobot(write: Any, tmp_path: Path) -> None:
    report, clips = run(write(tmp_path / "robot"), tmp_path / "out", keep_duplicates=True)
    assert report.format == "lerobot" and report.recordings == 8  # 4 episodes, 2 cameras
    assert len(clips) == 24  # 24 frames each, 3 clips of 8
    assert {clip.attributes["camera"] for clip in clips} == {"top", "wrist"}
    assert {clip.domain for clip in clips} == {"robotics"}
    for clip in clips:
        actions = np.array(clip.controls["actions"])
        assert [tuple(row) for row in actions.astype(int)] == [(t, e) for e, t in seen(clip)]
        assert clip.controls["state"] == actions[:, ::-1].tolist()
        episode = int(actions[0, 1])
        assert clip.caption == TASKS[episode % 2] and clip.attributes["task"] == clip.caption
    held = {sample.key[:14] for _, sample in load_index(report.card.parent / "heldout")}
    train = {sample.key[:14] for _, sample in load_index(report.card.parent / "train")}
    assert len(held) == 1 and not held & train  # whole episodes, both cameras


def test_lerobot_at_another_rate_shows_the_frames_of_its_times(tmp_path: Path) -> None:
    """12 frames/s to 8: output k shows source frame floor(1.5 k), and so do its actions."""
    _, clips = run(lerobot_v3(tmp_path / "robot"), tmp_path / "out", fps=8, cameras=("top",))
    for clip in clips:
        frames = [frame for _, frame in seen(clip)]
        assert frames == [int(action[0]) for action in clip.controls["actions"]]
        assert np.diff(frames).tolist() in ([1, 2, 1, 2, 1, 2, 1], [2, 1, 2, 1, 2, 1, 2])


def test_lerobots_own_split_is_kept(tmp_path: Path) -> None:
    folder = lerobot_v2(tmp_path / "robot")
    info = json.loads((folder / "meta/info.json").read_text())
    put(folder / "meta/info.json", {**info, "splits": {"train": "0:3", "val": "3:4"}})
    report, _ = run(folder, tmp_path / "out", heldout=0.9)
    held = {sample.key for _, sample in load_index(report.card.parent / "heldout")}
    assert {key[:14] for key in held} == {"episode_000003"}


def test_nuscenes(tmp_path: Path) -> None:
    report, clips = run(drive_files.nuscenes(tmp_path / "nu"), tmp_path / "out", cameras=("CAM_FRONT",), fps=6)
    assert report.format == "nuscenes" and report.recordings == 3 and len(clips) == 9
    for clip in clips:
        scene, first = seen(clip)[0]
        assert [frame for _, frame in seen(clip)] == list(range(first, first + 16, 2))  # 12 pictures/s to 6
        assert clip.caption == f"Turning left, drive {scene}" and clip.attributes["location"] == "boston-seaport"
        # Whatever the place and heading of the scene, a path begins at the origin, straight ahead.
        expected = [circle(k / 6) for k in range(FRAMES)]
        assert np.allclose(clip.controls["trajectory"], expected, atol=0.02)
        assert np.allclose(clip.controls["speed"], SPEED, rtol=0.02)
        assert np.allclose(clip.controls["steering"], [(first / 12 + k / 6) * 10 for k in range(FRAMES)], atol=0.2)


def test_comma2k19(tmp_path: Path) -> None:
    report, clips = run(drive_files.comma2k19(tmp_path / "comma"), tmp_path / "out", default_caption="domain")
    assert report.format == "comma2k19" and report.recordings == 4 and len(clips) == 20
    for clip in clips:
        first = seen(clip)[0][1]
        assert [frame for _, frame in seen(clip)] == list(range(first, first + FRAMES))
        assert np.allclose(clip.controls["trajectory"], [circle(k / 20) for k in range(FRAMES)], atol=0.02)
        assert np.allclose(clip.controls["speed"], SPEED)
        assert np.allclose(clip.controls["steering"], [(first + k) / 20 for k in range(FRAMES)], atol=1e-3)
    card = load_card(report.card)
    assert card.caption == "Footage of a drive, from a camera on the car."
    routes = [{s.key.split("_3")[0][:60] for _, s in load_index(card.splits[split])} for split in card.splits]
    assert not {key[8:45] for key in routes[0]} & {key[8:45] for key in routes[1]}  # whole routes


def test_bdd100k(tmp_path: Path) -> None:
    caption = "Driving at {timeofday} in {weather} weather, {scene}."
    report, clips = run(drive_files.bdd100k(tmp_path / "bdd"), tmp_path / "out", caption=caption)
    assert report.format == "bdd100k" and len(clips) == 15
    for clip in clips:
        assert clip.caption == "Driving at night in rainy weather, city street."
        assert np.allclose(clip.controls["speed"], SPEED)
        path = np.array(clip.controls["trajectory"])
        assert np.allclose(path[:, 2], TURN * np.arange(FRAMES) / 10, atol=0.05)
        assert np.allclose(path[-1, 0], SPEED * 0.7, rtol=0.03)  # fixes once a second: chords of the circle


def test_bdd100k_where_gps_knows_no_course_or_speed(tmp_path: Path) -> None:
    """-1 stands for what is not known: that fix is left out of what it is not known of."""
    fix = {"latitude": 40.0, "longitude": -73.0, "course": 90.0, "speed": 5.0, "accuracy": 5}
    changes: list[dict[str, float]] = [{}, {"course": -1}, {"speed": -1, "course": -1}, {}]
    fixes = [{**fix, "timestamp": 1000 + 1000 * number, **change} for number, change in enumerate(changes)]
    info = put(tmp_path / "info.json", {"rideID": "r", "startTime": 1000, "endTime": 5000, "locations": fixes})
    tracks = bdd100k.controls(tmp_path, Recording("a", "a", VideoFile("a.mov"), details={"info": str(info)}))
    assert tracks["speed"].times.tolist() == [0, 1, 3] and tracks["trajectory"].times.tolist() == [0, 3]


def test_gf_minecrafts_frames_are_numbered_by_their_keys(tmp_path: Path) -> None:
    actions = {str(number): {"ws": 1, "yaw_delta": float(number)} for number in (12, 3, 2, 5, 4)}
    metadata = put(tmp_path / "m.json", {"biome": "plains", "actions": actions})
    details = {"metadata": str(metadata), "first": 3, "last": 6, "fps": 16.0}
    tracks = gf_minecraft.controls(tmp_path, Recording("a", "a", VideoFile("a.mp4"), details=details))
    assert [action["yaw_delta"] for action in tracks["actions"].values] == [3.0, 4.0, 5.0]
    assert (tracks["actions"].times * 16).tolist() == [0, 1, 2]
    with pytest.raises(DecodeError, match="no actions for the frames 20 to 30"):
        gf_minecraft.controls(
            tmp_path, Recording("a", "a", VideoFile("a.mp4"), details={**details, "first": 20, "last": 30})
        )


def test_vpt(tmp_path: Path) -> None:
    report, clips = run(drive_files.vpt(tmp_path / "vpt"), tmp_path / "out", default_caption="domain")
    assert report.format == "vpt" and len(clips) == 15 and {clip.domain for clip in clips} == {"games"}
    for clip in clips:
        frames = [frame for _, frame in seen(clip)]
        actions = clip.controls["actions"]
        assert [action["dx"] for action in actions] == frames
        assert [action["keys"] for action in actions] == [["w"] if frame % 2 == 0 else [] for frame in frames]
        assert clip.controls["mouse"] == [[frame, 0] for frame in frames]
        assert clip.controls["keys"] == [[frame % 2 == 0, *[0] * 22] for frame in frames]
        assert [place[0] for place in clip.controls["trajectory"]] == frames


@pytest.mark.parametrize("fps", [10.0, 40.0, 15.0])
def test_a_mouses_way_stays_whole_at_another_rate(tmp_path: Path, fps: float) -> None:
    """And a key that was held for one tick of several was held."""
    folder = drive_files.vpt(tmp_path / "vpt")
    report, clips = run(folder, tmp_path / "out", default_caption="domain", fps=fps)
    assert len(clips) > 3
    for clip in clips:
        shown = [frame for _, frame in seen(clip)]
        after = [*shown[1:], None]
        for frame, following, moved, keys in zip(
            shown, after, clip.controls["mouse"], clip.controls["keys"], strict=True
        ):
            if following is not None:
                ticks = range(frame, following)
                assert moved == [sum(ticks), 0], (shown, clip.controls["mouse"])
                assert keys[0] == any(tick % 2 == 0 for tick in ticks or [frame])
    again, same = run(report.card.parent, tmp_path / "again", fps=fps / 2, frames=4, default_caption=DEFAULT)
    for clip in same:
        ticks = [int(place[0]) for place in clip.controls["trajectory"]]
        assert clip.controls["mouse"][:-1] == [[sum(range(*pair)), 0] for pair in pairwise(ticks)]
    assert load_card(again.card).controls["mouse"].skipped == "sum"
    card = load_card(report.card)
    assert card.controls["mouse"].skipped == "sum" and card.controls["mouse"].high[0] > 0
    assert card.controls["keys"].numbers[0] == "forward" and card.controls["keys"].high == (1.0,) * 23
    assert isinstance(card.controls["actions"], str)


def test_gf_minecraft(tmp_path: Path) -> None:
    report, clips = run(drive_files.gf_minecraft(tmp_path / "gf"), tmp_path / "out")
    assert report.format == "gf-minecraft" and report.recordings == 4 and len(clips) == 8
    for clip in clips:
        frames = [frame for _, frame in seen(clip)]
        assert [action["yaw_delta"] for action in clip.controls["actions"]] == frames
        assert clip.controls["camera"] == [[0, frame] for frame in frames]
        assert clip.controls["keys"] == [[1, 0, 0, 0, 0, 0, 0]] * len(frames)
        assert clip.caption.endswith("part 0." if frames[0] < 20 else "part 20.")
        assert clip.attributes["biome"] == "plains"


def test_cosmos_leaves_pickles_shut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report, clips = run(drive_files.cosmos(tmp_path / "cosmos"), tmp_path / "out", domain="robotics")
    assert report.format == "cosmos" and sorted({clip.caption for clip in clips}) == [
        f"A robot, take {n}." for n in range(3)
    ]
    assert "3 pickles were not opened" in caplog.text


def plain_videos(folder: Path, count: int = 4, frames: int = FRAMES) -> Path:
    for number in range(count):
        put(folder / f"v{number}.mp4", video(number, frames, 8))
    return folder


def test_texts_beside_videos(tmp_path: Path) -> None:
    folder = plain_videos(tmp_path / "plain")
    for number in range(4):
        put(folder / f"v{number}.txt", f"Video\n {number} ")
    report, clips = run(folder, tmp_path / "out", domain="games")
    assert report.format == "folder"
    assert {clip.key: clip.caption for clip in clips} == {f"v{n}-0000": f"Video {n}" for n in range(4)}
    assert all(seen(clip) == [(seen(clip)[0][0], t) for t in range(FRAMES)] for clip in clips)


def test_a_file_that_is_a_clip_already_is_kept_as_it_is(tmp_path: Path) -> None:
    folder = plain_videos(tmp_path / "plain")
    put(folder / "v3.mov", video(3, FRAMES, 8, format="mov"))
    (folder / "v3.mp4").unlink()
    _, clips = run(folder, tmp_path / "out", default_caption=DEFAULT)
    files = {path.stem: path.read_bytes() for path in folder.iterdir()}
    kept = {clip.key: clip.mp4 == files[clip.key[:2]] for clip in clips}
    assert kept == {"v0-0000": True, "v1-0000": True, "v2-0000": True, "v3-0000": False}


@pytest.mark.parametrize(("gop", "kept"), [(30, True), (40, False)])
def test_key_frames_far_apart_are_encoded_anew(gop: int, kept: bool, tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"plain/v{number}.mp4", video(number, 40, 8, gop=gop))
    _, clips = run(tmp_path / "plain", tmp_path / "out", default_caption=DEFAULT, frames=40)
    assert [clip.mp4 == (tmp_path / f"plain/{clip.key[:2]}.mp4").read_bytes() for clip in clips] == [kept, kept]


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "metadata.json"])
def test_tables(table: str, tmp_path: Path) -> None:
    folder = plain_videos(tmp_path / "plain")
    rows = [{"file_name": f"v{n}.mp4", "text": f"Video {n}, with a comma", "weather": "sun"} for n in range(4)]
    {"csv": put_csv, "jsonl": put_lines, "json": put}[table.split(".")[1]](folder / table, rows)
    _, clips = run(folder, tmp_path / "out")
    assert {clip.caption for clip in clips} == {f"Video {n}, with a comma" for n in range(4)}
    assert {clip.attributes["weather"] for clip in clips} == {"sun"}


def test_lists(tmp_path: Path) -> None:
    folder = plain_videos(tmp_path / "plain")
    put(folder / "videos.txt", "".join(f"v{n}.mp4\n" for n in range(4)))
    put(folder / "captions.txt", "".join(f"Video {n}\n" for n in range(4)))
    _, clips = run(folder, tmp_path / "out")
    assert {clip.key: clip.caption for clip in clips} == {f"v{n}-0000": f"Video {n}" for n in range(4)}
    put(folder / "captions.txt", "one line\n")
    with pytest.raises(UserError, match=r"videos.txt has 4 lines and captions.txt 1"):
        run(folder, tmp_path / "again")


def test_split_folders_and_a_licence_of_a_hugging_face_data_set(tmp_path: Path) -> None:
    revision = tmp_path / "datasets--me--mine/snapshots/abc"
    put(tmp_path / "datasets--me--mine/refs/main", "abc")
    put(revision / "README.md", "---\nlicense: cc-by-4.0\n---\n# Mine\n")
    for split, numbers in (("train", (0, 1, 2)), ("test", (3,))):
        rows = [{"file_name": f"v{n}.mp4", "text": f"Video {n}"} for n in numbers]
        put_csv(revision / split / "metadata.csv", rows)
        for number in numbers:
            put(revision / split / f"v{number}.mp4", video(number, FRAMES, 8))
    assert snapshot(tmp_path / "datasets--me--mine") == revision
    report, _ = run(tmp_path / "datasets--me--mine", tmp_path / "out", heldout=0.5)
    assert report.clips == {"train": 3, "heldout": 1}
    assert load_card(report.card).licence == "cc-by-4.0"


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_videos_in_parquet_tables(kind: str, tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    files = [video(number, FRAMES, 8) for number in range(4)]
    cells = [{"bytes": data, "path": None} for data in files] if kind == "struct" else files
    if kind == "struct":  # a path alone is followed, within the folder
        put(tmp_path / "hf/data/v0.mp4", files[0])
        cells[0] = {"bytes": None, "path": "v0.mp4"}
    table = arrow.table({"video": cells, "caption": [f"Video {n}" for n in range(4)]})
    (tmp_path / "hf/data").mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, tmp_path / "hf/data/train-00000-of-00001.parquet", row_group_size=3)
    report, clips = run(tmp_path / "hf", tmp_path / "out", heldout=0.0)
    assert report.format == "huggingface" and report.clips == {"train": 4}
    assert [clip.caption for clip in clips] == [f"Video {n}" for n in range(4)]
    assert [seen(clip)[0][0] for clip in clips] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("table", "split"),
    [
        ("data/validation-00000-of-00002", "heldout"),
        ("data/test_0", "heldout"),
        ("default/test/0000", "heldout"),  # as the hub itself converts data sets
        ("default/train/0000", "train"),
        ("test/train-00000-of-00001", "train"),
        ("data/testimony", None),
    ],
)
def test_the_split_of_a_parquet_table_is_told_by_its_name_or_folder(
    table: str, split: str | None, tmp_path: Path
) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = put(tmp_path / f"{table}.parquet", b"")
    parquet.write_table(arrow.table({"video": [b"x"], "caption": ["c"]}), path)
    assert [item.split for item in huggingface.recordings(tmp_path) if isinstance(item, Recording)] == [split]


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard in range(2):
        members = []
        for number in (2 * shard, 2 * shard + 1):
            members += [(f"s{number}.mp4", video(number, FRAMES, 8)), (f"s{number}.txt", f"Video {number}".encode())]
            members.append((f"s{number}.json", json.dumps({"weather": "sun", "caption": "not this one"}).encode()))
        put_tar(tmp_path / f"wds/{shard:05d}.tar", members)
    report, clips = run(tmp_path / "wds", tmp_path / "out", domain="driving")
    assert report.format == "webdataset" and report.clips == {"train": 2, "heldout": 2}  # a tar is a group
    assert {clip.caption for clip in clips} == {f"Video {n}" for n in range(4)}
    assert {clip.attributes["weather"] for clip in clips} == {"sun"}


def test_our_own_shards_come_back_with_their_controls(tmp_path: Path) -> None:
    first, clips = run(lerobot_v2(tmp_path / "robot"), tmp_path / "first", cameras=("top",))
    second, again = run(first.card.parent, tmp_path / "second", format="webdataset")
    assert second.clips == first.clips
    old = {clip.caption + str(clip.controls["actions"][0]): clip for clip in clips}
    for clip in again:
        before = old[clip.caption + str(clip.controls["actions"][0])]
        assert clip.controls == before.controls and clip.mp4 == before.mp4


@pytest.mark.parametrize("name", FORMATS)
def test_no_importer_takes_an_empty_folder(name: str, tmp_path: Path) -> None:
    assert not source_of(name).detect(tmp_path)
    assert not source_of(name).detect(tmp_path / "missing")


def test_an_unknown_folder_is_told_what_was_looked_for(tmp_path: Path) -> None:
    put(tmp_path / "x/readme.txt", "nothing")
    with pytest.raises(UserError, match=r"none of the known formats.*lerobot: meta/info.json.*Name one by --format"):
        detect_format(tmp_path / "x")
    with pytest.raises(UserError, match="is no folder"):
        detect_format(tmp_path / "missing")
    with pytest.raises(UserError, match="not in the format 'lerobot'"):
        import_dataset(tmp_path / "x", tmp_path / "out", ImportOptions(format="lerobot"))
