"""Drawn clips for the probes and pictures: a green car on a road, a cyan finger, a panorama seen through a window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Frames = NDArray[np.uint8]

FRAMES, HEIGHT, WIDTH = 17, 64, 96


def road(count: int = FRAMES) -> Frames:
    """A grey road with white marks between three lanes."""
    clip = np.full((count, HEIGHT, WIDTH, 3), 100, np.uint8)
    clip[:, (23, 41), ::3] = 230
    return clip


def put_car(frame: Frames, x: float, y: float, colour: tuple[int, int, int] = (50, 200, 0)) -> None:
    """Draw a car of 22 x 9 pixels about (x, y)."""
    top, left = round(y - 4), round(x - 11)
    frame[max(0, top) : top + 9, max(0, left) : left + 22] = colour


def drive(heights: Sequence[float], x: float = 36.0) -> Frames:
    """A clip in which the green car stands at these heights."""
    clip = road(len(heights))
    for frame, y in zip(clip, heights, strict=True):
        put_car(frame, x, y)
    return clip


def lane_change(change: float, start: float = 32.0, begin: int = 2, length: int = 6) -> Frames:
    """A clip in which the car moves by ``change`` pixels across the road, smoothly."""
    progress = np.clip((np.arange(FRAMES) - begin) / length, 0, 1)
    return drive(list(start + change * (3 * progress**2 - 2 * progress**3)))


def grip(places: NDArray[np.float64]) -> Frames:
    """A clip in which a cyan finger of 3 x 5 pixels, under a red arm, stands at these places ``[F, 2]``."""
    clip = np.full((len(places), HEIGHT, WIDTH, 3), (180, 150, 120), np.uint8)
    for frame, (x, y) in zip(clip, places, strict=True):
        column, row = round(x), round(y)
        frame[: max(1, row - 4), max(0, column - 3) : column + 4] = (150, 30, 35)
        frame[max(0, row - 2) : row + 3, max(0, column - 1) : column + 2] = (10, 230, 230)
    return clip


def panorama(seed: int = 0, height: int = 96, width: int = 512) -> Tensor:
    """A smooth random picture ``[1, 3, height, width]``, 0..1."""
    noise = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(noise, size=(height, width), mode="bicubic", align_corners=True).clamp(0, 1)


def look(shift_per_frame: float, growth_per_frame: float = 0.0, seed: int = 0) -> Frames:
    """A view over a panorama: the scene moves by this many pixels to the right each frame, and grows by this share."""
    scene = panorama(seed)
    y, x = torch.meshgrid(torch.arange(HEIGHT) - (HEIGHT - 1) / 2, torch.arange(WIDTH) - (WIDTH - 1) / 2, indexing="ij")
    frames = []
    for time in range(FRAMES):
        zoom = (1 + growth_per_frame) ** time
        places = torch.stack([(x - shift_per_frame * time) / zoom / 255.5, y / zoom / 47.5], -1)[None]
        frames.append(functional.grid_sample(scene, places, align_corners=True)[0])
    return (torch.stack(frames) * 255).round().byte().permute(0, 2, 3, 1).numpy()
