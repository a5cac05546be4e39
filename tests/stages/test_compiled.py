"""``hardware.compile``: every stage makes few graphs, all in its first steps, and computes what it computes without.

Blocks are compiled with ``backend="eager"``: the graphs and guards of a GPU's run, without generated code. From step to
step rows, the texts' lengths and which texts are dropped differ; so do layouts and windows of a causal network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_stage import NETWORK, quiet, settings

from anyflow.backbone.codec import Codec
from anyflow.backbone.compiled import compile_blocks, graph_count, pieces
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.embedded import build_text_encoder, build_tokenizer, build_vae
from anyflow.backbone.load import new_backbone
from anyflow.backbone.lora import LoraSettings, add_lora
from anyflow.backbone.parallelize import checkpoint_activations
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.roles import AdapterRoles, Roles, SeparateRoles
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.stages.baselines import ConsistencyStage, DmdStage
from anyflow.stages.batch import Conditioning
from anyflow.stages.finetune import FinetuneTailStage, TailPlan
from anyflow.stages.forward import ForwardStage
from anyflow.stages.onpolicy import OnPolicySettings, OnPolicyStage
from anyflow.stages.optimizers import OptimizerSettings
from anyflow.stages.teacher import TeacherStage

STEPS = 8
LORA = LoraSettings(rank=2, alpha=2)
SENTENCES = (
    "a car",
    "a red car turns left",
    "a blue car turns right and then stops behind the red car",
    "a robot moves",
    "a hall, a robot",
)


@dataclass(frozen=True)
class Case:
    """A stage as it is built here, and how many graphs it may make.

    Attributes:
        kind: the stage.
        graphs: at most, over all steps and sampling afterwards; two functions make a graph each.
        options: of the stage.
        settled: steps after which training makes none.
    """

    kind: Any
    graphs: int
    lora: bool = False
    causal: bool = False
    checkpointed: bool = True
    keep_attention: bool = False
    i2v: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    settled: int = 2


ROLLOUT = OnPolicySettings(budgets=[2, 4], watch=False, critic=OptimizerSettings("adamw", lr=1e-3))
TAIL = {"plan": TailPlan(4, 2, 2, OptimizerSettings("adamw", lr=1e-3))}

CASES = {
    "teacher": Case(TeacherStage, 4),  # with and without gradient
    "forward, full": Case(ForwardStage, 4),
    "forward, LoRA": Case(ForwardStage, 4, lora=True, checkpointed=False),
    "forward, LoRA, first frame": Case(ForwardStage, 8, lora=True, i2v=0.5),  # times a clip, times a frame
    "forward, kept attention": Case(ForwardStage, 4, keep_attention=True),
    "forward, guided tangent": Case(  # and a call of one row
        ForwardStage, 6, lora=True, options={"objective": FlowMapObjective(guided_tangent=True)}, settled=3
    ),
    "on-policy, LoRA": Case(OnPolicyStage, 8, lora=True),  # student, critic; without gradient: an adapter, the base
    "on-policy, LoRA, first frame": Case(OnPolicyStage, 16, lora=True, i2v=0.5, checkpointed=False, settled=5),
    "on-policy, full": Case(OnPolicyStage, 6),
    "tail, LoRA": Case(FinetuneTailStage, 8, lora=True, options=TAIL, settled=3),  # the tail begins with the third
    "tail, full": Case(FinetuneTailStage, 6, options=TAIL, checkpointed=False, settled=3),
    "dmd": Case(DmdStage, 8, lora=True),
    "consistency": Case(ConsistencyStage, 6, lora=True),
    "causal, forward": Case(ForwardStage, 10, causal=True, settled=7),
    "causal, on-policy": Case(OnPolicyStage, 14, causal=True, lora=True),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    pieces.cache_clear()
    yield
    torch._dynamo.reset()


def network(case: Case, seed: int = 0) -> FlowMapBackbone:
    config = {**NETWORK, "num_layers": 2}
    if case.causal:
        config |= {"chunk_partition": [1, 1, 2], "full_chunk_limit": 2}
    backbone = new_backbone(config, seed, "causal" if case.causal else "bidirectional")
    torch.manual_seed(3 + seed)
    torch.nn.init.normal_(backbone.transformer.proj_out.weight, std=0.1)
    if case.checkpointed:
        checkpoint_activations(backbone, case.keep_attention)
    return backbone


def build(case: Case, codec: Codec, compiled: bool) -> Any:
    backbone = network(case)
    options: dict[str, Any] = settings(
        conditioning=Conditioning(text_drop=0.3, i2v_prob=case.i2v, bidirectional_prob=0.5)
    )
    if case.kind is not TeacherStage:
        options |= {"objective": FlowMapObjective()}
    roles: Roles | None = None
    tail = case.kind is FinetuneTailStage
    onpolicy = tail or case.kind in (OnPolicyStage, DmdStage)
    if case.lora:
        add_lora(backbone, LORA)
    if onpolicy or case.kind is ConsistencyStage:
        kind: dict[str, Any] = {"trains_teacher": tail, "has_critic": onpolicy}
        roles = AdapterRoles(backbone, LORA, **kind) if case.lora else SeparateRoles(backbone, network(case, 1), **kind)
    if onpolicy:
        options |= {"settings": ROLLOUT} | ({} if case.kind is DmdStage else {"recompute_jumps": True})
    options |= case.options
    shake(backbone)
    for each in (roles.networks if roles is not None else [backbone]) if compiled else []:
        compile_blocks(each, "eager")
    stage = case.kind(roles or backbone, codec, **options)
    found = stage.configure_optimizers()
    stage.optimizers = lambda: found[0] if onpolicy else [found["optimizer"]]
    stage.lr_schedulers = lambda: found[1] if onpolicy else []
    stage.manual_backward = lambda loss, **options: loss.backward(**options)
    return quiet(stage)


@torch.no_grad()
def shake(backbone: FlowMapBackbone) -> None:
    """Adapters that change something."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in backbone.named_parameters():
        if ".lora_B." in name:
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)


def batch(step: int, frames: int) -> dict[str, Any]:
    latents = torch.randn(4, frames, 16, 8, 8, generator=torch.Generator().manual_seed(step))
    captions = [SENTENCES[(step + row * row) % len(SENTENCES)] for row in range(4)]
    return {"latents": latents, "caption": captions, "key": list("abcd")}


def run(case: Case, stage: Any, steps: int = STEPS) -> list[int]:
    """Train, then sample; returns the graphs that each step made, and sampling."""
    made, frames = [], 4 if case.causal else 2
    while stage.step < steps:
        before = graph_count()
        for _ in range(1 if stage.automatic_optimization else 2):
            stage.update.position += 1
            loss = stage.training_step(batch(stage.update.position, frames), 0)
            if stage.automatic_optimization:
                loss.backward()
                for optimizer in stage.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
                stage.step += 1
        made.append(graph_count() - before)
    before = graph_count()
    conditions = Conditions(stage.codec.encode_text(list(SENTENCES[:3])))
    stage.eval()
    stage.backbone.sample(conditions, torch.randn(3, frames, 16, 8, 8), 2, 5.0)
    return [*made, graph_count() - before]


@pytest.fixture(scope="module")
def codec() -> Codec:
    tokenizer = build_tokenizer(SENTENCES)
    return Codec(build_vae(0), tokenizer, build_text_encoder(len(tokenizer), 0))


def check(case: Case, codec: Codec, capsys: pytest.CaptureFixture[str], steps: int) -> None:
    plain, compiled = build(case, codec, compiled=False), build(case, codec, compiled=True)
    run(case, plain, steps)
    made = run(case, compiled, steps)
    assert 0 < sum(made) <= case.graphs, made
    assert not any(made[case.settled : -1]), made
    assert not capsys.readouterr().err
    weights = dict(
        compiled.named_parameters()
    )  # Adam makes of a rounding up to a step of its own; a wrong role moves .01
    for key, weight in plain.named_parameters():
        torch.testing.assert_close(weights[key], weight, rtol=1e-5, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_onpolicy_distillation_makes_few_graphs(codec: Codec, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a graph per adapter name, row count, text length or block; and a role that speaks for another."""
    check(CASES["on-policy, LoRA"], codec, capsys, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_stage_makes_few_graphs_early_and_computes_the_same(
    name: str, codec: Codec, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the same in every stage, and a graph per layout, window or first frame."""
    check(CASES[name], codec, capsys, steps=STEPS)
