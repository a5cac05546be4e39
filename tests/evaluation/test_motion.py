"""The probes: any real motion gives its direction, and what cannot be followed gives none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import FRAMES, drive, grip, lane_change, look, put_car, road

from anyflow.simulators.motion import (
    PROBES,
    Reading,
    asked_motion,
    mean_path_error,
    motion_accuracy,
    path_error,
    read_ego,
    read_gripper,
    read_motion,
    read_view,
)

STARTER = Path(__file__).parents[2] / "data" / "starter"
LANE_PIXELS = 18


@settings(max_examples=40, deadline=None)
@given(
    change=st.floats(0.7, 1.0).map(lambda share: share * LANE_PIXELS),
    side=st.sampled_from([-1, 1]),
    begin=st.integers(0, 4),
    length=st.integers(4, 11),
)
def test_any_lane_change_gives_its_side(change: float, side: int, begin: int, length: int) -> None:
    reading = read_ego(lane_change(side * change, begin=begin, length=length))
    assert reading.label == ("right" if side > 0 else "left")
    assert reading.path.shape == (FRAMES, 2) and 0 <= reading.confidence <= 1


@settings(max_examples=20, deadline=None)
@given(start=st.sampled_from([14.0, 32.0, 50.0]), wobble=st.lists(st.floats(-3, 3), min_size=FRAMES, max_size=FRAMES))
def test_a_car_that_stays_in_its_lane_keeps_it(start: float, wobble: list[float]) -> None:
    assert read_ego(drive([start + offset for offset in wobble])).label == "keep"


def test_the_path_is_the_cars_centre() -> None:
    reading = read_ego(lane_change(-LANE_PIXELS, start=50))
    assert np.abs(reading.path[0] - [36, 50]).max() < 1
    assert np.abs(reading.path[-1] - [36, 32]).max() < 1


def test_other_cars_do_not_matter() -> None:
    clip = lane_change(LANE_PIXELS)
    for frame in clip:
        put_car(frame, 70, 14, (100, 200, 255))
        put_car(frame, 14, 50, (230, 200, 40))
    assert read_ego(clip).label == "right"


def _without(frames: slice) -> np.ndarray:
    clip = lane_change(LANE_PIXELS)
    clip[frames] = road(1)
    return clip


def _two_cars() -> np.ndarray:
    clip = drive([14.0] * FRAMES)
    for frame in clip:
        put_car(frame, 36, 50)
    return clip


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("no car", road()),
        ("a car that vanishes", _without(slice(8, 13))),
        ("a car that appears late", _without(slice(0, 3))),
        ("two green cars", _two_cars()),
        ("a car that jumps to the next lane", drive([14.0] * 8 + [32.0] * 9)),
        ("a car that leaves its lane and comes back", drive([32.0 - 18 * np.sin(t / 16 * np.pi) for t in range(17)])),
        ("green everywhere", np.full((FRAMES, 64, 96, 3), (50, 200, 0), np.uint8)),
        ("noise", np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 96, 3), dtype=np.uint8)),
    ],
)
def test_what_is_no_drive_has_no_label(name: str, clip: np.ndarray) -> None:
    reading = read_ego(clip)
    assert reading.label is None and reading.confidence == 0, name


@settings(max_examples=40, deadline=None)
@given(
    angle=st.floats(-35, 35),
    quarter=st.sampled_from([0, 1, 2, 3]),
    length=st.floats(9, 20),
    curve=st.floats(0.7, 1.5),
)
def test_any_way_of_the_gripper_gives_its_direction(angle: float, quarter: int, length: float, curve: float) -> None:
    """Image angles: 0 right, 90 down, 180 left, 270 up; the speed along the way is any monotone one."""
    radians = np.deg2rad(90 * quarter + angle)
    progress = (np.arange(FRAMES) / (FRAMES - 1)) ** curve
    places = np.array([48, 32]) + length * progress[:, None] * [np.cos(radians), np.sin(radians)]
    assert read_gripper(grip(places)).label == ("right", "down", "left", "up")[quarter]


def test_a_gripper_that_stays_is_still_and_one_that_is_hidden_for_a_moment_is_followed() -> None:
    assert read_gripper(grip(np.tile([48.0, 32.0], (FRAMES, 1)))).label == "still"
    places = np.stack([np.linspace(30, 60, FRAMES), np.full(FRAMES, 30.0)], 1)
    clip = grip(places)
    clip[7:10] = (180, 150, 120)
    reading = read_gripper(clip)
    assert reading.label == "right" and np.isnan(reading.path[7:10]).all() and reading.confidence < 1
    clip[4:12] = (180, 150, 120)
    assert read_gripper(clip).label is None


def test_a_gripper_that_jumps_has_no_label() -> None:
    places = np.repeat([[20.0, 30.0], [70.0, 30.0]], [8, 9], axis=0)
    assert read_gripper(grip(places)).label is None


@settings(max_examples=15, deadline=None)
@given(speed=st.floats(2.0, 6.0), side=st.sampled_from([-1, 1]), seed=st.integers(0, 5))
def test_any_turn_of_the_view_gives_its_side(speed: float, side: int, seed: int) -> None:
    """A turn to the left moves the scene to the right; the shift is found to a tenth."""
    reading = read_view(look(side * speed, seed=seed))
    assert reading.label == ("left" if side > 0 else "right")
    turned = reading.path[0, 0] - reading.path[-1, 0]
    assert turned == pytest.approx(side * speed * (FRAMES - 1), rel=0.1)


def test_a_growing_view_walks_and_a_constant_one_stands() -> None:
    assert read_view(look(0.0, 0.03)).label == "forward"
    assert read_view(look(0.0)).label == "still"


def test_a_view_that_is_flat_or_unconnected_has_no_label() -> None:
    assert read_view(np.full((FRAMES, 64, 96, 3), 90, np.uint8)).label is None
    assert read_view(np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 96, 3), dtype=np.uint8)).label is None


def test_a_view_that_swings_has_no_label() -> None:
    there = look(4.0)
    swinging = np.concatenate([there[:9], there[7::-1]])
    assert read_view(swinging).label is None


def test_accuracy_counts_what_cannot_be_read_as_wrong_and_leaves_out_what_has_no_probe() -> None:
    clips = np.stack([lane_change(LANE_PIXELS), lane_change(-LANE_PIXELS), road(), road()])
    labels = [{"manoeuvre": "right"}, {"manoeuvre": "right"}, {"manoeuvre": "keep"}, {}]
    score = motion_accuracy(clips, labels, ["driving"] * 4)
    assert score.clips == 3 and score.right == (True, False, False, False)
    assert score.accuracy == pytest.approx(1 / 3) and score.unread == pytest.approx(1 / 3)
    other = motion_accuracy(clips, labels, "cooking")
    assert other.accuracy is None and other.unread is None and other.clips == 0
    assert read_motion(clips[0], "cooking") is None and read_motion(clips[0][:1], "games") is None
    assert asked_motion("cooking", labels[0]) is None


def test_labels_do_not_change_the_reading() -> None:
    clip = lane_change(LANE_PIXELS)[None]
    readings = [motion_accuracy(clip, [{"manoeuvre": word}], "driving").readings[0] for word in ("left", "right")]
    assert readings[0] is not None and readings[1] is not None
    assert readings[0].label == readings[1].label == "right"


@pytest.mark.parametrize("domain", sorted(PROBES))
def test_the_probe_reads_the_shipped_held_out_clips(domain: str) -> None:
    """The figure that makes the probe a measure: its accuracy on real clips."""
    from anyflow.data.decode import ClipShape, decode_clip
    from anyflow.data.shards import load_index, read_clip

    folder = STARTER / domain / "heldout"
    clips = [read_clip(folder, shard, sample) for shard, sample in load_index(folder)]
    frames = np.stack([decode_clip(clip.mp4 or b"", ClipShape(17, 64, 96, None)) for clip in clips])
    score = motion_accuracy(frames, [clip.attributes for clip in clips], domain)
    assert score.clips == len(clips) >= 32
    assert score.accuracy is not None and score.accuracy >= 0.95


def test_a_paths_error_is_measured_from_a_common_start() -> None:
    asked = np.stack([np.arange(5.0), np.zeros(5)], axis=1)
    assert path_error(asked + 7, asked) == pytest.approx(0)
    aside = asked + np.stack([np.zeros(5), np.arange(5.0)], axis=1)  # leaves it by 0, 1, 2, 3, 4 pixels
    assert path_error(aside, asked) == pytest.approx(2)
    hidden = aside.copy()
    hidden[4] = np.nan
    assert path_error(hidden, asked) == pytest.approx(1.5)
    hidden[1:] = np.nan
    assert path_error(hidden, asked) is None
    readings = [Reading("keep", 1.0, aside), Reading(None, 0.0, hidden), None]
    assert mean_path_error(readings, [Reading("keep", 1.0, asked)] * 3) == pytest.approx(2)
    assert mean_path_error([None], [None]) is None
