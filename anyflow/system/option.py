"""One field of a schema: default, meaning and range, written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any


def option(default: Any, help: str | Callable[[], str], **limits: Any) -> Any:
    """One field: default, meaning, and limits (``choices``; ``low`` and ``high`` inclusive, ``above`` exclusive).

    A meaning that changes with what there is to choose from is a function.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
