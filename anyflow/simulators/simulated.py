"""Sources of footage, one file a format: simulators and importers, all yielding the same Clip.

A simulated source has ``render(count, split, seed, workers, look) -> Iterator[Clip]``. A clip is a pure function of
(seed, split, number, look), so the number of workers changes nothing but the time. A source's ``LOOKS`` are the ways in
which its world can be seen, the first by default: the same motions and labels from another camera, or in other rooms.
One look can be the world that a model knows and another the footage that it is to learn.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TypeVar

import numpy as np

from anyflow.data.clip import SPLITS, SplitName
from anyflow.data.controls import Control
from anyflow.errors import UserError

FRAMES, HEIGHT, WIDTH = 17, 64, 96
"""Every simulated clip has this many frames of this size: a small Wan-like VAE codes it as 5 x 8 x 12 latents."""

SIMULATORS = {
    "driving": "anyflow.simulators.driving",
    "driving-open": "anyflow.simulators.driving_open",
    "robotics": "anyflow.simulators.robotics",
    "games": "anyflow.simulators.games",
}

Look = TypeVar("Look")


def on_screen(holds: str) -> Control:
    """A place in the picture at each frame, as a control."""
    return Control(holds, 2, unit=("pixel", "pixel"), numbers=("x", "y"))


def simulator(domain: str) -> ModuleType:
    """The source of a simulated domain: a module with ``render`` and the constants that a card quotes."""
    if domain not in SIMULATORS:
        raise UserError(f"domain {domain!r} has no simulator: choose one of {', '.join(SIMULATORS)}")
    return importlib.import_module(SIMULATORS[domain])


def choose_look(domain: str, looks: Mapping[str, Look], name: str | None) -> Look:
    """A source's look by its name; the first without one."""
    chosen = next(iter(looks)) if name is None else name
    if chosen not in looks:
        raise UserError(f"look {chosen!r} is not one of {domain}'s: choose one of {', '.join(looks)}")
    return looks[chosen]


def need_package(module: str, package: str) -> ModuleType:
    """Import a simulator, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(_missing(package)) from error


def _missing(package: str) -> str:
    return f"package {package!r} is needed to render this domain: `make data` installs it, or pip install -e '.[sim]'"


def package_versions(*packages: str) -> dict[str, str]:
    """The versions of installed packages, for a card's provenance; a UserError says which one is not installed."""
    try:
        return {package: version(package) for package in packages}
    except PackageNotFoundError as error:
        raise UserError(_missing(str(error.name))) from error


def clip_generator(seed: int, split: SplitName, number: int) -> np.random.Generator:
    """The random generator of one clip; train and held-out clips never share one."""
    return np.random.default_rng(np.random.SeedSequence((seed, SPLITS.index(split), number)))


def area_downscale(image: np.ndarray, factor: int) -> np.ndarray:
    """uint8 [H*factor, W*factor, 3] -> uint8 [H, W, 3], each pixel the mean of its square."""
    height, width, channels = image.shape
    squares = image.reshape(height // factor, factor, width // factor, factor, channels)
    return np.rint(squares.mean(axis=(1, 3))).astype(np.uint8)
