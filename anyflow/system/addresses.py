"""Addresses of stores that runs are recorded in: a database's file on this machine, or a server."""

from __future__ import annotations

import re
from pathlib import Path

from anyflow.errors import UserError

DATABASE = "sqlite:///"
"""What the address of a database's file begins with."""

_SERVER = re.compile(r"https?://[^/\s]+\S*")
_HEAD = b"SQLite format 3\0"


def is_server(address: str) -> bool:
    """Whether it is a server's address."""
    return _SERVER.fullmatch(address) is not None


def database_file(address: str) -> Path | None:
    """The file of a database's address; None for any other address."""
    path = address.removeprefix(DATABASE)
    return Path(path).expanduser() if address.startswith(DATABASE) and path.strip() else None


def check_store(address: str, option: str, *, is_there: bool = True) -> str:
    """An address of a store, as MLflow takes it: ``~`` is the home folder.

    Args:
        address: what was given.
        option: what it was given by: ``--uri``, ``run.tracking_uri``.
        is_there: whether a database must be there already.

    Raises:
        UserError: it is no such address, or its file is missing or no database.
    """
    file = database_file(address)
    if file is None:
        if is_server(address):
            return address
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
