"""Open driving: traffic seen from above, of which the one caption says nothing.

A clip draws everything for itself: lanes, road, cars, colours, gaps, speeds, lane changes, braking and passing. So a
prompt leaves open what is seen, as real prompts do, and a model has to settle it: in one step it gives the mean of many
roads, with cars that are half there. The camera travels at a steady speed; the first car stays in the picture, others
may come and go at its left and right ends, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from anyflow.data.clip import Clip, SplitName
from anyflow.data.controls import Control
from anyflow.simulators.road import (
    FPS,
    LANE_WIDTH,
    LICENCE,
    PACKAGES,
    CarState,
    Colour,
    Road,
    draw_frames,
    drive_controls,
    lane_change,
)
from anyflow.simulators.simulated import FRAMES, WIDTH, choose_look, clip_generator, need_package
from anyflow.system.pool import batches, run_jobs

__all__ = ["ATTRIBUTES", "CONTROLS", "DESCRIPTION", "DESCRIPTIONS", "FPS", "LICENCE", "LOOKS", "PACKAGES", "render"]

CAPTION = "Cars drive on a road."
DESCRIPTION = (
    "A road with two to four lanes seen from above (up is left). Two to five cars of six colours keep or change lanes, "
    "brake, speed up and pass each other. One caption stands for all clips: what happens is left open."
)
DESCRIPTIONS = {
    "rush": "A road with four full lanes seen from above (up is left). Five to seven cars of six colours change lanes, "
    "brake, speed up and pass each other. One caption stands for all clips: what happens is left open."
}
"""Descriptions of looks that the usual one does not fit."""

CONTROLS: dict[str, Control | str] = {
    **drive_controls("first car"),
    "cars": "per frame: [x, y, heading] of every car, in pixels and radians, in the order of its colours; the first "
    "car is the first, a car outside of the frame has places outside of it",
}
PALETTE: dict[str, Colour] = {
    "green": (50, 200, 0),
    "blue": (100, 200, 255),
    "yellow": (230, 200, 40),
    "red": (165, 50, 40),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
"""As far apart as the embedded autoencoder can tell colours: it has seen no others, and turns them into these."""

ATTRIBUTES: dict[str, str | list[str]] = {
    "lanes": "number of lanes: 2 to 4, in rush 4",
    "road": ["sand", "gravel", "clay", "concrete"],
    "cars": "number of other cars: 1 to 4, in rush 4 to 6",
    "colours": f"of every car, the first car's first: {', '.join(PALETTE)}",
}
ROADS: dict[str, tuple[Colour, Colour, float]] = {
    "sand": ((168, 148, 112), (100, 100, 100), 6.0),
    "gravel": ((142, 142, 142), (96, 96, 98), 9.0),
    "clay": ((132, 106, 86), (104, 102, 98), 7.5),
    "concrete": ((162, 158, 150), (102, 104, 106), 4.5),
}
"""Colours of shoulder and asphalt, all of them greyer than any colour of a car, and metres from dash to dash."""


@dataclass(frozen=True)
class Traffic:
    """What scenes are drawn from: roads by name, least and most lanes and cars, and the share of lane changes."""

    roads: tuple[str, ...]
    lanes: tuple[int, int] = (2, 4)
    cars: tuple[int, int] = (2, 5)
    changes: float = 0.4


LOOKS = {
    "mixed": Traffic(tuple(ROADS)),
    **{name: Traffic((name,)) for name in ROADS},
    "rush": Traffic(tuple(ROADS), lanes=(4, 4), cars=(5, 7), changes=0.8),
}
"""The embedded models know the first; rush is a new domain for them."""

PIXELS_PER_METRE = 3.6
"""Four lanes fill the frame's height; a car covers 20 x 8.6 pixels."""

HALF_VIEW = WIDTH / PIXELS_PER_METRE / 2
CAR_LENGTH, CAR_WIDTH = 5.6, 2.4
CAMERA_SPEED = (8.0, 13.0)
CLEARANCE = (CAR_LENGTH + 1.6, 3.8)
"""Metres along and across the road: two cars are further apart in one of them."""

STEEPEST = 0.5
"""Radians by which a car may head across the road."""

TRIES = 40
"""Drawings of a car before the whole scene is drawn again."""


@dataclass(frozen=True)
class Path:
    """A car's way: metres from the camera and across the road, heading and speed, one value a frame."""

    ahead: NDArray[np.float64]
    across: NDArray[np.float64]
    heading: NDArray[np.float64]
    speed: NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """What a clip shows; the first car is the one that stays in the picture."""

    road: str
    lanes: int
    camera_speed: float
    colours: tuple[str, ...]
    paths: tuple[Path, ...]


def render(count: int, split: SplitName, seed: int, workers: int = 2, look: str | None = None) -> Iterator[Clip]:
    """``count`` clips, frames encoded as mp4; clip n depends on (seed, split, n, look) alone."""
    traffic = choose_look("driving-open", LOOKS, look)
    need_package("highway_env", "highway-env")
    for clips in run_jobs(partial(_render_batch, traffic, split, seed), batches(count, 25), workers):
        yield from clips


def _render_batch(traffic: Traffic, split: SplitName, seed: int, numbers: range) -> list[Clip]:
    return [render_clip(traffic, split, seed, number).encoded() for number in numbers]


def render_clip(traffic: Traffic, split: SplitName, seed: int, number: int) -> Clip:
    """One clip, its frames not encoded."""
    generator = clip_generator(seed, split, number)
    scene = draw_scene(generator, traffic)
    shoulder, asphalt, dash_spacing = ROADS[scene.road]
    road = Road(scene.lanes, dash_spacing, shoulder, asphalt, PIXELS_PER_METRE, 0.5, (CAR_LENGTH, CAR_WIDTH))
    cameras = 100.0 + float(generator.random()) * dash_spacing + scene.camera_speed * np.arange(FRAMES) / FPS
    states = [
        [_state(path, frame, float(camera)) for path in scene.paths] for frame, camera in enumerate(cameras.tolist())
    ]
    places = [
        [[*road.place(car, camera), round(car.heading, 3)] for car in cars]
        for cars, camera in zip(states, cameras.tolist(), strict=True)
    ]
    return Clip(
        key=f"driving-open-{split}-{number:06d}",
        caption=CAPTION,
        fps=FPS,
        domain="driving-open",
        frames=draw_frames(road, states, [PALETTE[colour] for colour in scene.colours], cameras.tolist()),
        controls={
            "actions": [{"speed": round(cars[0].speed, 2), "heading": round(cars[0].heading, 3)} for cars in states],
            "trajectory": [cars[0][:2] for cars in places],
            "cars": places,
        },
        attributes={
            "lanes": scene.lanes,
            "road": scene.road,
            "cars": len(scene.paths) - 1,
            "colours": list(scene.colours),
        },
        licence=LICENCE,
    )


def _state(path: Path, frame: int, camera: float) -> CarState:
    ahead, across, heading, speed = (
        float(values[frame]) for values in (path.ahead, path.across, path.heading, path.speed)
    )
    return CarState(camera + ahead, across, heading, speed)


def draw_scene(generator: np.random.Generator, traffic: Traffic) -> Scene:
    """A random scene without a collision."""
    road, lanes = str(generator.choice(traffic.roads)), int(generator.integers(*traffic.lanes, endpoint=True))
    count = int(generator.integers(*traffic.cars, endpoint=True))
    camera_speed = float(generator.uniform(*CAMERA_SPEED))
    colours = tuple(str(colour) for colour in generator.choice(list(PALETTE), count))
    while True:
        paths: list[Path] = []
        for _ in range(TRIES * count):
            path = draw_path(generator, lanes, camera_speed, traffic.changes)
            if _is_drivable(path, is_first=not paths) and all(are_clear(path, other) for other in paths):
                paths.append(path)
            if len(paths) == count:
                return Scene(road, lanes, camera_speed, colours, tuple(paths))


def draw_path(generator: np.random.Generator, lanes: int, camera_speed: float, changes: float) -> Path:
    """A random way: from any place and lane, perhaps to the next lane, perhaps braking or speeding up."""
    lane = int(generator.integers(lanes))
    target = lane
    if generator.random() < changes:
        target = int(generator.choice([side for side in (lane - 1, lane + 1) if 0 <= side < lanes]))
    done, rate = lane_change(int(generator.integers(-4, 8)), int(generator.integers(12, 17)))
    across, sideways = LANE_WIDTH * (lane + (target - lane) * done), LANE_WIDTH * (target - lane) * rate
    relative = np.full(FRAMES, generator.uniform(-4.0, 4.0))
    if generator.random() < 0.4:  # brakes or speeds up, within half a second to one and a half
        relative += (
            generator.uniform(-5.0, 4.0)
            * lane_change(int(generator.integers(0, 10)), int(generator.integers(4, 13)))[0]
        )
    start = generator.uniform(-HALF_VIEW - 8, HALF_VIEW + 8)
    ahead = start + np.concatenate([[0.0], np.cumsum(relative[:-1])]) / FPS
    speed = camera_speed + relative
    return Path(ahead, across, np.arctan2(sideways, speed), speed)


def _is_drivable(path: Path, is_first: bool) -> bool:
    """Whether it heads along the road, and is in the picture: the first car always, another for half of the clip."""
    inside = np.abs(path.ahead) < HALF_VIEW - CAR_LENGTH / 2 - 0.3
    return bool(np.abs(path.heading).max() < STEEPEST and (inside.all() if is_first else inside.mean() > 0.35))


def are_clear(path: Path, other: Path) -> bool:
    """Whether two cars never come near a collision."""
    along, across = np.abs(path.ahead - other.ahead), np.abs(path.across - other.across)
    return bool(((along > CLEARANCE[0]) | (across > CLEARANCE[1])).all())
