"""A straight road seen from above, drawn by highway-env: what the worlds of driving share (up is left)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anyflow.data.controls import Control
from anyflow.simulators.simulated import FRAMES, HEIGHT, WIDTH, area_downscale, on_screen

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

FPS = 8.0
LICENCE = "MIT (rendered with highway-env)"
PACKAGES = ("highway-env", "pygame-ce", "numpy", "av")

LANE_WIDTH = 4.0
SUPERSAMPLE = 4

Colour = tuple[int, int, int]


def drive_controls(car: str) -> dict[str, Control]:
    """What a clip tells of how a car is driven, and where that takes it."""
    return {
        "actions": Control(
            f"per frame: speed in m/s and heading in radians (negative is to the left) of the {car}",
            2,
            unit=("m/s", "rad"),
            numbers=("speed", "heading"),
        ),
        "trajectory": on_screen(f"per frame: [x, y] of the {car}'s centre, in pixels of the frame"),
    }


@dataclass(frozen=True)
class CarState:
    """Metres along and across the road (downwards in the image is right), heading in radians, metres a second."""

    x: float
    y: float
    heading: float
    speed: float


@dataclass(frozen=True)
class Road:
    """A road and its camera, which stands still across the road.

    Attributes:
        lanes: how many.
        dash_spacing: metres from dash to dash; the camera must pass less than half of it from frame to frame.
        shoulder: colour beside the road.
        asphalt: colour of the road.
        pixels_per_metre: of a frame.
        focus: the camera's place along the frame, as a share of its width.
        car: length and width of the cars in metres.
    """

    lanes: int
    dash_spacing: float
    shoulder: Colour
    asphalt: Colour
    pixels_per_metre: float
    focus: float
    car: tuple[float, float] = (5.0, 2.0)

    @property
    def middle(self) -> float:
        """Metres across the road."""
        return LANE_WIDTH * (self.lanes - 1) / 2

    def place(self, car: CarState, camera: float) -> list[float]:
        """[x, y] of a car's centre in pixels of the frame, seen by a camera so many metres along the road."""
        x = self.focus * WIDTH + (car.x - camera) * self.pixels_per_metre
        return [round(x, 2), round(HEIGHT / 2 + (car.y - self.middle) * self.pixels_per_metre, 2)]


def lane_change(begin: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of a step across the road that is done in each frame, and its speed in shares a second.

    It is a minimum-jerk curve of ``length`` frames, so that a lane change is smooth.
    """
    progress = np.clip((np.arange(FRAMES) - begin) / length, 0, 1)
    done = 10 * progress**3 - 15 * progress**4 + 6 * progress**5
    return done, 30 * (progress * (1 - progress)) ** 2 * FPS / length


def draw_frames(
    road: Road, states: Sequence[Sequence[CarState]], colours: Sequence[Colour], cameras: Sequence[float]
) -> np.ndarray:
    """uint8 [F, H, W, 3]: the cars of each frame in their colours, from a camera so many metres along the road."""
    import pygame
    from highway_env.road.graphics import LaneGraphics, WorldSurface
    from highway_env.road.road import RoadNetwork
    from highway_env.vehicle.graphics import VehicleGraphics
    from highway_env.vehicle.kinematics import Vehicle

    class SparseLaneGraphics(LaneGraphics):
        STRIPE_SPACING = road.dash_spacing

    size = (WIDTH * SUPERSAMPLE, HEIGHT * SUPERSAMPLE)
    surface = WorldSurface(size, 0, pygame.Surface(size))
    surface.scaling = road.pixels_per_metre * SUPERSAMPLE
    surface.centering_position = [road.focus, 0.5]
    lanes = RoadNetwork.straight_road_network(road.lanes).lanes_list()
    half_road = LANE_WIDTH * (road.lanes / 2 + 0.1)
    frames = []
    for cars, camera in zip(states, cameras, strict=True):
        surface.move_display_window_to(np.array([camera, road.middle]))
        surface.fill(road.shoulder)
        top, bottom = (surface.pos2pix(0, road.middle + side)[1] for side in (-half_road, half_road))
        surface.fill(road.asphalt, (0, top, size[0], bottom - top))
        for lane in lanes:
            SparseLaneGraphics.display(lane, surface)
        for car, colour in zip(cars, colours, strict=True):
            vehicle = Vehicle(None, (car.x, car.y), car.heading, car.speed)
            vehicle.color = colour
            vehicle.LENGTH, vehicle.WIDTH = road.car
            VehicleGraphics.display(vehicle, surface, offscreen=True)
        image = np.transpose(pygame.surfarray.array3d(surface), (1, 0, 2))
        frames.append(area_downscale(image, SUPERSAMPLE))
    return np.stack(frames)
