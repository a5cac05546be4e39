"""What a stage is built of: networks, and the recipe's groups that belong to it."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow.backbone.codec import Codec
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.roles import Roles
from anyflow.flowmap.intervals import IntervalShares
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.stages.base import Training
from anyflow.stages.batch import Conditioning
from anyflow.stages.options import StageOptions
from anyflow.system.option import part_of


@dataclass(frozen=True)
class StageParts:
    """The arguments of every stage's ``build``, which takes what it needs.

    Attributes:
        options: the recipe's group ``stage``.
        training: how it trains.
        codec, backbone: what encodes clips, and what is trained.
        roles: student, critic and teacher, where the stage has a teacher.
        shift: the model's timestep shift.
        negative_prompt: the model's text that stands for "no text".
        control_drop: share of the samples that are trained without their controls.
        recompute_jumps: keep the activations of one jump of a rollout alone.
    """

    options: StageOptions
    training: Training
    codec: Codec
    backbone: FlowMapBackbone
    roles: Roles | None
    shift: float
    negative_prompt: str
    control_drop: float
    recompute_jumps: bool

    @property
    def taught(self) -> Roles:
        """Student, critic and teacher, of a stage that has them."""
        assert self.roles is not None, "the stage's declaration names no teacher"
        return self.roles

    @property
    def conditioning(self) -> Conditioning:
        """What samples are told."""
        return part_of(Conditioning, self.options, negative_prompt=self.negative_prompt, control_drop=self.control_drop)

    @property
    def objective(self) -> FlowMapObjective:
        """The flow-map objective, with the model's shift."""
        return part_of(FlowMapObjective, self.options, shift=self.shift)

    @property
    def shares(self) -> IntervalShares:
        """How samples are dealt to intervals."""
        return part_of(IntervalShares, self.options)
