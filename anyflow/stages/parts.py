"""What a stage is built of: networks, and the recipe's groups that belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anyflow.backbone.codec import Codec
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.roles import Roles
from anyflow.flowmap.intervals import IntervalShares
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.stages.flow import Conditioning
from anyflow.stages.options import EmaSettings, OptimizerSettings, StageOptions
from anyflow.system.option import part_of


@dataclass(frozen=True)
class StageParts:
    """The arguments of every stage's ``build``, which takes what it needs.

    Attributes:
        options: the recipe's group ``stage``.
        optimizer, ema: how weights move, and their average.
        seed: of every draw.
        passes: batches of one update.
        codec, backbone: what encodes clips, and what is trained.
        roles: student, critic and teacher, where the stage has a teacher.
        shift: the model's timestep shift.
        negative_prompt: the model's text that stands for "no text".
        recompute_jumps: keep the activations of one jump of a rollout alone.
    """

    options: StageOptions
    optimizer: OptimizerSettings
    ema: EmaSettings
    seed: int
    passes: int
    codec: Codec
    backbone: FlowMapBackbone
    roles: Roles | None
    shift: float
    negative_prompt: str
    recompute_jumps: bool

    @property
    def taught(self) -> Roles:
        """Student, critic and teacher, of a stage that has them."""
        assert self.roles is not None, "the stage's declaration names no teacher"
        return self.roles

    @property
    def shared(self) -> dict[str, Any]:
        """What every stage takes."""
        return {
            "optimizer": self.optimizer,
            "ema": self.ema,
            "total_steps": self.options.steps,
            "seed": self.seed,
            "passes": self.passes,
        }

    @property
    def conditioned(self) -> dict[str, Any]:
        """What stages of the flow-map network take."""
        conditioning = part_of(Conditioning, self.options, negative_prompt=self.negative_prompt)
        return {**self.shared, "conditioning": conditioning}

    @property
    def mapped(self) -> dict[str, Any]:
        """What stages with the flow-map objective take."""
        objective = part_of(FlowMapObjective, self.options, shift=self.shift)
        shares = part_of(IntervalShares, self.options)
        return {**self.conditioned, "objective": objective, "shares": shares}
