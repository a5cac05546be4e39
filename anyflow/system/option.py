"""One field of a schema: default, meaning and range, written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str | Callable[[], str], **limits: Any) -> Any:
    """One field: default, meaning, and limits (``choices``; ``low`` and ``high`` inclusive, ``above`` exclusive).

    ``is_path=True``: it is a path, or can be one: ``~`` is the home folder in it.

    A meaning that changes with what there is to choose from is a function.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def part_of(kind: type[T], group: Any, **beside: Any) -> T:
    """What a component takes of a larger group, and what it takes beside."""
    names = {item.name for item in fields(kind)} - beside.keys()  # type: ignore[arg-type]
    return kind(**{name: getattr(group, name) for name in names if hasattr(group, name)}, **beside)
