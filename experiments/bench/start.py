"""The seconds from the command to the first training step, and where they go."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def start_benchmark(recipe: str = "finetune/driving", overrides: tuple[str, ...] = ()) -> dict[str, float]:
    """Seconds from the command to the first training step, by part, in a fresh process.

    The samples before training are left out: they are part of the run's result, not of its start.

    Raises:
        UserError: the recipe cannot be run.
    """
    command = [sys.executable, "-m", "experiments.bench.start", str(time.time()), recipe, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        from anyflow.errors import UserError

        raise UserError(f"the start of {recipe} cannot be measured: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_start(began: float, recipe_name: str, overrides: list[str]) -> dict[str, float]:
    """What ``anyflow train`` does up to its first step, timed from ``began`` (seconds since the epoch)."""
    marks: dict[str, float] = {}
    last = began

    def mark(part: str) -> None:
        nonlocal last
        now = time.time()
        marks[part], last = now - last, now

    import anyflow.cli.main  # noqa: F401
    from anyflow.system.imports import quick_imports

    mark("python and command line")
    from anyflow.recipe import check_files, load_recipe

    recipe = load_recipe(recipe_name, overrides=["stage.steps=1", "run.tracking_uri=", *overrides])
    check_files(recipe)
    mark("recipe")
    with quick_imports():  # as the command does
        from anyflow.tracking.runs import RunFolder
        from anyflow.training.launch import assemble, fit

    mark("libraries (torch, lightning, diffusers)")
    parts = assemble(recipe)
    mark("weights and data")
    take_step = parts.stage.optimizer_step

    def first_step(*arguments: Any, **options: Any) -> None:
        take_step(*arguments, **options)
        mark("trainer, first batch, first step")

    parts.stage.optimizer_step = first_step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        fit(recipe, RunFolder(Path(folder)), parts, None)
    marks["total"] = sum(marks.values())
    return marks


if __name__ == "__main__":
    print(json.dumps(measure_start(float(sys.argv[1]), sys.argv[2], sys.argv[3:])))
