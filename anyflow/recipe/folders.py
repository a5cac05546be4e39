"""The folder of a run: a fresh one, or the one to go on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anyflow.errors import UserError
from anyflow.recipe.schema import Recipe


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and whether it goes on from a checkpoint that lies there."""

    path: Path
    resumes: bool


def choose_folder(recipe: Recipe, *, out: Path | None = None, resume: str | None = None) -> RunFolder:
    """The folder that a run will use; nothing is created.

    Without ``out`` it is ``<run.out>/<run.name>``, with ``-2``, ``-3`` ... appended when taken. ``resume="auto"``
    goes on with the newest of those that has a checkpoint, and starts afresh when there is none; any other value
    names a run's folder (or its name under ``run.out``), which must have a checkpoint.

    Raises:
        UserError: ``out`` is used already, or the run to resume is missing or has no checkpoint.
    """
    root = Path(recipe.run.out)
    if resume and resume != "auto":
        path = next((p for p in (Path(resume), root / resume) if p.is_dir()), None)
        if path is None:
            raise UserError(
                f"--resume {resume}: there is no such run, neither as a folder nor under {root}: see 'ls {root}'"
            )
        if not has_checkpoint(path):
            raise UserError(f"--resume {resume}: {path} has no checkpoint yet: start the run again without --resume")
        return RunFolder(path, True)
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    candidates = [out] if out is not None else [root / recipe.run.name, *_numbered(root, recipe.run.name)]
    if resume == "auto":
        with_checkpoint = [path for path in candidates if has_checkpoint(path)]
        if with_checkpoint:
            return RunFolder(with_checkpoint[-1], True)
    if out is not None:
        if is_used(out):
            raise UserError(
                f"--out {out} is in use already: name another folder, or go on with it by --resume auto --out {out}"
            )
        return RunFolder(out, False)
    if not is_used(candidates[0]):
        return RunFolder(candidates[0], False)
    last = int(candidates[-1].name.rpartition("-")[2]) if len(candidates) > 1 else 1
    return RunFolder(root / f"{recipe.run.name}-{last + 1}", False)


def has_checkpoint(path: Path) -> bool:
    """Whether a run's folder holds a finished checkpoint (``checkpoints/step_N``)."""
    return any(item.is_dir() and item.name[5:].isdigit() for item in (path / "checkpoints").glob("step_*"))


def is_used(path: Path) -> bool:
    """Whether a folder exists and holds anything."""
    return path.is_dir() and any(path.iterdir())


def _numbered(root: Path, name: str) -> list[Path]:
    """``name-2``, ``name-3``, ... that exist, in the order of their numbers."""
    found = [path for path in root.glob(f"{name}-*") if path.name[len(name) + 1 :].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
