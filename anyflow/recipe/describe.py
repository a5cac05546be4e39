"""A recipe, described field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anyflow.recipe.fields import all_fields, value_of
from anyflow.recipe.schema import Recipe


@dataclass(frozen=True)
class Row:
    """One field of a recipe: its dotted key, value, meaning, and the layer that set it (``default`` if none did)."""

    key: str
    value: Any
    meaning: str
    source: str


def describe(recipe: Recipe) -> list[Row]:
    """All fields in the schema's order."""
    return [
        Row(key, value_of(recipe, key), info.help, recipe.sources.get(key, "default"))
        for key, info in all_fields().items()
    ]
