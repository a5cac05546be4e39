"""Addresses of stores that runs are recorded in: a database's file on this machine, or a server."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from pathlib import Path

from anyflow.errors import UserError
from anyflow.system.console import program

DATABASE = "sqlite:///"
"""What the address of a database's file begins with."""
LOCAL_DATABASE = f"{DATABASE}runs/mlflow.db"
"""Where runs are recorded if nobody says otherwise."""
VARIABLE = "MLFLOW_TRACKING_URI"
"""MLflow's own way to name a store."""

_SERVER = re.compile(r"https?://[^/\s]+\S*")
_HEAD = b"SQLite format 3\0"
_NAMED = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#]*@")


def is_server(address: str) -> bool:
    """Whether it is a server's address."""
    return _SERVER.fullmatch(address) is not None


def database_file(address: str) -> Path | None:
    """The file of a database's address; None for any other address."""
    path = address.removeprefix(DATABASE)
    return Path(path).expanduser() if address.startswith(DATABASE) and path.strip() else None


def check_secret(text: str, option: str) -> None:
    """Refuse an address that holds a name or a password: options are printed, recorded and published.

    Args:
        text: what was given; anything but an address passes.
        option: what it was given by.

    Raises:
        UserError: it holds one; what was given is not repeated.
    """
    if _NAMED.search(text):
        raise UserError(f"{option} holds a name or a password: leave them out and give credentials by the environment")


def check_server(address: str, option: str) -> str:
    """The address of a server.

    Raises:
        UserError: it is none, or holds a name, a password or a signature; then it is not repeated.
    """
    if "@" in address or "?" in address:
        raise UserError(
            f"{option} holds a name, a password or a signature: leave them out and give MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, by the environment"
        )
    if not is_server(address):
        raise UserError(f"{option} {address!r} is no server's address: give one such as http://tracking:5000")
    return address


def check_store(address: str, option: str, *, is_there: bool = True) -> str:
    """An address of a store, as MLflow takes it: ``~`` is the home folder.

    Args:
        address: what was given.
        option: what it was given by: ``--uri``, ``run.tracking_uri``.
        is_there: whether a database must be there already.

    Raises:
        UserError: it is no such address, holds a password, or its file is missing or no database.
    """
    file = database_file(address)
    if file is None:
        if is_server(address) or "@" in address:
            return check_server(address, option)
        raise UserError(
            f"{option}={address!r} is no store of runs: give {DATABASE}PATH.db, or a server such as http://tracking:5000"
        )
    if file.is_dir():
        raise UserError(f"{option}={address!r} is a folder: name the database's file in it, such as mlflow.db")
    if is_there and not file.is_file():
        raise UserError(f"{option} {address}: there is no such database: train something first, or name another one")
    if file.is_file() and file.stat().st_size:
        with open(file, "rb") as opened:
            if opened.read(len(_HEAD)) != _HEAD:
                raise UserError(f"{option} {address}: {file} is no SQLite database: name another file")
    return f"{DATABASE}{file}"


def listen_here(port: int, option: str = "--port") -> socket.socket:
    """A socket that listens on this machine alone (127.0.0.1); port 0 is any free one.

    Raises:
        UserError: the port is taken, or nobody but root may have it.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UserError(f"{option} {port} cannot be served on ({error.strerror}): give another one") from error
    return listening


def how_to_open(address: str) -> str:
    """The command that opens a store in a browser, from the working folder."""
    if is_server(address):
        return f"open {address} in a browser"
    file = database_file(address)
    is_usual = file is not None and file.absolute() == Path(LOCAL_DATABASE.removeprefix(DATABASE)).absolute()
    where = "" if is_usual else f" --uri {shlex.quote(address)}"
    return f"{program()} mlflow --serve{where}"


def tell_unused_variable(option: str) -> None:
    """Say on stderr that MLflow's variable is not what decides, if it is set."""
    if os.environ.get(VARIABLE):
        print(f"{VARIABLE} is not used: set {option}", file=sys.stderr)
