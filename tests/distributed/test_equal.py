"""Ranks with sharded weights compute what one process computes, to rounding: stages, roles, LoRA and full.

Two ranks have clips of their own, or share each clip's tokens; four do both. Copies of the weights share clips too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks

from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.full import stored_name
from anyflow.backbone.lora import merged_state
from anyflow.backbone.parallelize import gather_state, is_sharded_module, leave_ranks
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.recipe import Recipe, load_recipe
from anyflow.tracking.checkpoints import latest_checkpoint
from anyflow.tracking.runs import RunFolder
from anyflow.training.assemble import Parts, assemble
from anyflow.training.callbacks.sharded import read_checkpoint
from anyflow.training.finish import averaged
from anyflow.training.launch import fit

SHORT = (
    "stage.steps=2",
    "data.card=driving",
    "data.frames=5",
    "data.height=32",
    "data.width=32",
    "data.global_batch=4",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.precompute=false",
    "optimizer.name=adamw",
    "optimizer.lr=1e-4",
    "optimizer.warmup_steps=0",
    "stage.onpolicy.critic.lr=1e-4",
    "stage.onpolicy.budgets=[8]",  # at least two jumps
    "ema.decay=0.5",
    "ema.start_step=0",
)
LORA = ("model.lora.enabled=true", "model.lora.rank=4", "model.lora.alpha=4", "stage.onpolicy.teacher=")
TAIL = ("stage.steps=1", "stage.tail.teacher_steps=1", "stage.tail.steps=2", "stage.tail.optimizer.lr=1e-4")
CAUSAL = (
    "model.architecture=causal",
    "data.frames=17",
    "stage.long_context=1.0",
    "stage.bidirectional_prob=1.0",
)
CHECKPOINTED = "hardware.gradient_checkpointing=true"
CONTROLS = ("model.control.names=[actions]", "model.control.dropout=0.3", "model.control.width=16")
ODD = ("data.frames=9", "data.height=48", "data.width=48")  # 27 tokens a clip
QUICK = "on-policy, one base"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "teacher": ("teacher/tiny", ("model.init=weights", "model.codec=", *ODD)),
    "consistency, LoRA": ("consistency/tiny", (*LORA, CHECKPOINTED)),
    # critic and teacher begin alike: all that they teach in two steps is the rounding of their difference
    "dmd, LoRA": ("dmd/tiny", (*LORA, "stage.onpolicy.forward_weight=1")),
    "forward, full": ("forward/tiny", (CHECKPOINTED, "hardware.keep_attention=true")),
    "finetune, LoRA": ("finetune/driving", (*LORA, CHECKPOINTED)),
    "finetune, offloaded": ("finetune/driving", ()),
    "on-policy, one base": ("onpolicy/tiny", (*LORA, CHECKPOINTED)),
    "on-policy, three networks": ("onpolicy/tiny", (CHECKPOINTED,)),
    "tail, full": ("finetune/driving", (*TAIL, CHECKPOINTED)),
    "tail, LoRA": ("finetune/driving", (*TAIL, *LORA)),
    "causal, forward": ("forward/tiny", (*CAUSAL, CHECKPOINTED)),
    "causal, finetune, LoRA": ("finetune/driving", (*CAUSAL, *LORA)),
    "tail, LoRA, controls": ("finetune/driving", (*TAIL, *LORA, *CONTROLS, CHECKPOINTED)),
    "causal, forward, controls": ("forward/tiny", (*CAUSAL, *CONTROLS)),
    "causal, on-policy, one base": ("onpolicy/tiny", (*CAUSAL, *LORA, CHECKPOINTED)),
}
OWN, COPIES = "clips of their own", "hardware.strategy=ddp"
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    OWN: (2, ()),
    "shared clips": (2, ("hardware.context=2",)),
    "both": (4, ("hardware.context=2",)),
    "shared clips, copies": (2, ("hardware.context=2", COPIES)),
}
"""Ranks, and how they stand to clips and weights."""
FEW = ("forward, full", "causal, on-policy, one base")
"""Stages that show what the last two ways could get wrong."""


ROUNDING = 2e-5
"""Of gradients: two passes in place of one, in one process, make up to 1.2e-5 of it, in a tail."""

Models = dict[str, Path]
"""Folders of a small model of either architecture."""


def recipe_of(case: str, models: Models, *more: str) -> Recipe:
    stage, options = CASES[case]
    model = models["causal" if case.startswith("causal") else "bidirectional"]
    weights = (f"model.weights={model}", f"stage.onpolicy.teacher={model}")
    return load_recipe(stage, overrides=[*SHORT, *weights, *options, *more])


def train(recipe: Recipe, folder: Path) -> Parts:
    parts = assemble(recipe)
    folder.mkdir(exist_ok=True, parents=True)
    fit(recipe, RunFolder(folder), parts, None)
    return parts


def _rank(rank: int, way: str, port: int, models: Models, out: Path, cases: Sequence[str]) -> None:
    ranks, more = WAYS[way]
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from anyflow.backbone.parallelize import join_ranks

    join_ranks("cpu")
    for case in cases:
        spread = {
            "hardware.devices": ranks,
            "hardware.strategy": "fsdp",
            "hardware.offload": "offloaded" in case,
            "hardware.recompute_jumps": True,  # one process keeps all graphs of a rollout
        }
        parts = train(recipe_of(case, models, *(f"{key}={value}" for key, value in spread.items()), *more), out / case)
        assert is_sharded_module(parts.backbone) == (COPIES not in more)
        with averaged(parts):
            gathered = gather_state(parts.backbone.transformer) or clone_state(parts.backbone)
        if rank == 0:
            assert gathered is not None
            torch.save(dict(gathered), out / case / "gathered.pt")
    leave_ranks()


def clone_state(backbone: FlowMapBackbone) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.transformer.state_dict().items()}


def on_some_ranks(way: str, models: Models, out: Path, cases: Sequence[str]) -> Path:
    """The cases, one after the other, in the same processes."""
    port = 29500 + os.getpid() % 1000
    on_ranks(_rank, (way, port, models, out, cases), WAYS[way][0])
    return out


@pytest.fixture(scope="module")
def the_others(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def run(way: str) -> Path:
        cases = FEW if way in ("both", "shared clips, copies") else [case for case in CASES if case != QUICK]
        return on_some_ranks(way, models, tmp_path_factory.mktemp("some"), cases)

    return run


def answer(backbone: FlowMapBackbone, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a network says with these weights (its own adapter merged)."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 2, 16, 4, 4, generator=generator)
    text = Text(torch.randn(2, 5, 64, generator=generator), torch.tensor([3, 4]), 8)
    times = torch.tensor([900.0, 300.0])
    plain = merged_state(backbone.transformer, weights=weights)
    named = dict(backbone.transformer.named_parameters())
    with torch.no_grad():
        for name, tensor in named.items():
            if ".lora_B." in name:
                tensor.zero_()
            elif ".lora_" not in name or ".lora_full." in name:
                tensor.copy_(plain[stored_name(name)])
        return backbone(latents, times, times * 0.3, Conditions(text))


def saved(folder: Path) -> dict[str, Any]:
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    return read_checkpoint(path)


def test_three_roles_on_two_ranks_are_those_of_one_process(models: Models, tmp_path: Path) -> None:
    check_equal(QUICK, on_some_ranks(OWN, models, tmp_path / "two", [QUICK]), models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != QUICK])
@pytest.mark.parametrize("way", [OWN, "shared clips"])
def test_two_ranks_are_one_process(
    way: str, case: str, the_others: Callable[[str], Path], models: Models, tmp_path: Path
) -> None:
    check_equal(case, the_others(way), models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("way", ["both", "shared clips, copies"])
def test_four_ranks_and_copies_are_one_process(
    way: str, case: str, the_others: Callable[[str], Path], models: Models, tmp_path: Path
) -> None:
    check_equal(case, the_others(way), models, tmp_path)


def check_equal(case: str, two_ranks: Path, models: Models, tmp_path: Path) -> None:
    """The same optimiser states, and the same answer of the averaged network."""
    parts = train(recipe_of(case, models), tmp_path / "one")
    one, two = saved(tmp_path / "one"), saved(two_ranks / case)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for counter in ("step", "position", "turn"):
        assert one["anyflow"].get(counter) == two["anyflow"].get(counter)
    for single, double in zip(one["optimizer_states"], two["optimizer_states"], strict=True):
        assert single["state"].keys() == double["state"].keys()
        norm = max(float(state["exp_avg"].norm()) for state in single["state"].values())
        for index, state in single["state"].items():  # a mean of gradients, so that Adam's division hides nothing
            difference = float((state["exp_avg"] - double["state"][index]["exp_avg"]).norm())
            assert difference < ROUNDING * norm, index
    with averaged(parts):
        own = clone_state(parts.backbone)
    gathered = torch.load(two_ranks / case / "gathered.pt", weights_only=True)
    first, second = answer(parts.backbone, own), answer(parts.backbone, gathered)
    start = answer(assemble(recipe_of(case, models)).backbone, own)
    assert torch.equal(first, start)
    assert float((first - second).norm()) < 1e-5 * float(first.norm())
