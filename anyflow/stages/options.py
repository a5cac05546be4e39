"""The options of the stages, which are a recipe's groups: what is trained, on which objective, how weights move."""

from __future__ import annotations

from dataclasses import dataclass, field

from anyflow.flowmap.options import ObjectiveOptions, ShareOptions
from anyflow.stages.declaration import Declaration
from anyflow.stages.declarations import STAGES, in_words
from anyflow.system.option import option as _option


@dataclass(frozen=True)
class CodecObjective:
    """The codec stage alone: how the small VAE is trained."""

    crop_frames: int = _option(9, "frames of a training crop (4n+1)", low=1)
    crop_height: int = _option(32, "pixel rows of a training crop (multiple of 8)", low=8)
    crop_width: int = _option(48, "pixel columns of a training crop (multiple of 8)", low=8)
    whole_share: float = _option(0.25, "last share of the steps, whose crops have all frames", low=0, high=1)
    kl_weight: float = _option(3e-5, "weight of the KL term", low=0)
    gradient_weight: float = _option(0.5, "weight of the spatial and temporal gradient loss", low=0)
    motion_weight: float = _option(4.0, "how much more a moving pixel counts, at most", low=1)


WHOLE_WEIGHTS = frozenset({"muon"})
"""Optimisers that need each weight whole on every rank: they cannot move weights spread by fsdp."""


@dataclass(frozen=True)
class OptimizerSettings:
    """How the weights move."""

    name: str = _option("adamw", "adamw, or muon (2-D weights by Muon, the rest by AdamW)", choices=("adamw", "muon"))
    lr: float = _option(5e-5, "learning rate after warm-up", above=0, high=1)
    betas: list[float] = _option([0.9, 0.95], "AdamW's two decay rates", low=0, high=0.999999)
    weight_decay: float = _option(0.0, "decoupled weight decay", low=0)
    warmup_steps: int = _option(0, "steps over which the learning rate grows from 0", low=0)
    schedule: str = _option("constant", "after warm-up: constant, or cosine to 0", choices=("constant", "cosine"))
    clip: float = _option(1.0, "largest norm of the gradient; 0 leaves it alone", low=0)


@dataclass(frozen=True)
class EmaSettings:
    """The moving average of the weights, which is what is sampled and exported."""

    decay: float = _option(0.999, "share of the old average kept each step; 0 keeps no average", low=0, high=0.999999)
    start_step: int = _option(0, "step at which averaging begins; before it the average is the weights", low=0)


@dataclass(frozen=True)
class OnPolicySettings:
    """The on-policy stage, and the baselines: the student is corrected on its own samples, against a teacher."""

    teacher: str = _option(
        "",
        "run or folder of the teacher: a model, or with LoRA an adapter on the same base; empty with LoRA, and for the "
        "baselines: the network that training starts from",
        is_path=True,
    )
    budgets: list[int] = _option(
        [1, 2, 4, 8, 16, 50], "step counts that are simulated; the released list lacks 1 and loses quality there", low=1
    )
    extra_guidance: float = _option(
        3.0, "the teacher's: cond + extra * (cond - uncond), which is a usual guidance scale of 1 + extra", low=0
    )
    forward_weight: float = _option(
        1.0,
        "weight of the forward loss on data in the same step (dmd: of the consistency loss); 0 leaves it out",
        low=0,
    )
    critic_turns: int = _option(1, "updates of the critic for each of the student's", low=1)
    watch: bool = _option(
        True, "warn when the student's samples drift (collapse, still video, burnt colours) and say why"
    )
    critic: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=2e-6, betas=[0.0, 0.999]))

    @property
    def turns(self) -> int:
        """Updates of one step: the student's, then the critic's."""
        return 1 + self.critic_turns


@dataclass(frozen=True)
class TailOptions:
    """The finetune stage alone: a short on-policy correction after it, against a teacher adapted to the domain."""

    steps: int = _option(0, "on-policy steps after fine-tuning (stage.onpolicy says how); 0: no tail", low=0)
    teacher_steps: int = _option(
        300, "flow-matching steps on the domain that make the teacher from the base, before the on-policy steps", low=0
    )
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=2e-6, betas=[0.0, 0.999]))


@dataclass(frozen=True)
class ConditioningOptions:
    """What the network is told, and how often it is not."""

    i2v_prob: float = _option(0.0, "share of the steps that keep the first frame clean (image-to-video)", low=0, high=1)
    text_drop: float = _option(
        0.1, "share of the samples trained on the negative prompt instead of their text", low=0, high=1
    )
    long_context: float = _option(
        0.5, "causal networks: share of the steps that train chunks after compressed context", low=0, high=1
    )
    bidirectional_prob: float = _option(
        0.1, "causal networks: share of the steps with an extra loss on all frames at once", low=0, high=1
    )


@dataclass(frozen=True)
class _Named:
    """What comes first of a stage."""

    name: str = _option(
        "finetune",
        lambda: f"what kind of training this is ({in_words()})",
        choices=STAGES.keys(),  # a live view
    )
    steps: int = _option(200, "optimiser steps", low=1)


@dataclass(frozen=True)
class StageOptions(ConditioningOptions, ShareOptions, ObjectiveOptions, _Named):
    """What is trained, and on which objective."""

    codec: CodecObjective = field(default_factory=CodecObjective)
    onpolicy: OnPolicySettings = field(default_factory=OnPolicySettings)
    tail: TailOptions = field(default_factory=TailOptions)

    @property
    def declared(self) -> Declaration:
        """What the stage says of itself."""
        stage = STAGES[self.name]
        return stage.tail if stage.tail is not None and self.tail.steps else stage
