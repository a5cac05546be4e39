"""The fields of the schema, walked: dotted keys, types, limits and meanings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from anyflow.recipe import schema


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
            return f"one of {', '.join(self.limits['choices'])}"
        nouns = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        element = typing.get_args(self.type)[0] if typing.get_origin(self.type) is list else None
        if element is not None:
            return f"a list such as [{', '.join(str(v) for v in self.default) or '...'}]"
        return nouns.get(self.type, "a mapping of keys to values")


@cache
def all_fields() -> dict[str, FieldInfo]:
    """Every settable field by its dotted key, in the schema's order."""
    return {info.key: info for group, cls in schema.GROUPS.items() for info in _walk(group, cls())}


def _walk(prefix: str, default: Any) -> Iterator[FieldInfo]:
    """The fields of a group, whose defaults are those of ``default``: a group used twice may differ in them."""
    hints = typing.get_type_hints(type(default))
    for item in dataclasses.fields(default):
        key, value = f"{prefix}.{item.name}", getattr(default, item.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(key, value)
            continue
        limits = {name: limit for name, limit in item.metadata.items() if name != "help"}
        yield FieldInfo(key, hints[item.name], item.metadata["help"], limits, value)


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
