"""Which frames of their clips cached latents are of: noted only where the clip's own rate does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyflow.data.decode import Choice, ClipShape, DecodeError, usual_choice

CHOSEN = "chosen_frames"
"""Its place in the json of a cached clip."""


def noted_choice(description: Mapping[str, Any], choice: Choice, shape: ClipShape) -> dict[str, list[int]]:
    """What the json of an encoded clip must have besides its description; empty for most clips."""
    if not description.get("controls"):
        return {}
    try:
        usual = usual_choice(description.get("fps"), shape)
    except DecodeError:
        usual = []
    return {} if usual == choice.numbers else {CHOSEN: choice.numbers}


def chosen_of(description: Mapping[str, Any], shape: ClipShape) -> list[int]:
    """The frames, by the json of a cached clip.

    Raises:
        DecodeError: it does not tell.
    """
    if not description.get("controls"):
        return list(range(shape.frames))
    return description.get(CHOSEN) or usual_choice(description.get("fps"), shape)
