"""The fields of the schema, walked: dotted keys, types, limits and meanings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from anyflow.recipe import schema
from anyflow.system.typed import in_words


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """One settable field: ``key`` is dotted (``optimizer.lr``), ``limits`` are choices, low, high, above."""

    key: str
    type: Any
    told: str | Callable[[], str]
    limits: Mapping[str, Any]
    default: Any

    @property
    def help(self) -> str:
        """What it means."""
        return self.told if isinstance(self.told, str) else self.told()

    @property
    def is_open(self) -> bool:
        """Whether any key may stand below this one (the dimensions of a network)."""
        return typing.get_origin(self.type) is dict

    @property
    def wants(self) -> str:
        """What to give, in words: used by error sentences."""
        if "choices" in self.limits:
            return f"one of {', '.join(map(str, self.limits['choices']))}"
        if typing.get_origin(self.type) is list:
            return f"a list such as [{', '.join(map(str, self.default)) or '...'}]"
        return in_words(self.type)


@cache
def all_fields() -> dict[str, FieldInfo]:
    """Every settable field by its dotted key, in the schema's order."""
    return {info.key: info for group, cls in schema.GROUPS.items() for info in walk(cls(), f"{group}.")}


def walk(value: Any, prefix: str = "") -> Iterator[FieldInfo]:
    """The fields of a dataclass and of all dataclasses within; the default of each is what it has here."""
    hints = typing.get_type_hints(type(value))
    for item in dataclasses.fields(value):
        key, found = f"{prefix}{item.name}", getattr(value, item.name)
        if dataclasses.is_dataclass(found):
            yield from walk(found, f"{key}.")
        elif any(map(dataclasses.is_dataclass, typing.get_args(hints[item.name]))):
            parts = found.items() if isinstance(found, dict) else enumerate(found)
            for name, inner in parts:
                yield from walk(inner, f"{key}.{name}." if isinstance(found, dict) else f"{key}[{name}].")
        else:
            limits = {name: limit for name, limit in item.metadata.items() if name != "help"}
            yield FieldInfo(key, hints[item.name], item.metadata["help"], limits, found)


def group_keys() -> set[str]:
    """Dotted keys that hold other keys: ``model``, ``model.lora``, ``stage.codec``, ..."""
    return {key.rsplit(".", depth)[0] for key in all_fields() for depth in range(1, key.count(".") + 1)}


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted key, value)`` of a nested mapping, down to the schema's fields; unknown keys come out as they are."""
    known, groups = all_fields(), group_keys()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known and (key in groups or value):
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def value_of(recipe: schema.Recipe, key: str) -> Any:
    """The value of a dotted key in a recipe."""
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value
