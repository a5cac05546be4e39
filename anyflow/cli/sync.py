"""``anyflow sync``: send the local runs to a tracking server."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from anyflow.cli.common import Json, print_json
from anyflow.errors import UserError
from anyflow.system.addresses import LOCAL_DATABASE, check_server, check_store


def sync(
    to: Annotated[str, typer.Option(help="Address of the MLflow server, for example http://tracking:5000.")],
    uri: Annotated[str, typer.Option(help="The local database.")] = LOCAL_DATABASE,
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.", min=1)] = 10.0,
    as_json: Json = False,
) -> None:
    """Copy local runs to a tracking server: parameters, figures, tags and files. What is there already is left alone.

    \b
    Examples:
      anyflow sync --to http://127.0.0.1:5001
      anyflow sync --to https://mlflow.example.org --timeout 60 --json
    \b
    Runs are always recorded on this machine first, so that no server can stop or slow a training. Start it again after
    an interruption: it goes on. Exit code 2: the server does not answer; nothing is lost.
    """
    uri = check_store(uri, "--uri")
    if to == uri:
        raise UserError(f"--to {to} is the local database itself: name a server")
    check_server(to, "--to")
    from anyflow.system.console import progress_line
    from anyflow.tracking.sync import sending_alone
    from anyflow.tracking.sync import sync as copy

    with sending_alone(uri), progress_line("sending") as on_progress:
        sent = copy(uri, to, timeout=timeout, on_progress=on_progress)
    if as_json:
        print_json({"to": to, **asdict(sent)})
        return
    told = f"{sent.figures} figures, {sent.files} files"
    typer.echo(f"{sent.runs} runs sent to {to} ({told}), {sent.unchanged} were there")
