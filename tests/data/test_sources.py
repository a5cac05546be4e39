"""The simulated sources: reproducible, apart from each other, labelled by what is seen. Skipped without a simulator."""

from __future__ import annotations

import ctypes.util
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyflow.data.clip import Clip
from anyflow.data.decode import ClipShape, decode_clip
from anyflow.errors import UserError
from anyflow.simulators import arena, driving, driving_open, games, robotics
from anyflow.simulators import simulated as sources
from anyflow.system.pool import run_jobs

REASON = "the simulators are an extra of their own: pip install .[sim]"
SHAPE = ClipShape(17, 64, 96)
COUNTRY, HIGH = driving.LOOKS["country"], arena.LOOKS["high"]


def need(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module, reason=REASON)


def frames_of(clip: Clip) -> np.ndarray:
    assert clip.mp4 is not None
    return decode_clip(clip.mp4, SHAPE)


def test_run_jobs_keeps_order() -> None:
    assert list(run_jobs(math.factorial, range(5), workers=1)) == [1, 1, 2, 6, 24]


def die_once(job: tuple[Path, int]) -> int:
    marker, number = job
    if number == 2 and not marker.exists():
        marker.touch()
        os._exit(9)
    return number


def test_a_killed_process_is_replaced_and_its_jobs_are_done_again(tmp_path: Path) -> None:
    jobs = [(tmp_path / "died", number) for number in range(5)]
    assert list(run_jobs(die_once, jobs, workers=1)) == [0, 1, 2, 3, 4] and jobs[0][0].exists()


def test_processes_that_die_again_and_again_are_told() -> None:
    with pytest.raises(UserError, match="was killed 3 times"):
        list(run_jobs(os._exit, [9, 9], workers=1))


def test_clips_never_share_a_generator() -> None:
    draws = [
        sources.clip_generator(seed, split, number).random()
        for seed in (0, 1)
        for split in sources.SPLITS
        for number in range(3)
    ]
    assert len(set(draws)) == len(draws)


def test_area_downscale_is_the_mean() -> None:
    image = np.zeros((4, 2, 3), dtype=np.uint8)
    image[:2] = [[[0, 8, 1], [4, 8, 1]], [[8, 8, 1], [12, 8, 2]]]
    assert sources.area_downscale(image, 2).tolist() == [[[6, 8, 1]], [[0, 0, 0]]]


def test_a_missing_package_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"'flying-cars' is needed.*make data"):
        sources.need_package("no_such_module", "flying-cars")


def test_missing_osmesa_names_the_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match="libosmesa6"):
        next(robotics.render(1, "train", 0, 1))


@pytest.mark.parametrize("manoeuvre", ["keep", "left", "right"])
@pytest.mark.parametrize("speed", ["slow", "fast"])
def test_driving_manoeuvres_complete(manoeuvre: str, speed: str) -> None:
    """A lane change moves the car by one lane, 4 m, within the clip; keeping moves it not at all."""
    scene = driving.Scene(manoeuvre, 1, speed, driving.SPEEDS[speed][0], 2, ())
    states = driving.simulate(scene, 0.0)
    moved = [cars[0].y - states[0][0].y for cars in states]
    wanted = {"keep": 0.0, "left": -4.0, "right": 4.0}[manoeuvre]
    assert moved[-3] == pytest.approx(wanted, abs=1e-6)
    assert moved[2] == 0
    assert max(abs(cars[0].heading) for cars in states) < math.radians(42)


def test_driving_scenes_are_safe_and_visible() -> None:
    for number in range(30):
        generator = sources.clip_generator(0, "train", number)
        scene = driving.draw_scene(generator, "left", 1, "medium")
        states = driving.simulate(scene, 0.5)
        if driving.is_readable(states):
            text = driving.caption(scene, states)
            assert len(text.split()) < 40
            assert "changes left from the middle lane to the left lane" in text


def test_driving_clips_show_what_they_say() -> None:
    need("highway_env")
    clips = driving._render_batch(COUNTRY, "heldout", 3, range(3))
    assert [clip.attributes["manoeuvre"] for clip in clips] == ["keep", "left", "right"]
    for clip in clips:
        path = np.array(clip.controls["trajectory"])
        for i in (0, 8, 16):
            frame = frames_of(clip)[i].astype(int)
            green = (frame[..., 1] - np.maximum(frame[..., 0], frame[..., 2])) > 60
            rows, columns = np.nonzero(green)
            assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx(tuple(path[i]), abs=1.5)


def test_driving_repeats_itself() -> None:
    need("highway_env")
    assert driving._render_batch(COUNTRY, "train", 0, range(2)) == driving._render_batch(COUNTRY, "train", 0, range(2))


def test_open_driving_draws_free_scenes_without_a_collision() -> None:
    """Every number of lanes and cars, every road and colour; the first car stays in the picture, others come and go."""
    generators = [sources.clip_generator(0, "train", number) for number in range(150)]
    scenes = [driving_open.draw_scene(generator, driving_open.LOOKS["mixed"]) for generator in generators]
    assert {scene.lanes for scene in scenes} == {2, 3, 4} and {scene.road for scene in scenes} == {*driving_open.ROADS}
    assert {len(scene.paths) for scene in scenes} == {2, 3, 4, 5}
    assert {colour for scene in scenes for colour in scene.colours} == {*driving_open.PALETTE}
    edge = driving_open.HALF_VIEW - driving_open.CAR_LENGTH / 2
    coming = [np.abs(path.ahead[[0, -1]]).max() > edge for scene in scenes for path in scene.paths[1:]]
    changes = [abs(path.across[-1] - path.across[0]) > 1 for scene in scenes for path in scene.paths]
    passing = [np.ptp(np.sign(path.ahead - scene.paths[0].ahead)) > 0 for scene in scenes for path in scene.paths[1:]]
    assert np.mean(coming) > 0.2 and 0.1 < np.mean(changes) < 0.4 and np.mean(passing) > 0.1
    for scene in scenes:
        first, *others = scene.paths
        assert np.abs(first.ahead).max() < driving_open.HALF_VIEW - driving_open.CAR_LENGTH / 2
        for index, path in enumerate(others, start=1):
            assert all(driving_open.are_clear(path, other) for other in scene.paths[:index])
            assert path.speed.min() > 0 and np.abs(path.heading).max() < driving_open.STEEPEST
            # a path's places follow from its speed
            steps = np.diff(path.ahead) * driving_open.FPS
            assert steps == pytest.approx(path.speed[:-1] - scene.camera_speed)


def test_rush_fills_four_lanes_whose_cars_mostly_change_them() -> None:
    scenes = [
        driving_open.draw_scene(sources.clip_generator(0, "train", number), driving_open.LOOKS["rush"])
        for number in range(60)
    ]
    assert {scene.lanes for scene in scenes} == {4} and {len(scene.paths) for scene in scenes} == {5, 6, 7}
    assert np.mean([abs(path.across[-1] - path.across[0]) > 1 for scene in scenes for path in scene.paths]) > 0.4


def test_open_driving_clips_have_one_caption_and_show_their_cars() -> None:
    need("highway_env")
    looks = driving_open.LOOKS["mixed"]
    clips = driving_open._render_batch(looks, "heldout", 3, range(3))
    assert clips == driving_open._render_batch(looks, "heldout", 3, range(3))
    assert clips[1:] == driving_open._render_batch(looks, "heldout", 3, range(1, 3))
    assert {clip.caption for clip in clips} == {driving_open.CAPTION}
    for clip in clips:
        frames, colours = frames_of(clip), clip.attributes["colours"]
        assert len(colours) == clip.attributes["cars"] + 1
        for frame, cars in zip(frames, clip.controls["cars"], strict=True):
            for (x, y, _), colour in zip(cars, colours, strict=True):
                if 2 < x < 94:
                    seen = frame[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].mean((0, 1))
                    assert np.abs(seen - driving_open.PALETTE[colour]).max() < 30


def test_the_shipped_clips_of_open_driving_are_what_their_card_makes() -> None:
    """The clip of a number is the same however many are made; pixels may differ by what the encoder leaves."""
    need("highway_env")
    from anyflow.data.shards import load_index, read_clip

    folder = Path(__file__).parents[2] / "data" / "starter" / "driving-open" / "heldout"
    (shard, sample), *_ = load_index(folder)
    shipped = read_clip(folder, shard, sample)
    (made,) = driving_open._render_batch(driving_open.LOOKS["mixed"], "heldout", 1, range(1))
    assert (made.key, made.attributes, made.controls) == (shipped.key, shipped.attributes, shipped.controls)
    assert np.abs(frames_of(made).astype(int) - frames_of(shipped)).mean() < 1


def test_the_arena_is_a_wad_and_reproducible() -> None:
    wad = arena.build_wad(HIGH)
    assert wad[:4] == b"PWAD"
    assert wad == arena.build_wad(HIGH)


@pytest.mark.parametrize("motion", ["left", "right", "forward", "still"])
def test_games_walks_are_clear(motion: str) -> None:
    for number in range(20):
        walk = games.draw_walk(sources.clip_generator(1, "train", number), motion, arena.LOOKS["low"])
        assert max(abs(walk.x), abs(walk.y)) < arena.HALF_ROOM - 90
        assert (walk.speed == "none") == (motion == "still")
        assert "  " not in games.caption(walk)
        assert " ." not in games.caption(walk)


def test_games_clips_show_what_they_say() -> None:
    need("vizdoom")
    clips = games._render_batch(HIGH, "heldout", 1, range(3))
    for clip, motion in zip(clips, ["left", "right", "forward"], strict=True):
        path = np.array(clip.controls["trajectory"])
        turned = float(np.diff(np.unwrap(path[:, 2], period=360)).sum())
        walked = float(np.hypot(*(path[-1, :2] - path[0, :2])))
        assert clip.attributes["motion"] == motion
        if motion == "forward":
            assert abs(turned) < 0.5
            assert 100 < walked < 400
        else:
            assert (turned > 0) == (motion == "left")
            assert 30 < abs(turned) < 90
            assert walked < 1


def test_a_games_clip_does_not_depend_on_its_neighbours() -> None:
    need("vizdoom")
    assert games._render_batch(HIGH, "train", 0, range(2))[1:] == games._render_batch(HIGH, "train", 0, range(1, 2))


def test_robotics_layouts_of_the_splits_are_disjoint() -> None:
    generator = np.random.default_rng(0)
    for spec in robotics.SPECS.values():
        bands: dict[str, set[int]] = {}
        for split in sources.SPLITS:
            layouts = np.array([robotics.draw_layout(generator, spec, split) for _ in range(300)])
            low, high = np.array(spec.low), np.array(spec.high)
            assert (layouts >= low).all()
            assert (layouts <= high).all()
            shares = (layouts[:, spec.axis] - low[spec.axis]) / (high - low)[spec.axis]
            bands[split] = set(np.floor(shares * robotics.BANDS).astype(int))
        assert not bands["train"] & bands["heldout"]


@pytest.mark.parametrize(
    ("end", "direction"), [((20, 3), "right"), ((-20, 3), "left"), ((3, -9), "up"), ((3, 9), "down"), ((1, 1), "still")]
)
def test_robotics_direction(end: tuple[float, float], direction: str) -> None:
    path: Any = np.array([(0.0, 0.0), (5.0, 50.0), end])
    assert robotics.direction_of(path) == direction


@pytest.mark.slow
def test_robotics_clips_repeat_and_show_the_gripper() -> None:
    need("mujoco", "metaworld")
    if ctypes.util.find_library("OSMesa") is None:
        pytest.skip("the system has no OSMesa library (Debian: libosmesa6)")
    (first,) = robotics.render(1, "train", 0, 1)
    (again,) = robotics.render(1, "train", 0, 1)
    assert first == again
    assert first.attributes == {"task": "reach", "direction": "left"}
    path = np.array(first.controls["trajectory"])
    assert path[-1, 0] < path[0, 0] - 5
    assert frames_of(first).std() > 20
