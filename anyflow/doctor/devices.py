"""Where a training computes, and in which precision: a tiny one through ``training.launch.train``, watched throughout.

Three steps with sampling before, during and after them. Every call of the network, the autoencoder and the text encoder
is seen by a hook of PyTorch's, whoever makes it, and put down to the phase that it falls in.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from anyflow.backbone.codec import Codec, codec_dtypes
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.doctor.findings import Findings
from anyflow.doctor.here import Here
from anyflow.doctor.items import TINY
from anyflow.recipe import Recipe, load_recipe
from anyflow.training.callbacks.sampling import Sampling

PHASES = ("before", "training", "during", "after")
"""Sampling before the first step, the steps, sampling among them, sampling after the last."""

PARTS = {
    "network": "the network",
    "encoder": "the autoencoder's encoder",
    "decoder": "its decoder",
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
    from anyflow.training.launch import train

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
    """Every phase has run; all of it on the device; network and encoder in the recipe's precision."""
    unseen = [phase for phase in PHASES if not watch.calls("network", phase)]
    if unseen:
        found.is_wrong(f"nothing was seen of the network {in_words(unseen)}: the run was not what it should be")
    for part, words in PARTS.items():
        strays = [phase for phase in PHASES if {device for device, _ in watch.calls(part, phase)} - {here.device.type}]
        if strays and here.is_gpu:
            found.is_wrong(
                f"{words} ran on the CPU {in_words(strays)}: days on large models; update anyflow, and leave sampling "
                "out by sampling.prompts=0 until then"
            )
    precision = recipe.hardware.precision
    compute = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    for part, dtype in (("network", compute), ("encoder", codec_dtypes(precision)[0])):
        expected = str(dtype).removeprefix("torch.")
        other = [phase for phase in PHASES if {dtype for _, dtype in watch.calls(part, phase)} - {expected}]
        if other:
            found.is_wrong(
                f"{PARTS[part]} did not compute in {expected} {in_words(other)}, as hardware.precision={precision} "
                "asks: update anyflow, or count on other figures and more memory there"
            )


def in_words(phases: Sequence[str]) -> str:
    """``in training``, ``when sampling before and after training``, or both."""
    *others, last = [phase for phase in phases if phase != "training"] or [""]
    sampling = f"{', '.join(others)} and {last}" if others else last
    words = ["in training"] if "training" in phases else []
    return ", and ".join([*words, *([f"when sampling {sampling} training"] if sampling else [])])


class Watch:
    """Sees every call of the parts within its block, and where and in what they computed."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
        self._phase, self._codec = "before", "decoder"
        self._queries: set[int] = set()
        self._undo: list[Callable[[], None]] = []

    def calls(self, part: str, phase: str) -> Counter[tuple[str, str]]:
        """``(device, dtype)`` of a part's calls in a phase, and how many."""
        return self._seen.get((part, phase), Counter())

    def __enter__(self) -> Watch:
        hooks = [register_module_forward_pre_hook(self._comes), register_module_forward_hook(self._went)]
        within = [
            (lightning.Trainer, "fit", "_phase", "training", "after"),
            (Sampling, "on_train_batch_end", "_phase", "during", "training"),
            (Codec, "encode_video", "_codec", "encoder", "decoder"),
        ]
        patches = [
            patch.object(owner, name, self._marked(getattr(owner, name), *mark)) for owner, name, *mark in within
        ]
        for one in patches:
            one.start()
        self._undo = [*(one.stop for one in patches), *(hook.remove for hook in hooks)]
        return self

    def __exit__(self, *error: Any) -> None:
        for undo in self._undo:
            undo()

    def _marked(self, original: Callable[..., Any], state: str, meanwhile: str, afterwards: str) -> Callable[..., Any]:
        """The function, noting that it is under way."""

        def function(*arguments: Any, **options: Any) -> Any:
            setattr(self, state, meanwhile)
            try:
                return original(*arguments, **options)
            finally:
                setattr(self, state, afterwards)

        return function

    def _comes(self, module: nn.Module, inputs: Any) -> None:
        if isinstance(module, FlowMapBackbone):  # its answer is always float32: what its first attention asks is not
            self._queries.add(id(module.transformer.blocks[0].attn1.to_q))

    def _went(self, module: nn.Module, inputs: Any, output: Any) -> None:
        part = self._part_of(module)
        tensor = next(_tensors(output), None)
        if part is None or tensor is None:
            return
        where = (tensor.device.type, str(tensor.dtype).removeprefix("torch."))
        self._seen.setdefault((part, self._phase), Counter())[where] += 1

    def _part_of(self, module: nn.Module) -> str | None:
        if id(module) in self._queries:
            return "network"
        where, name = type(module).__module__, type(module).__name__
        if name == "WanMidBlock":  # encoder and decoder have one each, which their ways of work share
            return self._codec
        return "text" if name.endswith("EncoderModel") and where.startswith("transformers.") else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        yield from (part for part in output if isinstance(part, Tensor))
    elif hasattr(output, "last_hidden_state"):
        yield output.last_hidden_state
