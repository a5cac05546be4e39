"""``anyflow ...``: the street door. Thin: heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

from anyflow.system import early  # noqa: F401  the first of all imports: it answers signals

# isort: split

import logging
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from anyflow import __version__
from anyflow.cli import (
    compare,
    data,
    doctor,
    evaluate,
    experiment,
    export,
    plan,
    play,
    recipes,
    sample,
    sync,
    tracking,
    train,
    vbench,
)
from anyflow.errors import EXIT_INTERRUPTED, EXIT_USER, UserError, explain
from anyflow.system.places import expand_word
from anyflow.system.ranks import expand_segments, leave_report


class Street(TyperGroup):
    """All commands: ``~`` is the home folder wherever a path can stand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words of the command line."""
        return super().parse_args(ctx, [expand_word(word) for word in args])


app = typer.Typer(
    name="anyflow",
    cls=Street,
    help="Any-step video generators: train them, fine-tune them on your clips, sample them at any number of steps.",
    epilog="Exit codes: 0 done, 2 a mistake of the user's, 75 stopped by SIGTERM and saved, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("play")(play.play)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("experiment")(experiment.experiment)
app.command("vbench")(vbench.vbench)
app.command("export")(export.export)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)
app.command("sync")(sync.sync)
app.command("mlflow")(tracking.mlflow)


def main(door: typer.Typer | None = None) -> None:
    """Run a command; the user's mistakes become one line on stderr and exit code 2, without a traceback."""
    expand_segments()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it hints at packages for CPUs
    try:
        (door or app)()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        sentence = explain(error)
        if sentence is not None:
            _fail(sentence)
        if leave_report():  # one rank of several: its watcher speaks for all
            os._exit(1)  # without waiting for collectives that will never end
        raise


def _fail(sentence: str) -> None:
    text = f"anyflow: {' '.join(sentence.split())}"
    if leave_report(text):
        os._exit(EXIT_USER)
    print(text, file=sys.stderr)
    sys.exit(EXIT_USER)
