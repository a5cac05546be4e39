"""``anyflow ...``: the street door. Thin: heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import errno
import os
import sys

import typer

from anyflow import __version__
from anyflow.commands import (
    bench,
    compare,
    data,
    doctor,
    evaluate,
    experiment,
    export,
    plan,
    recipes,
    sample,
    sync,
    tracking,
    train,
    vbench,
)
from anyflow.errors import EXIT_INTERRUPTED, EXIT_USER, UserError
from anyflow.ranks import leave_report

app = typer.Typer(
    name="anyflow",
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
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("experiment")(experiment.experiment)
app.command("vbench")(vbench.vbench)
app.command("export")(export.export)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("sync")(sync.sync)
app.command("mlflow")(tracking.mlflow)


def main() -> None:
    """Run a command; the user's mistakes become one line on stderr and exit code 2, without a traceback."""
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if not _disk_is_full(error):
            if leave_report():  # one rank of several: its watcher speaks for all
                os._exit(1)  # without waiting for collectives that will never end
            raise
        place = getattr(error, "filename", None)
        full = f"the disk is full ({place})" if place else "the disk is full"
        _fail(f"{full}: free some space, or write elsewhere by --out; a run goes on by --resume auto")


def _disk_is_full(error: BaseException) -> bool:
    """Whether an error, or what it came from, says so: by its number, or in the words of a compiled library."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(
        (isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(words in str(link) for words in ("No space left on device", "disk is full"))
        for link in chain
    )


def _fail(sentence: str) -> None:
    text = f"anyflow: {' '.join(sentence.split())}"
    if leave_report(text):
        os._exit(EXIT_USER)
    print(text, file=sys.stderr)
    sys.exit(EXIT_USER)


if __name__ == "__main__":
    main()
