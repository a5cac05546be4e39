"""Sources of footage, one file a format: simulators and importers, all yielding the same Clip.

A simulated source has ``render(count, split, seed, workers, look) -> Iterator[Clip]``. A clip is a pure function of
(seed, split, number, look), so the number of workers changes nothing but the time. A source's ``LOOKS`` are the ways in
which its world can be seen, the first by default: the same motions and labels from another camera, or in other rooms.
One look can be the world that a model knows and another the footage that it is to learn.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from types import ModuleType
from typing import Literal, TypeVar

import numpy as np

from anyflow.errors import UserError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
FRAMES, HEIGHT, WIDTH = 17, 64, 96
"""Every simulated clip has this many frames of this size: a small Wan-like VAE codes it as 5 x 8 x 12 latents."""

SIMULATORS = {
    "driving": "anyflow.data.sources.driving",
    "robotics": "anyflow.data.sources.robotics",
    "games": "anyflow.data.sources.games",
}

Job = TypeVar("Job")
Result = TypeVar("Result")
Look = TypeVar("Look")


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


def clip_generator(seed: int, split: Split, number: int) -> np.random.Generator:
    """The random generator of one clip; train and held-out clips never share one."""
    return np.random.default_rng(np.random.SeedSequence((seed, SPLITS.index(split), number)))


def area_downscale(image: np.ndarray, factor: int) -> np.ndarray:
    """uint8 [H*factor, W*factor, 3] -> uint8 [H, W, 3], each pixel the mean of its square."""
    height, width, channels = image.shape
    squares = image.reshape(height // factor, factor, width // factor, factor, channels)
    return np.rint(squares.mean(axis=(1, 3))).astype(np.uint8)


MAX_DEATHS = 3
"""Processes of a rendering that may be killed one after another without a clip between."""


def run_jobs(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, jobs_per_process: int | None = None
) -> Iterator[Result]:
    """Results in the order of the jobs, from ``workers`` processes; few jobs are in flight, so memory stays small.

    ``jobs_per_process=1`` gives each job a process of its own, for simulators that cannot be opened twice. A process
    that is killed is replaced, and its jobs are done again.

    Raises:
        UserError: no worker, or processes that are killed again and again.
    """
    if workers < 1:
        raise UserError(f"workers {workers}: give at least 1")
    context = multiprocessing.get_context("spawn")
    remaining, waiting, deaths = iter(jobs), list[Job](), 0
    while deaths < MAX_DEATHS:
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=_end_with_parent, max_tasks_per_child=jobs_per_process
        ) as pool:
            waiting += islice(remaining, 2 * workers - len(waiting))
            try:
                pending: list[Future[Result]] = [pool.submit(function, job) for job in waiting]
                while pending:
                    result = pending.pop(0).result()
                    waiting.pop(0)
                    deaths = 0
                    for job in islice(remaining, 1):
                        waiting.append(job)
                        pending.append(pool.submit(function, job))
                    yield result
                return
            except BrokenProcessPool:
                deaths += 1
    raise UserError(
        f"a process that renders was killed {MAX_DEATHS} times in a row, by a lack of memory or from outside: "
        "give fewer --workers, or close other programs"
    )


def _end_with_parent() -> None:
    """End this worker when the process that started it is killed: nobody else would ever tell it to."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def batches(count: int, size: int) -> list[range]:
    """The numbers 0..count-1 in runs of ``size``."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
