"""Two ranks as the multi-GPU recipes train: a frozen base in bfloat16, adapters in float32, arithmetic in bfloat16.

Every stage runs whole (``launch.train``) under the shipped 8-GPU hardware file, cut down to two ranks on the CPU. It
fails where a base weight moves or is kept in another precision, where an adapter or an optimiser's state is rounded to
bfloat16 or does not move, where blocks compute in float32 (or times in bfloat16), and where a resumed run is another.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from forked import on_ranks
from torch import Tensor

from anyflow.backbone.bidirectional import FLOAT32_PARTS
from anyflow.backbone.load import load_backbone
from anyflow.backbone.parallelize import is_sharded_module, join_ranks, leave_ranks, whole
from anyflow.recipe import Recipe, load_recipe
from anyflow.stages.base import Stage
from anyflow.tracking.checkpoints import latest_checkpoint
from anyflow.tracking.runs import RunFolder
from anyflow.training import launch
from anyflow.training.assemble import Parts, assemble
from anyflow.training.callbacks.sharded import read_checkpoint

STEPS, STEPS_OF_TAIL = 3, 6  # a new adapter's first factor moves at the second step
SHORT = (
    "hardware.accelerator=cpu",
    "hardware.devices=2",
    f"stage.steps={STEPS}",
    "data.card=driving",
    "data.frames=5",
    "data.height=32",
    "data.width=32",
    "data.global_batch=4",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.precompute=false",
    "hardware.compile=false",  # layers of a compiled block are not called
    "optimizer.name=adamw",
    "optimizer.lr=1e-3",
    "optimizer.warmup_steps=0",
    "optimizer.schedule=constant",
    "stage.onpolicy.critic.lr=1e-3",
    "stage.onpolicy.critic.warmup_steps=0",
    "stage.onpolicy.budgets=[8]",
    "ema.decay=0.5",
    "ema.start_step=0",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    "sampling.prompts=0",
    "run.tracking_uri=",
)
LORA = ("model.lora.enabled=true", "model.lora.rank=4", "model.lora.alpha=4", "stage.onpolicy.teacher=")
TAIL = ("stage.steps=2", "stage.tail.teacher_steps=2", "stage.tail.steps=2", "stage.tail.optimizer.lr=1e-3")
CAUSAL = ("model.architecture=causal", "data.frames=17", "stage.long_context=1.0", "stage.bidirectional_prob=1.0")

QUICK = ("finetune", "quantised, on-policy")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "finetune": ("finetune/driving", LORA),
    "teacher": ("teacher/tiny", (*LORA, "model.init=weights", "model.codec=")),
    "forward": ("forward/tiny", LORA),
    "tail": ("finetune/driving", (*LORA, *TAIL)),
    "on-policy": ("onpolicy/tiny", (*LORA, "hardware.recompute_jumps=true")),
    "on-policy, first frame given": ("onpolicy/tiny", (*LORA, "stage.i2v_prob=1.0")),
    "consistency": ("consistency/tiny", LORA),
    "dmd": ("dmd/tiny", LORA),
    "forward, accumulated": ("forward/tiny", (*LORA, "data.batch_size=1", "hardware.accumulate=2")),
    "forward, offloaded": ("forward/tiny", (*LORA, "hardware.offload=true")),
    "forward, clips shared": ("forward/tiny", (*LORA, "hardware.context=2")),
    "causal, on-policy, clips shared": (
        "onpolicy/tiny",
        (*LORA, *CAUSAL, "hardware.context=2", "hardware.recompute_jumps=true"),
    ),
    "causal, forward": ("forward/tiny-causal", (*LORA, *CAUSAL)),
    "causal, on-policy": ("onpolicy/tiny", (*LORA, *CAUSAL)),
    "quantised, on-policy": ("onpolicy/tiny", (*LORA, "model.lora.base=nf4", "hardware.recompute_jumps=true")),
    "full, forward": ("forward/tiny", ()),
    "full, on-policy": ("onpolicy/tiny", ()),
}
Models = dict[str, Path]


def recipe_of(case: str, models: Models) -> Recipe:
    """The recipe of a case under the 8-GPU hardware file."""
    stage, options = CASES[case]
    model = models["causal" if case.startswith("causal") else "bidirectional"]
    weights = (f"model.weights={model}", f"stage.onpolicy.teacher={model}")
    return load_recipe(stage, hardware="8gpu", overrides=[*SHORT, *weights, *options])


def is_base(name: str) -> bool:
    """Whether a weight is the frozen base's, of the kind that is kept in bfloat16."""
    return not any(part in name for part in FLOAT32_PARTS)


class Watched:
    """What a run does with the precision of its weights, seen on one rank."""

    def __init__(self, parts: Parts) -> None:
        roles = getattr(parts.stage, "roles", None)
        self.networks = roles.networks if roles is not None else [parts.backbone]
        self.sharded = [is_sharded_module(network) for network in self.networks]
        self.before = [dict(self._weights(network)) for network in self.networks]
        self.computed: dict[str, set[torch.dtype]] = {"blocks": set(), "times": set()}
        for network in self.networks:
            transformer = network.transformer
            for block in transformer.blocks:
                for layer in (block.attn1.to_q, block.ffn.net[2]):
                    layer.register_forward_hook(self._sees("blocks"))
            transformer.condition_embedder.time_embedder.register_forward_hook(self._sees("times"))

    def _sees(self, where: str) -> Any:
        return lambda module, args, result: self.computed[where].add(result.dtype)

    @staticmethod
    def _weights(network: Any) -> Iterator[tuple[str, tuple[bool, Tensor]]]:
        for name, weight in network.named_parameters():
            yield name, (weight.requires_grad, whole(weight.detach()).clone())

    def facts(self) -> dict[str, Any]:
        """What the run did, in plain values."""
        frozen, trained, moved, touched = set(), set(), [], []
        for network, before in zip(self.networks, self.before, strict=True):
            for name, (is_trained, now) in self._weights(network):
                was = before[name][1]
                (trained if is_trained else frozen).add((str(now.dtype), is_base(name)))
                if not torch.equal(was, now):
                    (moved if is_trained else touched).append(name)
        return {
            "sharded": self.sharded,
            "frozen": sorted(frozen),
            "trained": sorted(trained),
            "moved": len(moved),
            "of trained": sum(is_trained for before in self.before for is_trained, _ in before.values()),
            "touched": touched,
            "computed": {where: sorted(map(str, dtypes)) for where, dtypes in self.computed.items()},
        }


@contextmanager
def watching() -> Iterator[dict[str, Any]]:
    """Within the block a run's parts and figures are seen; yields what of."""
    seen: dict[str, Any] = {"losses": []}
    report = Stage.report

    def assembled(recipe: Recipe) -> Parts:
        parts = assemble(recipe)
        seen["watched"] = Watched(parts)
        return parts

    def reported(self: Stage, **figures: Any) -> None:
        seen["losses"] += [float(whole(torch.as_tensor(value)).detach()) for value in figures.values()]
        report(self, **figures)

    with patch.object(launch, "assemble", assembled), patch.object(Stage, "report", reported):
        yield seen


def _rank(rank: int, port: int, models: Models, out: Path, cases: Sequence[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_ranks("cpu")
    with patch.object(launch, "leave_ranks", lambda: None):  # the next case needs them
        for case in cases:
            recipe = recipe_of(case, models)
            with watching() as seen:
                assert launch.train(recipe, out=out / case) == 0
            facts = {**seen["watched"].facts(), "finite": all(map(math.isfinite, seen["losses"]))}
            (out / f"{case}.{rank}.json").write_text(json.dumps(facts))
            if rank == 0:
                _cut(out / case, out / f"{case}, resumed", recipe.total_steps - 2)
            torch.distributed.barrier()
            assert launch.train(recipe, resume=str(out / f"{case}, resumed")) == 0
    leave_ranks()


def _cut(whole_run: Path, cut: Path, step: int) -> None:
    """The run as it was after a step."""
    newest = whole_run / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(newest, cut / "checkpoints" / newest.name)
    shutil.copy(whole_run / "recipe.yaml", cut)
    shutil.copy(whole_run / "status.json", cut)
    (cut / "checkpoints" / "latest").write_text(newest.name)
    RunFolder(cut).note(state="preempted")


def on_two_ranks(models: Models, out: Path, cases: Sequence[str]) -> Path:
    """The cases, one after the other, in the same two processes."""
    port = 31500 + os.getpid() % 1000
    on_ranks(_rank, (port, models, out, cases))
    return out


@pytest.fixture(scope="module")
def the_others(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_two_ranks(models, tmp_path_factory.mktemp("two"), [case for case in CASES if case not in QUICK])


@pytest.mark.parametrize("case", QUICK)
def test_a_frozen_base_in_bfloat16_under_adapters_in_float32(case: str, models: Models, tmp_path: Path) -> None:
    check(case, on_two_ranks(models, tmp_path, [case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_every_stage_has_a_frozen_base_in_bfloat16(case: str, the_others: Path) -> None:
    check(case, the_others)


def check(case: str, out: Path) -> None:
    """A case's weights on both ranks, its checkpoint, its resumption and its export."""
    bfloat16, float32 = "torch.bfloat16", "torch.float32"
    is_full, is_quantised = case.startswith("full"), case.startswith("quantised")
    for rank in range(2):
        facts = json.loads((out / f"{case}.{rank}.json").read_text())
        assert facts["finite"] and not facts["touched"]
        assert {dtype for dtype, _ in facts["trained"]} == {float32}
        assert all(facts["sharded"]) is not is_quantised
        if is_quantised:  # copies, by ddp: codes of the large layers, the rest as it is on one card
            assert {tuple(kind) for kind in facts["frozen"]} == {
                ("torch.uint8", True),
                *product([float32], [True, False]),
            }
        elif not is_full:
            assert {tuple(kind) for kind in facts["frozen"]} == {(bfloat16, True), (float32, False)}
        assert facts["computed"] == {"blocks": [bfloat16], "times": [float32]}
        assert facts["moved"] > 0.9 * facts["of trained"], "a few have no gradient: text of zeros, the last block's"
    saved, resumed = (_saved(out / name) for name in (case, f"{case}, resumed"))
    steps = STEPS_OF_TAIL if case == "tail" else STEPS
    assert saved["anyflow"]["step"] == resumed["anyflow"]["step"] == steps
    tensors, again = dict(_tensors(saved)), dict(_tensors(resumed))
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    assert any(name.startswith("optimizer") for name in tensors)
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, again[name])]
    assert tensors.keys() == again.keys()
    assert load_backbone(out / case / "model").dtype == torch.float32  # exported, and loaded in full precision


def _saved(run: Path) -> dict[str, Any]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return read_checkpoint(path)


def _tensors(saved: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All weights, averages and optimisers' states of a checkpoint."""
    yield from saved["state_dict"].items()
    for number, optimizer in enumerate(saved["optimizer_states"]):
        for index, state in optimizer["state"].items():
            yield from ((f"optimizer {number} {index} {name}", value) for name, value in state.items())
