"""What a stage says of itself: everything that building, checking, planning and recording must know of it.

Whoever works for a stage asks its declaration and compares no names. Nothing heavy is imported here: the
LightningModule is named, and found when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from anyflow.flowmap.samplers import SamplerKind

Turn = Literal["codec", "flow_matching", "flow_map", "consistency", "generator", "critic"] | Callable[[Any], None]
"""What a role's part of a step asks of the networks at its heaviest: a method of
:class:`anyflow.memory.turns.HeaviestStep`, or a function of one."""


Role = Literal["student", "critic", "teacher"]


@dataclass(frozen=True)
class Declaration:
    """A stage.

    Attributes:
        name: In recipes, and the folder of its shipped ones.
        help: One line.
        module: The LightningModule, ``package.module:Class``, or the class itself; its ``build`` makes one.
        turns: Roles that take turns in a step, and the heaviest that each does; empty: there is nothing to plan.
        sampler: How what it trains is sampled: see :data:`anyflow.flowmap.samplers.SAMPLERS`.
        teacher: Whether a second network teaches: one that was trained before, or one that this stage trains.
        has_critic: Whether a critic is trained beside the student.
        trains_codec: Whether it trains the codec, and no network.
        keeps_rollouts: Whether a step keeps the activations of all jumps of a rollout.
        starts_from: The model that it begins with, in words; empty: a new network will do.
        folders: Fields of the recipe that name what else the run stands on.
        checks: Rules between fields, beyond those of every stage: functions of a recipe that raise a UserError.
        tail: What it becomes where ``stage.tail.steps`` asks for an on-policy tail.
    """

    name: str
    help: str
    module: str | type
    turns: dict[Role, Turn]
    sampler: SamplerKind = "flowmap"
    teacher: Literal["none", "given", "trained"] = "none"
    has_critic: bool = False
    trains_codec: bool = False
    keeps_rollouts: bool = False
    starts_from: str = ""
    folders: tuple[str, ...] = ()
    checks: tuple[Callable[[Any], None], ...] = ()
    tail: Declaration | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether a second network teaches."""
        return self.teacher != "none"

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is trained before it teaches."""
        return self.teacher == "trained"

    def load(self) -> Any:
        """The LightningModule."""
        if not isinstance(self.module, str):
            return self.module
        place, _, attribute = self.module.partition(":")
        return getattr(import_module(place), attribute)
