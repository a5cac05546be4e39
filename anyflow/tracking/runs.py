"""A run's folder: where everything of one training lies, and which run ``--resume auto`` means.

runs/finetune-driving-001/
    recipe.yaml      the resolved recipe          status.json   running | preempted | failed | finished
    checkpoints/     step_00000100/, latest       curves/       the any-step curve before and after
    model/           the exported pipeline        report/       picture, film, plot, table
    figures.jsonl    what was logged in training   skipped.json     clips that could not be used, if there are any
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.errors import UserError, first_line
from anyflow.recipe import Recipe, load_recipe, to_dict
from anyflow.recipe.fields import flatten
from anyflow.system.files import write_atomically
from anyflow.system.locks import NoLocks, locked
from anyflow.tracking.checkpoints import clear_leftovers, latest_checkpoint

FREE_ON_RESUME = (
    *("run.recipe", "run.name", "run.out", "run.tracking_uri", "run.experiment", "run.deterministic"),
    *("hardware.", "checkpoint.", "sampling."),
    *("data.num_workers", "data.error_budget", "data.batch_size"),
)
"""Fields that may change when a run goes on: they do not touch what is computed. (A rank's batch may change with the
number of ranks; that the batch over all ranks does not, the data's plan sees to.)"""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.path.name

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """Resumable states."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported diffusers pipeline."""
        return self.path / "model"

    @property
    def figures(self) -> Path:
        """Every figure that was logged, a line of JSON each time."""
        return self.path / "figures.jsonl"

    @property
    def report(self) -> Path:
        """Pictures, plots and numbers for people."""
        return self.path / "report"

    @property
    def status(self) -> dict[str, Any]:
        """What is known of the run: ``state``, ``mlflow_run_id`` and whatever was noted; empty before it starts.

        Raises:
            UserError: its file is damaged.
        """
        path = self.path / "status.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)}): delete it, only notes on the run are in it"
            ) from error

    def note(self, **facts: Any) -> None:
        """Add facts to the status, atomically."""
        write_atomically(self.path / "status.json", json.dumps({**self.status, **facts}, indent=2) + "\n")

    def samples_of(self, label: str) -> Path:
        """Where the samples of a curve lie that is being measured."""
        return self.path / "curves" / f".{label}"

    def clear_leftovers(self, total_steps: int, *, is_changed: bool) -> None:
        """Remove what killed processes have left; who calls holds the run.

        Samples stay for a curve that is to be measured now with the very same weights.
        """
        clear_leftovers(self.checkpoints)
        checkpoint = self.checkpoint
        step = checkpoint.parent.name if checkpoint is not None else "before"
        due = {step, "after" if step == f"step_{total_steps:08d}" else step}
        for folder in (self.path / "curves").glob(".*"):
            if is_changed or folder.name.removeprefix(".") not in due:
                shutil.rmtree(folder, ignore_errors=True)

    def give_back(self) -> None:
        """Remove the folder if nothing was begun in it, and nobody is about to."""
        if self.path.is_dir() and {path.name for path in self.path.iterdir()} <= {".lock"}:
            with suppress(BlockingIOError, FileNotFoundError, NoLocks), locked(self.path / ".lock", 0.0):
                shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def held(self, patience: float = 10.0) -> Iterator[None]:
        """Keep other processes from training in this folder; the hold ends with the process, however that ends.

        Args:
            patience: seconds to wait for another holder: the workers of a killed one take a moment to leave.

        Raises:
            UserError: another process still trains in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / ".lock", patience))
            except NoLocks as error:
                print(f"{error}. The run goes on: start no other one in {self.path}", file=sys.stderr)
            except BlockingIOError as error:
                raise UserError(
                    f"{self.path} is being trained by another process: stop that one first, or start a new run"
                ) from error
            yield

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return latest_checkpoint(self.checkpoints)


@contextmanager
def taken_run(root: Path, name: str, *, out: Path | None, resume: str | None) -> Iterator[RunFolder]:
    """The folder to train in, found and locked in one act; it goes if nothing was begun in it. As :func:`open_run`.

    Raises:
        UserError: as there, or another process trains in it, or has begun it meanwhile.
    """
    run = open_run(root, name, out=out, resume=resume)
    try:
        with run.held():
            if resume is None and run.recipe.exists():
                raise UserError(f"{run.path} was begun by another process meanwhile: choose another --out, or none")
            yield run
    finally:
        run.give_back()


def open_run(root: Path, name: str, *, out: Path | None, resume: str | None) -> RunFolder:
    """The folder to train in: a new one, or the one to go on with.

    Args:
        root: Where runs live.
        name: The recipe's name; new runs are numbered after it.
        out: A folder that the user chose.
        resume: None for a new run, whose folder is made; ``auto`` for the newest unfinished run of this name (or
            ``out``), and a new one where there is none; otherwise a run's name or folder.

    Raises:
        UserError: The chosen folder is in use, or the run to resume does not exist.
    """
    root, out = root.expanduser(), out.expanduser() if out is not None else None
    if resume is None or resume == "auto":
        candidate = out if out is not None else _newest(root, name)
        if resume == "auto" and candidate is not None and (candidate / "recipe.yaml").exists():
            return RunFolder(candidate)
        if out is not None and out.exists() and any(out.iterdir()):
            raise UserError(f"--out {out} is not empty; choose another folder, or --resume auto to go on with it")
        return RunFolder(out if out is not None else _claimed(root, name))
    for path in (Path(resume).expanduser(), root / resume):
        if (path / "recipe.yaml").exists():
            return RunFolder(path)
    known = ", ".join(sorted(path.parent.name for path in root.glob("*/recipe.yaml"))) or "none yet"
    raise UserError(f"--resume {resume}: there is no such run in {root} (runs: {known})")


def changed_fields(run: RunFolder, recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """``(key, was, is)`` of each field that a recipe computes something else by than the run that was started."""
    if not run.recipe.exists():
        return []
    saved = dict(flatten(to_dict(load_recipe(str(run.recipe)))))
    now = dict(flatten(to_dict(recipe)))
    different = [key for key in now if saved.get(key) != now[key] and not key.startswith(FREE_ON_RESUME)]
    return [(key, saved.get(key), now[key]) for key in different]


def _numbered(root: Path, name: str) -> dict[int, Path]:
    pattern = re.compile(re.escape(name) + r"-(\d{3,})")
    matches = ((pattern.fullmatch(path.name), path) for path in root.glob(f"{name}-*") if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def _claimed(root: Path, name: str) -> Path:
    """A new folder with the next number, which no other process that starts now is given."""
    number = max(_numbered(root, name), default=0) + 1
    root.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            (folder := root / f"{name}-{number:03d}").mkdir()
            return folder
        except FileExistsError:
            number += 1


def _newest(root: Path, name: str) -> Path | None:
    """The newest run of a name, unless it is finished."""
    numbered = _numbered(root, name)
    if not numbered:
        return None
    newest = numbered[max(numbered)]
    return None if RunFolder(newest).status.get("state") == "finished" else newest
