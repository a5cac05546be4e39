"""Whole runs on the pretended GPU: what happens in each phase of ``launch.train``, and who does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
from diffusers import AutoencoderKLWan
from findings import Findings
from gpu import Gpu, pretended
from torch import nn
from transformers import PreTrainedModel

from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.stages.base import Stage
from anyflow.training.callbacks.checkpoints import Checkpoints
from anyflow.training.callbacks.sampling import Sampling

BEFORE, START, STEP, SAMPLING, SAVING, END, AFTER = "before", "start", "step", "sampling", "saving", "end", "after"


def _who(module: nn.Module) -> str | None:
    if isinstance(module, FlowMapBackbone):
        return "network"
    if type(module).__module__ == AutoencoderKLWan.__module__:  # its layers are called one by one, see wan_vae.py
        return "vae"
    return "text encoder" if isinstance(module, PreTrainedModel) else None


def _within(findings: Findings, set_to: Callable[[Any], str], after: Callable[[], str]) -> Callable[[Any], Any]:
    """A wrapper of a method: within it there is another phase."""

    def wrap(method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            findings.phase = set_to(self)
            try:
                return method(self, *args, **kwargs)
            finally:
                findings.phase = after()

        return call

    return wrap


def _patches(findings: Findings) -> Iterator[Any]:
    batches = 0

    def step(*_: Any) -> str:
        return f"{STEP} {batches}"

    def next_batch(method: Any) -> Any:
        def call(self: Any, *args: Any) -> Any:
            nonlocal batches
            batches += 1
            findings.phase = step()
            return method(self, *args)

        return call

    def by(name: str) -> Callable[[Any], Any]:
        def wrap(method: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                findings.who.append(name)
                try:
                    return method(*args, **kwargs)
                finally:
                    findings.who.pop()

            return call

        return wrap

    def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Any:
        return patch.object(owner, name, wrap(getattr(owner, name)))

    original = nn.Module.__call__

    def module_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = _who(self)
        return by(name)(original)(self, *args, **kwargs) if name else original(self, *args, **kwargs)

    yield patch.object(nn.Module, "__call__", module_call)
    yield replaced(lightning.Trainer, "fit", _within(findings, lambda _: START, lambda: AFTER))
    yield replaced(Stage, "on_train_batch_start", next_batch)
    yield replaced(Sampling, "on_train_batch_end", _within(findings, lambda _: SAMPLING, step))
    yield replaced(Checkpoints, "save", _within(findings, lambda _: SAVING, step))
    yield replaced(Stage, "on_train_end", _within(findings, lambda _: END, lambda: END))


@contextmanager
def watched() -> Iterator[Gpu]:
    """A pretended GPU whose findings know the phases of a run: ``before``, ``start``, ``step n``,
    ``sampling``, ``end``, ``after``."""
    with pretended() as gpu, ExitStack() as stack:
        gpu.findings.phase = BEFORE
        for one in _patches(gpu.findings):
            stack.enter_context(one)
        yield gpu


def phase_of(name: str) -> str:
    """``step`` for any step."""
    return name.split()[0]


def devices(findings: Findings) -> dict[tuple[str, str], set[str]]:
    """The devices that each one works on in each phase."""
    found: dict[tuple[str, str], set[str]] = {}
    for phase, who, device, _ in findings.work:
        found.setdefault((phase_of(phase), who), set()).add(device)
    return found


def precisions(findings: Findings) -> dict[tuple[str, str], str]:
    """The precision of the bulk of each one's work in each phase."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for (phase, who, _, dtype), products in findings.work.items():
        found.setdefault((phase_of(phase), who), Counter())[dtype] += products
    return {key: counts.most_common(1)[0][0] for key, counts in found.items()}


def waits(findings: Findings) -> Counter[str]:
    """How often each function (``stages/base.py clip_norm``) waits for the device in a step; the worst of all steps."""
    worst: Counter[str] = Counter()
    for phase, syncs in findings.syncs.items():
        if phase_of(phase) == STEP:
            here: Counter[str] = Counter()
            for place, count in syncs.items():
                file, function = place.split(":")[0], place.split()[1]
                here[f"{file} {function.rstrip(':')}"] += count
            worst |= here
    return worst


def train_on_gpu(recipe: Any, out: Path) -> Findings:
    """``launch.train`` with a pretended GPU; what was found."""
    from anyflow.training.launch import train

    with watched() as gpu:
        assert train(recipe, out=out) == 0
    return gpu.findings
