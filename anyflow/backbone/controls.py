"""Controls: what an arm, a wheel or keys do, told to a network latent frame by latent frame.

A latent frame covers several pixel frames (Wan: the first one, then four each). The numbers of all of them, brought
near -1..1 by the range that they have in the training data, go through a small network, and what comes out is added to
the frame's time embedding, before the modulation. Its last layer starts at zero, so a network that is given controls
answers as before until it is trained. A frame whose controls are not known, or were dropped, gets a learned vector in
their place, which starts at zero too.

The description of the controls is stored in the network's configuration, so whoever loads the weights knows what to
give and in which units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyflow.backbone import control_embedding
from anyflow.backbone.control_embedding import (
    CONFIG_KEY,
    LIMIT,
    MODULE,
    PREFIX,
    by_latent_frame,
    ranges_of,
    told_widths,
)
from anyflow.errors import UserError

__all__ = ["CONFIG_KEY", "LIMIT", "MODULE", "PREFIX", "by_latent_frame"]


@dataclass(frozen=True)
class ControlSettings:
    """The controls of a network.

    Attributes:
        controls: name -> description; read here are ``width``, ``kind`` ("continuous", "multi-hot"), ``low`` and
            ``high`` (a range for each number of a continuous one), ``period`` (of numbers that go round).
        width: of the hidden layers.
        pixel_frames: that a latent frame covers, but the first.
    """

    controls: Mapping[str, Mapping[str, Any]]
    width: int = 256
    pixel_frames: int = 4

    @property
    def numbers(self) -> int:
        """Of a pixel frame."""
        return sum(int(facts["width"]) for facts in self.controls.values())

    def to_json(self) -> dict[str, Any]:
        """As a configuration has it."""
        controls = {name: dict(facts) for name, facts in self.controls.items()}
        return {"controls": controls, "width": self.width, "pixel_frames": self.pixel_frames}

    @staticmethod
    def of(config: Mapping[str, Any]) -> ControlSettings | None:
        """Those of a transformer's configuration, if it has any."""
        found = config.get(CONFIG_KEY)
        return None if not found else ControlSettings(found["controls"], found["width"], found["pixel_frames"])

    def checked(self, controls: Tensor) -> Tensor:
        """Controls of pixel frames ``[B, F, W]`` as they are.

        Raises:
            ValueError: they are of another shape.
        """
        if controls.ndim != 3 or controls.shape[2] != self.numbers:
            told = told_widths(self.controls)
            raise ValueError(f"controls are {list(controls.shape)}: give [videos, frames, {self.numbers}]: {told}")
        return controls

    def ranges(self) -> tuple[list[float], list[float]]:
        """Low and high of every number; keys are 0 or 1."""
        return ranges_of(self.controls)


class ControlEmbedder(control_embedding.ControlEmbedder):
    """The module that exports' pipelines have too, made new by settings.

    Args:
        settings: the controls.
        dim: of the embedding.
    """

    def __init__(self, settings: ControlSettings, dim: int) -> None:
        super().__init__(settings.controls, settings.width, settings.pixel_frames, dim)
        self.settings = settings

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Fill new weights."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.unknown)


def add_controls(transformer: Any, settings: ControlSettings) -> ControlEmbedder:
    """Give a transformer the module and the note in its configuration; its weights are left as they come."""
    embedder = transformer.condition_embedder
    module = ControlEmbedder(settings, embedder.time_proj.in_features)
    setattr(embedder, MODULE, module)
    transformer.register_to_config(**{CONFIG_KEY: settings.to_json()})
    return module


def new_weights(settings: ControlSettings, dim: int, seed: int = 0) -> dict[str, Tensor]:
    """The weights that the module starts with, by the transformer's names."""
    with torch.random.fork_rng(devices=[]):
        module = ControlEmbedder(settings, dim)
    module.initialise(torch.Generator().manual_seed(seed))
    return {PREFIX + name: weight for name, weight in module.state_dict().items()}


def controls_of(transformer: Any) -> ControlSettings | None:
    """What a transformer can be told, if anything."""
    return ControlSettings.of(transformer.config)


KEEP = "name the same, or none (model.control.names=[]) to keep them"


def check_controls(
    found: ControlSettings | None, asked: ControlSettings, place: Path | str, remedy: str = KEEP
) -> bool:
    """Whether the controls that are asked for are new to a network.

    Raises:
        UserError: it was trained with others.
    """
    if found is None:
        return True
    (theirs, ours) = (told_widths(settings.controls) for settings in (found, asked))
    if theirs != ours or found.pixel_frames != asked.pixel_frames:
        raise UserError(f"{place} was trained with the controls {theirs}; model.control asks for {ours}: {remedy}")
    return False


def without(controls: Tensor, is_dropped: Tensor) -> Tensor:
    """Controls ``[B, ...]``, those of some samples (``[B]`` bool) made unknown."""
    return controls.masked_fill(is_dropped.to(controls.device).view(-1, *[1] * (controls.ndim - 1)), float("nan"))
