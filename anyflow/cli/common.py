"""What the commands share: reading lists of numbers, choosing a fresh folder, printing JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from anyflow.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError
from anyflow.system.claims import claim_numbered, give_up_claim
from anyflow.system.files import partial_folder, require_place, sync_tree
from anyflow.system.places import find_shipped
from anyflow.system.signals import Terminated, sigterm_raises

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document for machines, and nothing else, on stdout.")
]
Model = Annotated[
    str, typer.Option(help="A model folder, a run's folder, or a hub id.", parser=find_shipped, metavar="MODEL")
]
Card = Annotated[str, typer.Argument(metavar="CARD", help="A dataset card: a name in data/, a file, or its folder.")]


@contextmanager
def goes_on(again: str) -> Iterator[None]:
    """Where a signal stops the block, exit with its code and say how to go on: nothing is lost."""
    try:
        with sigterm_raises(Terminated):
            yield
    except (KeyboardInterrupt, Terminated) as stop:
        typer.echo(f"\nStopped: {again}", err=True)
        raise typer.Exit(EXIT_PREEMPTED if isinstance(stop, Terminated) else EXIT_INTERRUPTED) from None


def print_json(document: Any) -> None:
    """One JSON document on stdout; paths and the like as text."""
    typer.echo(json.dumps(document, indent=2, default=str, ensure_ascii=False))


def parse_numbers(text: str, option: str, low: int = 0, high: int | None = None, *, example: str) -> tuple[int, ...]:
    """``1,4,16`` as numbers, in that order and once each.

    Args:
        text: as given.
        option: what it was given by.
        low: the least of them.
        high: the largest, if there is one.
        example: how it could be written.

    Raises:
        UserError: there is none, or one of them is not a whole number within the range.
    """
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < low or (high is not None and max(numbers) > high):
        most = "up" if high is None else f"to {high}"
        raise UserError(
            f"{option} {text!r} is no list of whole numbers from {low} {most}: write for example {option} {example}"
        )
    return numbers


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


def fresh_folder(out: Path | None, default: str = "", option: str = "--out") -> Path:
    """The folder to write results in: ``out``, which must be free, or ``default``, numbered if taken. Nothing is made.

    Of several processes that start together each is given a number of its own.

    Raises:
        UserError: ``out`` is no folder that can be written, or holds something already.
    """
    if out is not None:
        require_place(out, option)
        if _is_used(out):
            raise UserError(f"{option} {out} is not empty: choose another folder")
        return out
    require_place(Path(default), "the folder for results,")
    return claim_numbered(Path(default), _is_used)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in that takes its place on success and vanishes on failure: nothing is left half-written.

    Raises:
        UserError: another process took the place meanwhile; what was written stays beside it.
    """
    with partial_folder(folder) as partial:
        yield partial
        sync_tree(partial)
        if _is_used(folder):
            kept = partial.rename(folder.with_name(f"{folder.name}-{os.getpid()}"))
            raise UserError(f"{folder} was taken by another process meanwhile: the results are in {kept}")
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    give_up_claim(folder)


def _is_used(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
