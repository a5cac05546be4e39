"""Pictures: sizes, places, marks, and an mp4 that plays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from scenes import lane_change, road
from scipy.ndimage import gaussian_filter

from anyflow.evaluation.report.picture import (
    CELL_WIDTH,
    GAP,
    GIVEN,
    NOTE_HEIGHT,
    RIGHT,
    WRONG,
    Grid,
    Prompt,
    _Layout,
    moving,
    save_mp4,
    save_png,
    still,
    strips,
    write_mp4,
)

LEFT, TURN = lane_change(-18.0), lane_change(18.0)
PROMPTS = [
    Prompt("The car changes left. " * 3, "driving", {"manoeuvre": "left"}),
    Prompt("Something else.", "cooking", {}),
]


def _grid(*names: str, steps: tuple[int, ...] = (1, 4), real: bool = True) -> Grid:
    clips = np.stack([LEFT, TURN])
    return Grid(
        PROMPTS, {name: dict.fromkeys(steps, clips) for name in names}, clips if real else None, title="Samples"
    )


def _has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(-1).any())


def test_a_second_model_adds_rows_and_more_steps_add_columns() -> None:
    one, two = still(_grid("after")), still(_grid("before", "after"))
    wide = still(_grid("after", steps=(1, 4, 8, 16, 32)))
    assert two.height - one.height == 2 * (CELL_WIDTH * 64 // 96 + GAP)
    assert wide.width > one.width
    for picture in (one, two, wide):
        assert picture.width % 2 == 0 and picture.height % 2 == 0


def test_given_frames_are_framed() -> None:
    given, free = replace(_grid("after"), given=1), _grid("after")
    assert _has(np.asarray(still(given)), GIVEN) and not _has(np.asarray(still(free)), GIVEN)
    framed = [_has(frame, GIVEN) for frame in moving(given)]
    assert framed == [True, *[False] * (len(framed) - 1)]
    assert strips(PROMPTS[:1], {1: LEFT[None]}, given=5).heading(0) == "0.0 s, given"


def test_right_and_wrong_motions_are_marked() -> None:
    picture = np.asarray(still(Grid(PROMPTS[:1], {"": {1: LEFT[None]}})))
    assert _has(picture, RIGHT) and not _has(picture, WRONG)
    for wrong in (TURN, road()):
        picture = np.asarray(still(Grid(PROMPTS[:1], {"": {1: wrong[None]}})))
        assert _has(picture, WRONG) and not _has(picture, RIGHT)


def test_a_prompt_without_attributes_or_probe_has_no_mark() -> None:
    for prompt in (Prompt("Any text."), Prompt("Any text.", "cooking", {"manoeuvre": "left"})):
        picture = np.asarray(still(Grid([prompt], {"": {1: LEFT[None]}})))
        assert not _has(picture, RIGHT) and not _has(picture, WRONG)


def test_nothing_is_read_where_the_attributes_name_no_motion() -> None:
    """Its samples may show any, and a line over them would seem to judge them."""
    left_open = Prompt("Footage of driving.", "driving", {"seed": 3})
    assert Prompt("A car.", "driving").is_read and not left_open.is_read
    picture, bare = (
        np.asarray(still(Grid([prompt], {"": {1: LEFT[None]}}))) for prompt in (left_open, Prompt(left_open.caption))
    )
    assert np.array_equal(picture, bare)


def test_the_moving_grid_shows_each_frame_and_holds_the_end_of_a_shorter_clip() -> None:
    grid = Grid(PROMPTS[:1], {"": {1: LEFT[None], 4: LEFT[None, :5]}})
    frames = list(moving(grid))
    assert len(frames) == 17 and frames[0].dtype == np.uint8 and frames[0].shape[2] == 3
    assert not np.array_equal(frames[0], frames[4])
    half = frames[0].shape[1] - CELL_WIDTH - GAP - 10
    assert np.array_equal(frames[5][:, half:], frames[16][:, half:])


def test_strips_show_each_step_counts_clip_in_time() -> None:
    clips = np.stack([LEFT, TURN])
    grid = strips(PROMPTS, {1: clips, 16: clips[:, :9]}, moments=3, fps=8)
    assert list(grid.variants) == ["1 step", "16 steps"] and grid.headings == {0: "0.0 s", 4: "0.5 s", 8: "1.0 s"}
    assert np.array_equal(grid.variants["1 step"][8][1, 0], TURN[8])
    picture = np.asarray(still(grid))
    assert not _has(picture, RIGHT) and not _has(picture, WRONG)


def test_files_are_written_and_the_mp4_decodes(tmp_path: Path) -> None:
    grid = Grid(PROMPTS[:1], {"": {1: LEFT[None, :5]}}, title="One")
    save_png(grid, tmp_path / "a.png")
    save_mp4(grid, tmp_path / "a.mp4", fps=8, loops=2, hold=3)
    picture = still(grid)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert (
        stream.codec_context.pix_fmt == "yuv420p" and stream.codec_context.name == "h264" and stream.average_rate == 8
    )
    assert len(frames) == 2 * (5 + 3) and frames[0].shape[:2] == (picture.height, picture.width)
    assert np.abs(frames[4].astype(int) - next(iter(moving(grid)))).mean() < 4


def test_clips_that_do_not_match_the_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts"):
        Grid(PROMPTS, {"": {1: LEFT[None]}})


def test_a_note_stands_above_its_sample_and_moves_no_other() -> None:
    """Each cell moves down by the notes' rows; only the strip above the noted one has ink."""
    plain = Grid(PROMPTS[:1], {"one": {1: LEFT[None]}, "two": {1: LEFT[None]}})
    noted = replace(plain, notes={"two": {1: "75 %"}}, notes_say="whole cars")
    first, second = (list(_Layout(grid).cells()) for grid in (plain, noted))
    assert [cell.box[1] for cell in second] == [cell.box[1] + NOTE_HEIGHT * (row + 1) for row, cell in enumerate(first)]
    page = np.asarray(still(noted))
    strips_of = [page[y - NOTE_HEIGHT : y - 2, x : x + width] for x, y, width, _ in (cell.box for cell in second)]
    assert strips_of[0].min() == 255 and strips_of[1].min() < 100


def test_the_same_frames_are_the_same_film(tmp_path: Path) -> None:
    """Else no two samples could be compared by their files; x264's look-ahead broke this on soft, moving noise."""
    noise = gaussian_filter(np.random.default_rng(0).random((17, 64, 96, 3)), (1, 3, 3, 0))
    frames = list(((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8))
    files = [tmp_path / f"{run}.mp4" for run in range(12)]
    for file in files:
        write_mp4(file, frames, 8.0)
        assert file.read_bytes() == files[0].read_bytes()
