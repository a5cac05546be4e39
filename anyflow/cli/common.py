"""What the commands share: reading lists of numbers, choosing a fresh folder, printing JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from anyflow.errors import UserError
from anyflow.system.files import partial_folder, require_place
from anyflow.system.places import find_shipped

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document for machines, and nothing else, on stdout.")
]


GuidanceScale = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Guidance of a network that has none in its weights (a teacher, plain Wan): two calls a step; 1 is none; "
        "else as the model says.",
        min=1,
    ),
]
Negative = Annotated[
    str | None, typer.Option("--negative", help="The negative prompt that guidance leads away from; else the model's.")
]
PRECISIONS = ("float32", "bfloat16")

Precision = Annotated[
    str,
    typer.Option(help=f"Of the network, {' or '.join(PRECISIONS)}; else on a GPU that of the model's recipe."),
]
"""What the network computes in; the autoencoder, the times and the samples' state are float32 in either."""

SAMPLERS = ("flowmap", "euler", "renoise")
"""How jumps can be taken: see :class:`anyflow.flowmap.sampling.SamplerKind`."""

Sampler = Annotated[
    str | None, typer.Option(help=f"How jumps are taken, {' | '.join(SAMPLERS)}; else as the model says.")
]
Model = Annotated[
    str, typer.Option(help="A model folder, a run's folder, or a hub id.", parser=find_shipped, metavar="MODEL")
]
NoiseSeed = Annotated[int, typer.Option(help="Seed of the noise.", min=0)]
BatchSize = Annotated[int, typer.Option(help="Clips a pass, at most: of large ones fewer fit.", min=1)]
Card = Annotated[str, typer.Argument(metavar="CARD", help="A dataset card: a name in data/, a file, or its folder.")]
LOCAL_DATABASE = "sqlite:///runs/mlflow.db"


def print_json(document: Any) -> None:
    """One JSON document on stdout; paths and the like as text."""
    typer.echo(json.dumps(document, indent=2, default=str, ensure_ascii=False))


def parse_steps(text: str) -> list[int]:
    """``1,4,16`` as numbers, ascending and once each.

    Raises:
        UserError: one of them is no whole number from 1 to 1000.
    """
    try:
        steps = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        steps = []
    if not steps or steps[0] < 1 or steps[-1] > 1000:
        raise UserError(
            f"--steps {text!r} is no list of whole numbers from 1 to 1000: write for example --steps 1,4,16"
        )
    return steps


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``832x480`` as (width, height); None stays None.

    Raises:
        UserError: it is no such text.
    """
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise UserError(f"--size {text!r}: write WIDTHxHEIGHT, such as 832x480")
    return int(width), int(height)


def parse_names(text: str) -> tuple[str, ...]:
    """``train, heldout`` as names, without the empty ones."""
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def parse_seeds(text: str) -> list[int]:
    """``0,1,2`` as numbers, in that order and once each.

    Raises:
        UserError: one of them is no whole number from 0 up.
    """
    try:
        seeds = list(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {text!r} is no list of whole numbers from 0 up: write for example --seeds 0,1,2")
    return seeds


def check_sampler(sampler: str | None) -> None:
    """Refuse a way of sampling that is not known; None leaves it to the model.

    Raises:
        UserError: it is not known.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler!r} is not known: give one of {', '.join(SAMPLERS)}, or leave it out")


def check_precision(precision: str) -> None:
    """Refuse a precision that is not known; empty leaves it to model and device.

    Raises:
        UserError: it is not known.
    """
    if precision and precision not in PRECISIONS:
        raise UserError(f"--precision {precision!r} is not known: give {' or '.join(PRECISIONS)}, or leave it out")


def fresh_folder(out: Path | None, default: str = "", option: str = "--out") -> Path:
    """The folder to write results in: ``out``, which must be free, or ``default``, numbered if taken. Nothing is made.

    Raises:
        UserError: ``out`` is no folder that can be written, or holds something already.
    """
    if out is not None:
        require_place(out, option)
        if _is_used(out):
            raise UserError(f"{option} {out} is not empty: choose another folder")
        return out
    require_place(Path(default), "the folder for results,")
    number = 1
    while _is_used(folder := Path(default if number == 1 else f"{default}-{number}")):
        number += 1
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in that takes its place on success and vanishes on failure: nothing is left half-written.

    Raises:
        UserError: another process took the place meanwhile; what was written stays beside it.
    """
    with partial_folder(folder) as partial:
        yield partial
        if _is_used(folder):
            kept = partial.rename(folder.with_name(f"{folder.name}-{os.getpid()}"))
            raise UserError(f"{folder} was taken by another process meanwhile: the results are in {kept}")
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)


def _is_used(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
