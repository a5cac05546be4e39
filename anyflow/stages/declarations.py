"""The stages, each declared once. Another stage is a LightningModule and a declaration here."""

from __future__ import annotations

from dataclasses import replace

from anyflow.stages.checks import (
    budgets_are_given,
    codec_begins_anew,
    crops_fit,
    tail_has_a_teacher,
    teacher_is_named,
)
from anyflow.stages.declaration import Declaration

TEACHER_FOLDER = "stage.onpolicy.teacher"

CODEC = Declaration(
    name="codec",
    help="a small autoencoder, from nothing",
    module="anyflow.stages.codec:CodecStage",
    turns={},
    trains_codec=True,
    checks=(codec_begins_anew, crops_fit),
)

TEACHER = Declaration(
    name="teacher",
    help="plain flow matching",
    module="anyflow.stages.teacher:TeacherStage",
    turns={"student": "flow_matching"},
    sampler="euler",
)

FORWARD = Declaration(
    name="forward",
    help="flow maps from data, which make a model any-step",
    module="anyflow.stages.forward:ForwardStage",
    turns={"student": "flow_map"},
)

FINETUNE = Declaration(
    name="finetune",
    help="an any-step model on clips of a domain, with an on-policy tail or without",
    module="anyflow.stages.forward:ForwardStage",
    turns={"student": "flow_map"},
    starts_from="an any-step model",
)

ONPOLICY = Declaration(
    name="onpolicy",
    help="the student corrected on its own samples, against a teacher",
    module="anyflow.stages.onpolicy:OnPolicyStage",
    turns={"student": "generator", "critic": "critic"},
    teacher="given",
    has_critic=True,
    keeps_rollouts=True,
    starts_from="a trained model",
    folders=(TEACHER_FOLDER,),
    checks=(budgets_are_given, teacher_is_named),
)

CONSISTENCY = Declaration(
    name="consistency",
    help="a baseline: consistency distillation, sampled by re-noising",
    module="anyflow.stages.baselines:ConsistencyStage",
    turns={"student": "consistency"},
    sampler="renoise",
    teacher="given",
    starts_from="a trained model",
    folders=(TEACHER_FOLDER,),
)

DMD = replace(
    ONPOLICY,
    name="dmd",
    help="a baseline: distribution matching, sampled by re-noising",
    module="anyflow.stages.baselines:DmdStage",
    sampler="renoise",
    keeps_rollouts=False,
    checks=(budgets_are_given,),
)

FINETUNE_WITH_TAIL = replace(
    ONPOLICY,
    name=FINETUNE.name,
    help="an any-step model on clips of a domain, then corrected on its own samples",
    module="anyflow.stages.finetune:FinetuneTailStage",
    teacher="trained",
    starts_from=FINETUNE.starts_from,
    folders=(),
    checks=(tail_has_a_teacher, budgets_are_given),
)

STAGES: dict[str, Declaration] = {
    stage.name: stage
    for stage in (CODEC, TEACHER, FORWARD, replace(FINETUNE, tail=FINETUNE_WITH_TAIL), ONPOLICY, CONSISTENCY, DMD)
}
"""Every stage by its name, in the order that they are shown."""


def in_words() -> str:
    """What each stage is."""
    return "; ".join(f"{stage.name}: {stage.help}" for stage in STAGES.values())
