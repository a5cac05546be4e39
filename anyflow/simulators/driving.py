"""Driving: highway-env seen from above. A green car keeps its lane, or changes one lane to the left or to the right.

The camera travels with the green car along the road and stands still across it, so the car's path in the image is
vertical: up is left. The dashes of the lanes tell the speed; speeds stay under 14 m/s, for at 8 frames a second a
faster car's dashes would seem to run backwards. The paths are scripted; highway-env supplies the road and the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from anyflow.data.clip import Clip, SplitName
from anyflow.data.controls import Control
from anyflow.simulators.road import (
    FPS,
    LANE_WIDTH,
    LICENCE,
    PACKAGES,
    CarState,
    Road,
    draw_frames,
    drive_controls,
    lane_change,
)
from anyflow.simulators.simulated import FRAMES, WIDTH, choose_look, clip_generator, need_package
from anyflow.system.pool import batches, run_jobs

__all__ = ["ATTRIBUTES", "CONTROLS", "DESCRIPTION", "FPS", "LICENCE", "LOOKS", "PACKAGES", "render"]

DESCRIPTION = (
    "A road with three lanes seen from above (up is left). A green car keeps its lane or changes one lane to the left "
    "or right, at one of three speeds, beside one or two other cars."
)
CONTROLS: dict[str, Control | str] = {**drive_controls("green car")}
ATTRIBUTES: dict[str, str | list[str]] = {
    "manoeuvre": ["keep", "left", "right"],
    "speed": ["slow", "medium", "fast"],
    "lane": ["left", "middle", "right"],
    "cars": "number of other cars, 1 or 2",
}

LANES = ("left", "middle", "right")
SPEEDS = {"slow": (6.0, 7.0), "medium": (9.0, 10.0), "fast": (12.0, 13.5)}
SPEED_PHRASES = {"slow": "slowly", "medium": "at medium speed", "fast": "fast"}
COLOURS = {"green": (50, 200, 0), "blue": (100, 200, 255), "yellow": (230, 200, 40)}

PIXELS_PER_METRE = 4.5
CHANGE_FRAMES = 12
EGO_X = 0.38
"""The green car's place along the frame, as a share of its width."""
SHOULDER, ASPHALT = (168, 148, 112), (100, 100, 100)
LOOKS = {"city": 6.0, "country": 9.0}
"""Metres from dash to dash; a fast car passes 1.7 m a frame, well under half of it."""


@dataclass(frozen=True)
class Scene:
    """What a clip is to show. ``others`` are (colour, lane, metres ahead of the green car, relative speed)."""

    manoeuvre: str
    lane: int
    speed_word: str
    speed: float
    start_frame: int
    others: tuple[tuple[str, int, float, float], ...]

    @property
    def target(self) -> int:
        return self.lane + {"left": -1, "keep": 0, "right": 1}[self.manoeuvre]


def render(count: int, split: SplitName, seed: int, workers: int = 2, look: str | None = None) -> Iterator[Clip]:
    """``count`` clips, frames encoded as mp4; clip n depends on (seed, split, n, look) alone."""
    dash_spacing = choose_look("driving", LOOKS, look)
    need_package("highway_env", "highway-env")
    for clips in run_jobs(partial(_render_batch, dash_spacing, split, seed), batches(count, 25), workers):
        yield from clips


def _render_batch(dash_spacing: float, split: SplitName, seed: int, numbers: range) -> list[Clip]:
    return [_render_clip(dash_spacing, split, seed, number).encoded() for number in numbers]


def _render_clip(dash_spacing: float, split: SplitName, seed: int, number: int) -> Clip:
    generator = clip_generator(seed, split, number)
    manoeuvre = ("keep", "left", "right")[number % 3]
    speed_word = tuple(SPEEDS)[number // 3 % 3]
    lane = int(generator.choice({"keep": (0, 1, 2), "left": (1, 2), "right": (0, 1)}[manoeuvre]))
    while True:  # a scene that crashes, or whose cars leave the frame, is drawn again
        scene = draw_scene(generator, manoeuvre, lane, speed_word)
        states = simulate(scene, float(generator.random()) * dash_spacing)
        if is_readable(states):
            break
    road = Road(len(LANES), dash_spacing, SHOULDER, ASPHALT, PIXELS_PER_METRE, EGO_X)
    colours = [COLOURS["green"], *(COLOURS[colour] for colour, *_ in scene.others)]
    frames = draw_frames(road, states, colours, [cars[0].x for cars in states])
    return Clip(
        key=f"driving-{split}-{number:06d}",
        caption=caption(scene, states),
        fps=FPS,
        domain="driving",
        frames=frames,
        controls={
            "actions": [{"speed": round(cars[0].speed, 2), "heading": round(cars[0].heading, 3)} for cars in states],
            "trajectory": [road.place(cars[0], cars[0].x) for cars in states],
        },
        attributes={
            "manoeuvre": scene.manoeuvre,
            "speed": scene.speed_word,
            "lane": LANES[scene.lane],
            "cars": len(scene.others),
        },
        licence=LICENCE,
    )


def draw_scene(generator: np.random.Generator, manoeuvre: str, lane: int, speed_word: str) -> Scene:
    """A random scene with the given manoeuvre, lane and speed."""
    others = []
    for colour in ("blue", "yellow")[: 1 + int(generator.random() < 0.25)]:
        gap = float(generator.choice([-5.3, 0.0, 8.5])) + float(generator.uniform(-0.4, 1.2))
        others.append((colour, int(generator.integers(3)), gap, float(generator.uniform(-0.6, 0.6))))
    speed, start_frame = float(generator.uniform(*SPEEDS[speed_word])), int(generator.integers(1, 3))
    return Scene(manoeuvre, lane, speed_word, speed, start_frame, tuple(others))


def simulate(scene: Scene, dash_phase: float) -> list[list[CarState]]:
    """Where every car is in every frame; the green car is first.

    The green car's sideways path takes ``CHANGE_FRAMES`` frames and its heading is tangent to it, so a lane change is
    smooth and always complete. The others keep lane and speed.
    """
    times = np.arange(FRAMES) / FPS
    done, rate = lane_change(scene.start_frame, CHANGE_FRAMES)
    step = (scene.target - scene.lane) * LANE_WIDTH
    sideways, sideways_speed = scene.lane * LANE_WIDTH + step * done, step * rate
    start = 100.0 + dash_phase
    states = []
    for frame, time in enumerate(times):
        ego_x, heading = start + scene.speed * time, math.atan2(sideways_speed[frame], scene.speed)
        cars = [CarState(ego_x, float(sideways[frame]), heading, scene.speed)]
        for _, lane, gap, relative_speed in scene.others:
            speed = scene.speed + relative_speed
            cars.append(CarState(start + gap + speed * float(time), lane * LANE_WIDTH, 0.0, speed))
        states.append(cars)
    return states


def is_readable(states: list[list[CarState]]) -> bool:
    """Nobody is near a collision, and every car is inside the frame and stays ahead, beside or behind throughout."""
    ahead_limit = (1 - EGO_X) * WIDTH / PIXELS_PER_METRE - 2.3
    behind_limit = EGO_X * WIDTH / PIXELS_PER_METRE - 2.3
    for cars in states:
        for i, car in enumerate(cars):
            if not -behind_limit < car.x - cars[0].x < ahead_limit:
                return False
            if any(abs(car.x - other.x) < 6.0 and abs(car.y - other.y) < 2.9 for other in cars[:i]):
                return False
    return all(_relation(states[0], i) == _relation(states[-1], i) for i in range(1, len(states[0])))


def _relation(cars: list[CarState], i: int) -> str:
    ahead = cars[i].x - cars[0].x
    return "beside" if abs(ahead) < 3.0 else "ahead" if ahead > 0 else "behind"


def caption(scene: Scene, states: list[list[CarState]]) -> str:
    """Two or three short sentences, measured from the states."""
    lane = LANES[scene.lane]
    if scene.manoeuvre == "keep":
        movement = f"keeps the {lane} lane"
    else:
        movement = f"changes {scene.manoeuvre} from the {lane} lane to the {LANES[scene.target]} lane"
    sentences = [f"A green car drives {SPEED_PHRASES[scene.speed_word]} and {movement}."]
    for i, (colour, other_lane, _, _) in enumerate(scene.others, start=1):
        sentences.append(f"A {colour} car is {_relation(states[0], i)} in the {LANES[other_lane]} lane.")
    return " ".join(sentences)
