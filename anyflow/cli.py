"""``anyflow ...``: the street door. Thin: heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import errno
import os
import sys

import typer

from anyflow import __version__
from anyflow.commands import evaluate, export, recipes, sample, tracking, train
from anyflow.errors import EXIT_INTERRUPTED, EXIT_USER, UserError

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
app.command("export")(export.export)
app.add_typer(recipes.app, name="recipes")
app.command("mlflow")(tracking.mlflow)


def main() -> None:
    """Run a command; the user's mistakes become one line on stderr and exit code 2, without a traceback."""
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = os.path.abspath(str(error.filename)) if error.filename else os.getcwd()
        _fail(
            f"the disk is full ({place}): free some space or choose another folder by --out, then go on by --resume auto"
        )
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _fail(sentence: str) -> None:
    print(f"anyflow: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(EXIT_USER)


if __name__ == "__main__":
    main()
