"""Where a training computes, and in which precision: a tiny one through ``anyflow.launch.train``, watched throughout.

Three steps with sampling before, during and after them. Every call of the network, the autoencoder and the text encoder
is seen by a hook of PyTorch's, whoever makes it, and put down to the phase that it falls in.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.doctor.findings import Findings
from anyflow.doctor.here import Here
from anyflow.doctor.items import TINY
from anyflow.recipe import Recipe, load_recipe

PHASES = ("before", "training", "during", "after")
"""Sampling before the first step, the steps, sampling among them, sampling after the last."""

PARTS = {
    "network": "the network's attention",
    "vae": "autoencoder",
    "text": "text encoder",
}

OVERRIDES = (
    *("stage.steps=3", "data.global_batch=2", "data.num_workers=0", "data.precompute=false", "ema.start_step=1"),
    *("sampling.prompts=2", "sampling.steps=[1,2]", "sampling.every_steps=2", "checkpoint.every_steps=100"),
    *("optimizer.warmup_steps=1", "hardware.precision=bf16-mixed", "run.tracking_uri="),
)


def examine(found: Findings, here: Here, folder: Path) -> None:
    """Train, and say what did not run where it should have."""
    if not TINY.is_dir():
        found.leave_out("training", f"{TINY} is not here: run it in a clone of the project")
        return
    from anyflow.launch import train

    recipe = load_recipe("finetune/driving", model="tiny", hardware="local", overrides=[*OVERRIDES])
    with Watch() as watch, redirect_stdout(sys.stderr):
        code = train(recipe, out=folder / "run")
    found.note({"exit_code": code, "precision": recipe.hardware.precision})
    for part in PARTS:
        for phase in PHASES:
            for (device, dtype), calls in watch.calls(part, phase).items():
                found.note({f"{device}.{dtype}": calls}, f"{phase}.{part}")
    judge(found, watch, recipe, here)


def judge(found: Findings, watch: Watch, recipe: Recipe, here: Here) -> None:
    """Every phase has run; the network and the autoencoder where they should; the network in the recipe's precision."""
    for phase in PHASES:
        if not watch.calls("network", phase):
            found.is_wrong(f"nothing was seen of the network {_in_words(phase)}: the run was not what it should be")
    for part, words in PARTS.items():
        for phase in PHASES:
            elsewhere = {device for device, _ in watch.calls(part, phase) if device != watch.name_of(here.device)}
            if here.is_gpu and elsewhere:
                found.is_wrong(
                    f"{words} ran on the {', '.join(sorted(elsewhere))} {_in_words(phase)}: days on large models; "
                    "update anyflow, and leave sampling out there (sampling.prompts=0) until then"
                )
    compute = "bfloat16" if recipe.hardware.precision.startswith("bf16") else "float32"
    for phase in PHASES:
        other = {dtype for _, dtype in watch.calls("network", phase) if dtype != compute}
        if other:
            found.is_wrong(
                f"the network computed in {', '.join(sorted(other))} {_in_words(phase)}, though the recipe says "
                f"{recipe.hardware.precision}: slower and larger than it should be; update anyflow"
            )


def _in_words(phase: str) -> str:
    return "in training" if phase == "training" else f"when sampling {phase} training"


class Watch:
    """Sees every call of the parts within its block, and where and in what they computed."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
        self._place = "before"
        self._queries: set[int] = set()
        self._undo: list[Callable[[], None]] = []

    def calls(self, part: str, phase: str) -> Counter[tuple[str, str]]:
        """``(device, dtype)`` of a part's calls in a phase, and how many."""
        return self._seen.get((part, phase), Counter())

    @staticmethod
    def name_of(device: torch.device) -> str:
        """``cpu`` or ``cuda``."""
        return device.type

    def __enter__(self) -> Watch:
        stays = [register_module_forward_pre_hook(self._comes), register_module_forward_hook(self._went)]
        fitting = patch.object(lightning.Trainer, "fit", self._fit(lightning.Trainer.fit))
        fitting.start()
        self._undo = [fitting.stop, *(handle.remove for handle in stays)]
        return self

    def __exit__(self, *error: Any) -> None:
        for undo in self._undo:
            undo()

    def _fit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def fit(trainer: Any, *arguments: Any, **options: Any) -> Any:
            self._place = "fit"
            try:
                return original(trainer, *arguments, **options)
            finally:
                self._place = "after"

        return fit

    def _comes(self, module: nn.Module, inputs: Any) -> None:
        if isinstance(module, FlowMapBackbone):  # its answer is always float32: what its first attention asks is not
            self._queries.add(id(module.transformer.blocks[0].attn1.to_q))

    def _went(self, module: nn.Module, inputs: Any, output: Any) -> None:
        part = self._part_of(module)
        tensor = next(_tensors(output), None)
        if part is None or tensor is None:
            return
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._seen.setdefault((part, self._phase(part, module)), Counter())[self.name_of(tensor.device), dtype] += 1

    def _part_of(self, module: nn.Module) -> str | None:
        if id(module) in self._queries:
            return "network"
        where, name = type(module).__module__, type(module).__name__
        if name in ("WanEncoder3d", "WanDecoder3d", "WanMidBlock") and "autoencoder_kl_wan" in where:
            return "vae"
        return "text" if name.endswith("EncoderModel") and where.startswith("transformers.") else None

    def _phase(self, part: str, module: nn.Module) -> str:
        """A network in evaluation mode within the training samples; the codec, always in it, encodes for a step too."""
        if self._place != "fit":
            return self._place
        if part == "network":
            self._is_sampling = not module.training
        return "during" if self._is_sampling else "training"

    _is_sampling = False


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        yield from (part for part in output if isinstance(part, Tensor))
    elif hasattr(output, "last_hidden_state"):
        yield output.last_hidden_state
