"""``anyflow mlflow``: where the runs are recorded, and how to look at them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from anyflow.cli.common import Json, print_json
from anyflow.errors import UserError
from anyflow.system.addresses import (
    LOCAL_DATABASE,
    check_store,
    how_to_open,
    is_server,
    listen_here,
    tell_unused_variable,
)
from anyflow.system.processes import begin, end
from anyflow.system.signals import sigterm_raises

GRACE_SECONDS = 10.0
"""How long the server may take to end by itself."""


def mlflow(
    uri: Annotated[str, typer.Option(help="MLflow's database or server.")] = LOCAL_DATABASE,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the runs on 127.0.0.1 until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(help="Port to serve on.", min=1, max=65535)] = 5000,
    last: Annotated[int, typer.Option(help="How many of the newest runs to list.", min=1)] = 10,
    as_json: Json = False,
) -> None:
    """List the newest runs, or serve them for a browser (on this machine only).

    \b
    Examples:
      anyflow mlflow
      anyflow mlflow --serve --port 5001
      anyflow mlflow --last 3 --json
    """
    uri = check_store(uri, "--uri")
    if uri == LOCAL_DATABASE:
        tell_unused_variable("--uri")
    if serve:
        _check_servable(uri, port)
        typer.echo(f"serving {uri} at http://127.0.0.1:{port} (Ctrl-C ends it)", err=True)
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
        raise typer.Exit(serve_until_stopped([*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]))
    from anyflow.tracking.mlflow import newest_runs

    runs = newest_runs(uri, last)
    if as_json:
        print_json({"uri": uri, "runs": runs})
        return
    for run in runs:
        loss = f"loss {run['metrics']['loss']:.4g}" if "loss" in run["metrics"] else ""
        typer.echo(f"{run['started']}  {run['status']:<9} {run['name']:<40} {loss}")
    typer.echo(f"\nthe newest runs of {uri} ({len(runs)}); open them with: {how_to_open(uri)}")


def _check_servable(uri: str, port: int) -> None:
    """Refuse what MLflow's server would end by with a traceback.

    Raises:
        UserError: the store is a server itself, or the port is taken.
    """
    if is_server(uri):
        raise UserError(f"--serve: {uri} is a server already: open it in a browser, or name a database")
    listen_here(port).close()


def serve_until_stopped(command: list[str]) -> int:
    """Run a server until it ends, or Ctrl-C or SIGTERM comes: then it and all its processes are ended."""
    with sigterm_raises(KeyboardInterrupt):
        process = begin(command)  # Ctrl-C comes here alone: the server would print a traceback
        try:
            return process.wait()
        except KeyboardInterrupt:
            end(process, grace=GRACE_SECONDS)
            return 0
