"""Whole cars: every real clip of open driving is seen as whole, and each flaw that people see makes one that is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models import BlockCodec, exact_sampler, measure_curve
from scenes import drive

from anyflow.data.decode import ClipShape, decode_clip
from anyflow.data.shards import load_index, read_clip
from anyflow.evaluation.curve import HeldOut
from anyflow.evaluation.report.folder import write_report
from anyflow.simulators.driving_open import CAR_LENGTH, CAR_WIDTH, PALETTE, PIXELS_PER_METRE
from anyflow.simulators.sight import seen_shares
from anyflow.simulators.whole_cars import faults, whole_frames

DATA = Path(__file__).parents[2] / "data"
LENGTH, WIDTH = CAR_LENGTH * PIXELS_PER_METRE, CAR_WIDTH * PIXELS_PER_METRE
ASPHALT = (100, 100, 100)
FRAMES = 17

Frames = np.ndarray[Any, np.dtype[np.uint8]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Drawn:
    """A shipped clip with the truth beside its pixels: the colours of its cars, and each frame's [x, y, heading]."""

    frames: Frames
    colours: list[str]
    cars: list[list[list[float]]]
    lanes: int

    def body(self, frame: int, car: int, grown: float = 0.0, front: bool = False) -> Mask:
        """The pixels of a car, or of its front half."""
        x, y, heading = self.cars[frame][car]
        rows, columns = np.mgrid[:64, :96] + 0.5
        along = (columns - x) * np.cos(heading) + (rows - y) * np.sin(heading)
        across = (rows - y) * np.cos(heading) - (columns - x) * np.sin(heading)
        inside = (np.abs(along) <= LENGTH / 2 + grown) & (np.abs(across) <= WIDTH / 2 + grown)
        return np.asarray(inside & (along > 0) if front else inside)

    def is_inside(self, frame: int, car: int) -> bool:
        """Whether all of a car is in the picture, so that nothing excuses a flaw."""
        return 18 < self.cars[frame][car][0] < 78


def read_sample(split: str, most: int = 24) -> list[Drawn]:
    folder = DATA / "starter" / "driving-open" / split
    clips = [read_clip(folder, shard, sample) for shard, sample in load_index(folder)][:most]
    return [
        Drawn(
            decode_clip(clip.mp4 or b"", ClipShape(FRAMES, 64, 96)),
            clip.attributes["colours"],
            clip.controls["cars"],
            clip.attributes["lanes"],
        )
        for clip in clips
    ]


SAMPLE = read_sample("heldout")
flaws = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


def is_whole(frames: Frames) -> bool:
    return whole_frames(frames) == 1


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_real_clips_are_whole(split: str) -> None:
    """The figure that makes the eye a measure."""
    assert [list(faults(clip.frames)) for clip in read_sample(split)] == [[]] * 24


def test_real_clips_are_whole_through_the_shipped_autoencoder() -> None:
    from anyflow.backbone.codec import Codec

    codec = Codec.from_folder(DATA / "models" / "tiny", text=False)
    clips = torch.from_numpy(np.stack([clip.frames for clip in SAMPLE[:10]]))
    with torch.no_grad():
        decoded = codec.decode(codec.encode_video(clips))
    assert (decoded != clips).any()
    assert seen_shares(decoded, ["driving-open"] * 10) == {"whole_cars": 1.0, "whole_frames": 1.0}


@st.composite
def some_car(draw: st.DrawFn) -> tuple[Drawn, int, int]:
    """A clip, one of its frames, and a car that is in it from end to end."""
    clip, frame = draw(st.sampled_from(SAMPLE)), draw(st.integers(0, FRAMES - 1))
    cars = [car for car in range(len(clip.colours)) if clip.is_inside(frame, car)]
    assume(cars)
    return clip, frame, draw(st.sampled_from(cars))


@flaws
@given(some_car())
def test_a_car_that_is_gone_in_one_frame(chosen: tuple[Drawn, int, int]) -> None:
    clip, frame, car = chosen
    frames = clip.frames.copy()
    frames[frame][clip.body(frame, car, grown=2)] = ASPHALT
    assert not is_whole(frames)


@flaws
@given(some_car())
def test_a_car_of_half_its_area_in_one_frame(chosen: tuple[Drawn, int, int]) -> None:
    clip, frame, car = chosen
    frames = clip.frames.copy()
    frames[frame][clip.body(frame, car, grown=2, front=True)] = ASPHALT
    assert not is_whole(frames)


@flaws
@given(some_car(), st.sampled_from(list(PALETTE)), st.integers(1, FRAMES))
def test_a_car_of_two_colours(chosen: tuple[Drawn, int, int], colour: str, length: int) -> None:
    clip, first, car = chosen
    assume(colour != clip.colours[car])
    frames = clip.frames.copy()
    for frame in range(first, min(first + length, FRAMES)):
        frames[frame][clip.body(frame, car, front=True)] = PALETTE[colour]
    assert not is_whole(frames)


@flaws
@given(some_car(), st.sampled_from(list(PALETTE)))
def test_a_car_of_the_mean_of_two_colours(chosen: tuple[Drawn, int, int], colour: str) -> None:
    """Also where it is so in all frames."""
    clip, _, car = chosen
    assume(colour != clip.colours[car])
    mean = np.mean([PALETTE[colour], PALETTE[clip.colours[car]]], axis=0)
    frames = clip.frames.copy()
    for frame in range(FRAMES):
        frames[frame][clip.body(frame, car, grown=1)] = mean
    assert not is_whole(frames)


@flaws
@given(some_car(), st.sampled_from(list(PALETTE)))
def test_a_car_that_takes_another_colour(chosen: tuple[Drawn, int, int], colour: str) -> None:
    clip, first, car = chosen
    assume(colour != clip.colours[car] and first > 0)
    frames = clip.frames.copy()
    for frame in range(first, FRAMES):
        frames[frame][clip.body(frame, car)] = PALETTE[colour]
    assert not is_whole(frames)


@flaws
@given(
    clip=st.sampled_from(SAMPLE),
    colour=st.sampled_from(list(PALETTE)),
    opacity=st.floats(0.5, 1.0),
    x=st.floats(20, 76),
    lane=st.integers(0, 3),
    first=st.integers(0, FRAMES - 1),
    length=st.integers(1, FRAMES - 1),
)
def test_a_ghost(clip: Drawn, colour: str, opacity: float, x: float, lane: int, first: int, length: int) -> None:
    """A car that is half there, or there for some of the frames."""
    assume(lane < clip.lanes)
    y = 32 + (lane - (clip.lanes - 1) / 2) * 14.4
    shown = range(first, min(first + length, FRAMES))
    places = [car for frame in shown for car in clip.cars[frame]]
    assume(all(abs(other[0] - x) > 26 or abs(other[1] - y) > 12 for other in places))
    ghost = replace(clip, cars=[[[x, y, 0.0]]] * FRAMES)
    frames = clip.frames.copy()
    for frame in shown:
        body = ghost.body(frame, 0)
        frames[frame][body] = (1 - opacity) * frames[frame][body] + opacity * np.array(PALETTE[colour])
    assert not is_whole(frames)


@flaws
@given(st.sampled_from([clip for clip in SAMPLE if clip.lanes < 4]), st.sampled_from(list(PALETTE)), st.floats(20, 76))
def test_a_car_beside_the_road(clip: Drawn, colour: str, x: float) -> None:
    beside = replace(clip, cars=[[[x, 32 - clip.lanes * 7.2 - 5, 0.0]]] * FRAMES)
    frames = clip.frames.copy()
    for frame in range(FRAMES):
        frames[frame][beside.body(frame, 0)] = PALETTE[colour]
    assert not is_whole(frames)


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("an empty road", np.full((FRAMES, 64, 96, 3), ASPHALT, np.uint8)),
        ("one colour everywhere", np.full((FRAMES, 64, 96, 3), PALETTE["green"], np.uint8)),
        ("noise", np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 96, 3), dtype=np.uint8)),
        ("the mean of all clips", np.mean([clip.frames for clip in SAMPLE], axis=0).astype(np.uint8)),
        ("a car that jumps to the next lane", drive([14.0] * 8 + [32.0] * 9)),
        ("two clips of half a car's opacity", np.mean([clip.frames for clip in SAMPLE[:2]], axis=0).astype(np.uint8)),
    ],
)
def test_what_shows_no_whole_cars(name: str, frames: Frames) -> None:
    assert not is_whole(frames), name


def test_clips_that_begin_elsewhere_or_run_backwards_are_as_whole() -> None:
    """Nothing is remembered of the data but what a car is."""
    for clip in SAMPLE[:8]:
        assert is_whole(clip.frames[::-1]) and is_whole(clip.frames[5:]) and is_whole(clip.frames[:, ::-1, ::-1])


def test_shares_count_the_clips_of_domains_that_have_an_eye() -> None:
    good, bad = torch.from_numpy(SAMPLE[0].frames), torch.full((FRAMES, 64, 96, 3), 100, dtype=torch.uint8)
    clips = torch.stack([good, bad, bad, bad])
    domains = ["driving-open", "driving-open", "driving", "cooking"]
    assert seen_shares(clips, domains) == {"whole_cars": 0.5, "whole_frames": 0.5}
    bad_end = torch.cat([good[:-2], bad[-2:]])
    assert seen_shares(bad_end[None], ["driving-open"]) == {"whole_cars": 0.0, "whole_frames": 14 / 17}
    assert seen_shares(clips, ["driving"] * 4) == {}
    large = good.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert seen_shares(large[None], ["driving-open"]) == {"whole_cars": 1.0, "whole_frames": 1.0}
    with pytest.raises(ValueError, match="192x128"):
        is_whole(large.numpy())


def test_a_curve_and_its_report_have_whole_cars(tmp_path: Path) -> None:
    """Beside the distances, of samples and of real clips; an error that grows with the jump takes them."""
    items = [
        HeldOut(f"clip-{number}", f"Clip {number}.", torch.from_numpy(clip.frames), "driving-open")
        for number, clip in enumerate(SAMPLE[:6])
    ]
    result = measure_curve(
        exact_sampler(items[:3], error=0.9), BlockCodec(), items[:3], items[3:], steps=(1, 64), label="after"
    )
    curve = result.curve
    assert curve.real.figure("whole_cars") == curve.codec.figure("whole_cars") == 1.0
    assert [row.figure("whole_cars") for row in curve.rows] == [0.0, 1.0]
    paths = write_report(tmp_path, None, result)
    headings = paths["table.md"].read_text().splitlines()[2]
    assert [cell.strip() for cell in headings.split("|")][1:6] == [
        "steps",
        "whole cars",
        "frames of whole cars",
        "motion right",
        "frame Frechet",
    ]
