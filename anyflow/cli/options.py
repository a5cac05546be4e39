"""Options of a command out of the fields of a dataclass, where name, default, meaning and range are written once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from anyflow.cli.common import parse_names, parse_numbers, parse_size
from anyflow.errors import UserError
from anyflow.system.places import find_shipped

Field = dataclasses.Field[Any]


def _numbers(text: str, field: Field) -> tuple[int, ...]:
    low, high = field.metadata.get("low", 0), field.metadata.get("high")
    return parse_numbers(text, _flags(field)[0], low, high, example=_as_text(field.default))


READERS: dict[Any, tuple[Any, Callable[[Any, Field], Any]]] = {
    tuple[int, int] | None: (str | None, lambda text, _: parse_size(text)),
    tuple[str, ...]: (str, lambda text, _: parse_names(text)),
    tuple[int, ...]: (str, _numbers),
}
"""A field's type -> what the command line takes instead, and how it is read."""


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command that takes every field of its dataclass parameters as an option, and is called with the dataclasses.

    The fields are those of :func:`anyflow.system.option.option`; ``flags`` are further names of one.
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
        own, limits = hints[field.name], field.metadata
        hint, _ = READERS.get(own, (own, None))
        is_number = own in (int, float, int | None, float | None)
        reading: dict[str, Any] = {"min": limits.get("low"), "max": limits.get("high")} if is_number else {}
        if limits.get("is_path"):
            reading = {"parser": find_shipped, "metavar": "PATH"}
        option = typer.Option(*_flags(field), help=limits["help"], **reading)
        default = _as_text(field.default) if isinstance(field.default, tuple) else field.default
        default = inspect.Parameter.empty if default is dataclasses.MISSING else default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
        )


def _flags(field: Field) -> tuple[str, ...]:
    return (f"--{field.name.replace('_', '-')}", *field.metadata.get("flags", ()))


def _as_text(default: Any) -> str:
    return ",".join(map(str, default))


def _read(kind: Any, given: dict[str, Any]) -> Any:
    """The dataclass, of its values among those given, which leave them.

    Raises:
        UserError: a value is none of the field's choices, or cannot be read.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        _, read = READERS.get(hints[field.name], (None, None))
        value = given.pop(field.name)
        choices = field.metadata.get("choices")
        if choices and value and value not in choices:
            known = f"one of {', '.join(choices)}" if len(choices) > 2 else " or ".join(choices)
            raise UserError(f"{_flags(field)[0]} {value!r} is not known: give {known}, or leave it out")
        if field.metadata.get("is_path") and isinstance(value, str):
            value = find_shipped(value)
        values[field.name] = read(value, field) if read else value
    return kind(**values)
