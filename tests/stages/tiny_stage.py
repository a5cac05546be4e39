"""Small stages for the tests: one layer, four latents, no Trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from anyflow.backbone.codec import Codec
from anyflow.backbone.load import new_backbone
from anyflow.backbone.roles import SeparateRoles
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.stages.base import Training
from anyflow.stages.batch import Conditioning, FlowBatch
from anyflow.stages.ema import EmaSettings
from anyflow.stages.onpolicy import OnPolicySettings, OnPolicyStage
from anyflow.stages.optimizers import OptimizerSettings

CAPTIONS = ["a red car turns left", "a blue car turns right", "a robot moves", "a hall"]
NETWORK = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
}


def settings(**changes: Any) -> dict[str, Any]:
    """Arguments of a stage; those of its training are named as they are there."""
    plain = {"optimizer": OptimizerSettings("adamw", lr=1e-2), "ema": EmaSettings(0.0), "total_steps": 10, "seed": 0}
    training = {name: changes.pop(name) for name in (*plain, "passes") if name in changes}
    return {"training": Training(**{**plain, **training}), "conditioning": Conditioning(), **changes}


def quiet(stage: Any) -> Any:
    """A stage outside a Trainer: figures go nowhere."""
    stage.report = lambda **metrics: None
    return stage


def batch(size: int = 4) -> dict[str, Any]:
    latents = torch.randn(size, 2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    return {"latents": latents, "caption": CAPTIONS[:size], "key": [str(i) for i in range(size)]}


def stage_of(kind: Any, codec: Codec, **changes: Any) -> Any:
    backbone = new_backbone(NETWORK, 0)
    torch.manual_seed(3)
    torch.nn.init.normal_(backbone.transformer.proj_out.weight, std=0.1)
    return quiet(kind(backbone, codec, **settings(**changes)))


def onpolicy_stage(codec: Codec, kind: Any = OnPolicyStage, trains_teacher: bool = False, **changes: Any) -> Any:
    """A stage over three small networks, with optimisers at hand but without a Trainer."""
    student, teacher = new_backbone(NETWORK, 0), new_backbone(NETWORK, 1)
    torch.manual_seed(3)
    for net in (student, teacher):
        torch.nn.init.normal_(net.transformer.proj_out.weight, std=0.1)
    critic = OptimizerSettings("adamw", lr=1e-3, betas=[0.0, 0.999])
    options = {"settings": OnPolicySettings(), "ema": EmaSettings(0.9), **changes}
    options["settings"] = replace(options["settings"], critic=critic)
    stage = kind(
        SeparateRoles(student, teacher, trains_teacher=trains_teacher),
        codec,
        objective=FlowMapObjective(),
        **{name: value for name, value in settings(**options).items() if value is not None},
    )
    optimizers, schedules = stage.configure_optimizers()
    stage.optimizers = lambda: optimizers
    stage.lr_schedulers = lambda: schedules
    stage.manual_backward = lambda loss, **options: loss.backward(**options)
    return quiet(stage)


def prepared(stage: Any, content: dict[str, Any]) -> FlowBatch:
    """The batch that a stage's losses take."""
    return stage.batches.prepare(content, torch.device("cpu"))


def weights_of(stage: Any, role: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for _, weight in stage.roles.parameters(role)]


def turn(stage: Any, content: dict[str, Any] | None = None) -> None:
    """One pass, as a Trainer goes about it."""
    content = batch() if content is None else content
    stage.on_train_batch_start(content, 0)
    stage.training_step(content, 0)


def moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return not all(map(torch.equal, before, after))
