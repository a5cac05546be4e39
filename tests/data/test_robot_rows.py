"""LeRobot's rows: which picture, which moment and which task each belongs to; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from footage_files import TASKS, lerobot_v2, lerobot_v3, put
from robot_files import as_images, change, change_rows
from test_importers import run, seen

from anyflow.errors import UserError

ANY = {"error_budget": 1.0, "keep_duplicates": True, "heldout": 0.0}
INFO = "meta/info.json"
V2, V3 = "data/chunk-000/episode_000001.parquet", "data/chunk-000/file-000.parquet"


@pytest.mark.parametrize("by", [0.25, 3.0])
def test_rows_that_are_not_of_the_frames_one_by_one_spoil_their_episode(by: float, tmp_path: Path) -> None:
    """The table pauses or drifts where the video does not: no clip gets the actions of other pictures."""
    folder = lerobot_v2(tmp_path / "robot")
    change_rows(folder / V2, lambda rows: [row.update(timestamp=row["timestamp"] + by) for row in rows[9:]])
    report, clips = run(folder, tmp_path / "out", **ANY)
    assert [name for name, _ in report.unusable] == ["episode_000001/top", "episode_000001/wrist"]
    assert "in row 9, which at 12 rows a second is at 0.75: which row belongs to" in report.unusable[0][1]
    assert len(clips) == 18
    assert all([(e, t) for t, e in np.array(clip.controls["actions"]).astype(int)] == seen(clip) for clip in clips)


def test_a_clock_that_jitters_less_than_half_a_frame_names_its_frames(tmp_path: Path) -> None:
    folder = lerobot_v2(tmp_path / "robot")
    change_rows(folder / V2, lambda rows: [row.update(timestamp=row["timestamp"] + 0.03) for row in rows[::2]])
    report, clips = run(folder, tmp_path / "out", **ANY)
    assert not report.unusable and len(clips) == 24
    assert all([(e, t) for t, e in np.array(clip.controls["actions"]).astype(int)] == seen(clip) for clip in clips)


def test_pictures_in_the_rows_pause_with_them(tmp_path: Path) -> None:
    folder = as_images(tmp_path / "robot")
    change_rows(folder / V3, lambda rows: [row.update(timestamp=row["timestamp"] + 3) for row in rows[9:24]])
    report, clips = run(folder, tmp_path / "out", cameras=("top",), **ANY)
    assert not report.unusable and len(clips) == 3 * 3 + 2
    assert all([(e, t) for t, e in np.array(clip.controls["actions"]).astype(int)] == seen(clip) for clip in clips)


def two_tasks(folder: Path, write: Any) -> Path:
    """Episode 1 is of the first task for 10 rows, then of the second."""
    write(folder)
    if write is lerobot_v2:
        lines = (
            (folder / "meta/episodes.jsonl").read_text().replace(f'["{TASKS[1]}"]', f'["{TASKS[0]}", "{TASKS[1]}"]', 1)
        )
        put(folder / "meta/episodes.jsonl", lines)
    else:
        path = folder / "meta/episodes/chunk-000/file-000.parquet"
        change_rows(path, lambda rows: rows[1].update(tasks=list(TASKS)))
    table, first = (V2, 0) if write is lerobot_v2 else (V3, 24)
    change_rows(folder / table, lambda rows: [row.update(task_index=0) for row in rows[first : first + 10]])
    return folder


@pytest.mark.parametrize("views", ["apart", "wide"])
@pytest.mark.parametrize("write", [lerobot_v2, lerobot_v3])
def test_a_clip_has_the_task_of_its_own_rows(write: Any, views: str, tmp_path: Path) -> None:
    """Frames 0 to 9 are of one task, 10 to 23 of another: no clip bridges the two, and labels stay with pictures."""
    report, clips = run(two_tasks(tmp_path / "robot", write), tmp_path / "out", frames=5, views=views, **ANY)
    assert not report.unusable
    one = [clip for clip in clips if clip.key.startswith("episode_000001")]
    for clip in one:
        rows = np.array(clip.controls["actions"]).astype(int)
        task = TASKS[0] if rows[-1, 0] < 10 else TASKS[1]
        assert (clip.caption, clip.attributes["task"]) == (task, task) and set(rows[:, 1]) == {1}
        assert views == "wide" or [(e, t) for t, e in rows] == seen(clip)
    cameras = 1 if views == "wide" else 2
    assert sorted(clip.controls["actions"][0][0] for clip in one) == sorted([0, 5, 10, 15] * cameras)


@pytest.mark.parametrize("damage", ["tasks", "column"])
def test_tasks_that_no_row_tells_are_joined_and_told(damage: str, tmp_path: Path) -> None:
    folder = two_tasks(tmp_path / "robot", lerobot_v2)
    if damage == "tasks":
        (folder / "meta/tasks.jsonl").unlink()
    else:
        change_rows(folder / V2, lambda rows: [row.pop("task_index") for row in rows])
    report, clips = run(folder, tmp_path / "out", **ANY)
    assert {clip.caption for clip in clips if clip.key.startswith("episode_000001")} == {"; ".join(TASKS)}
    assert any("every clip has all of them (2: episode_000001/top" in note for note in report.notes), report.notes


@pytest.mark.parametrize("version", ["2.1", "V2.0"])
def test_a_version_may_lack_its_letter(version: str, tmp_path: Path) -> None:
    folder = lerobot_v2(tmp_path / "robot", episodes=2)
    change(folder / INFO, lambda info: info.update(codebase_version=version))
    assert len(run(folder, tmp_path / "out", **ANY)[1]) == 12


@pytest.mark.parametrize(
    "path", ["{episode_index.__class__}", "{episode_index[0]}", "{0}", "{episode_index!r}", "{episode_index:09999999d}"]
)
def test_a_path_asks_for_plain_fields_alone(path: str, tmp_path: Path) -> None:
    folder = lerobot_v2(tmp_path / "robot", episodes=2)
    change(folder / INFO, lambda info: info.update(data_path=path))
    with pytest.raises(UserError, match=r"info\.json is damaged.*is no plain field"):
        run(folder, tmp_path / "out", **ANY)


@pytest.mark.parametrize("rows", [[0], [11], [5, 6], list(range(24))])
def test_a_damaged_picture_costs_the_clips_that_need_it(rows: list[int], tmp_path: Path) -> None:
    """What comes before and after is kept, each with its own actions; the first damaged row is named."""
    folder = as_images(tmp_path / "robot")

    def damage(table: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows):
            table[24 + row]["observation.images.top"] = {"bytes": None if number % 2 else b"\xff\xd8 no picture"}

    change_rows(folder / V3, damage)
    report, clips = run(folder, tmp_path / "out", cameras=("top",), **ANY)
    one = [clip for clip in clips if clip.key.startswith("episode_000001")]
    shown = [frame for clip in one for _, frame in seen(clip)]
    assert not set(shown) & set(rows) and len(one) == {1: 2, 2: 2, 24: 0}[len(rows)]
    assert all([(e, t) for t, e in np.array(clip.controls["actions"]).astype(int)] == seen(clip) for clip in clips)
    told = str(report.unusable if len(rows) == 24 else report.notes)
    assert f"row {rows[0]} holds no picture" in told and "none>" not in told
