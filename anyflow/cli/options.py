"""Options of a command out of the fields of a dataclass, where name, default, meaning and range are written once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from anyflow.cli.common import parse_names, parse_size

READERS: dict[Any, tuple[Any, Callable[[Any], Any]]] = {
    tuple[int, int] | None: (str | None, parse_size),
    tuple[str, ...]: (str, parse_names),
}
"""A field's type -> what the command line takes instead, and how it is read."""


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command that takes every field of its dataclass parameters as an option, and is called with the dataclasses.

    The fields are those of :func:`anyflow.system.option.option`.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters += _options(groups[parameter.name])
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = _read(kind, given)
        function(**given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _options(kind: Any) -> Iterator[inspect.Parameter]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, _ = READERS.get(hints[field.name], (hints[field.name], None))
        option = typer.Option(
            f"--{field.name.replace('_', '-')}",
            help=field.metadata["help"],
            min=field.metadata.get("low"),
            max=field.metadata.get("high"),
        )
        default = "" if field.default == () else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
        )


def _read(kind: Any, given: dict[str, Any]) -> Any:
    """The dataclass, of its values among those given, which leave them."""
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        _, read = READERS.get(hints[field.name], (None, None))
        value = given.pop(field.name)
        values[field.name] = read(value) if read else value
    return kind(**values)
