"""What ``hardware.compile`` makes of the stages: graphs, recompilations, breaks, and whether the limit was met.

The graphs are counted with code generation left out (``backend="eager"``): they and their guards are the same, and it
takes seconds. On a GPU with a compiler one block is then compiled in earnest, and timed beside the plain one.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.utils as dynamo

from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.embedded import transformer_config
from anyflow.backbone.load import new_backbone
from anyflow.backbone.parallelize import compile_blocks
from anyflow.doctor.child import FOUND
from anyflow.doctor.findings import Findings, read_findings
from anyflow.doctor.here import Here
from anyflow.doctor.training import run_steps
from anyflow.recipe import load_recipe

LIMIT = "recompile_limit"
"""What PyTorch's warning names when it gives up compiling a function, and runs it as it stands."""

COMMON = (
    *("hardware.compile=true", "data.card=driving", "data.global_batch=4", "data.batch_size=4", "sampling.prompts=0"),
    *("model.lora.enabled=true", "model.lora.rank=4", "optimizer.name=adamw", "checkpoint.every_steps=1000"),
)


@dataclass(frozen=True)
class Case:
    """A stage, as it is compiled: its recipe and what is overridden."""

    name: str
    recipe: str
    more: tuple[str, ...]


CASES = (
    Case("forward_lora", "forward/tiny", ("stage.steps=8",)),
    Case("onpolicy_lora", "onpolicy/tiny", ("stage.steps=4", "stage.onpolicy.teacher=")),
)
LAYERS = 3
"""Of the network whose graphs are counted: equal blocks are to share theirs."""


def examine(found: Findings, here: Here, folder: Path) -> None:
    """Count the graphs of every stage, then compile one block."""
    for case in CASES:
        _count(found, here, case, folder / case.name)
    why = why_not(here)
    if why is not None:
        found.leave_out("a compiled block", why)
        return
    alone = folder / "block"  # in a process of its own: in this one nothing is compiled in earnest any more
    alone.mkdir(parents=True)
    done = subprocess.run([sys.executable, "-m", "anyflow.doctor.child", f"{__name__}:compile_block", str(alone)])
    block = read_findings(alone / FOUND)
    for sentence in block.pop("wrong", []):
        found.is_wrong(f"a compiled block {sentence}")
    if done.returncode < 0:
        found.is_wrong(f"a compiled block crashed by signal {-done.returncode}: leave hardware.compile off")
    found.note(block)


def why_not(here: Here) -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if not here.is_gpu:
        return "it is made for GPUs, and takes the compiler of a CPU a minute"
    if find_spec("triton") is None:
        return "triton is not installed, which a CUDA build of torch brings: hardware.compile has to stay off"
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("gcc") is None:
        return "there is no C compiler (Debian: apt-get install g++): hardware.compile has to stay off"
    return None


@dataclass
class Graphs:
    """What was compiled within a block of :func:`counted`.

    Attributes:
        graphs: compiled, every one a function at certain shapes and settings.
        functions: different ones.
        again: how often one was compiled anew, since a guard did not hold.
        breaks: places at which a function fell apart.
        reasons: guards that did not hold, the first line of each.
        limits: functions that PyTorch gave up on.
    """

    graphs: int = 0
    functions: int = 0
    again: int = 0
    breaks: int = 0
    reasons: tuple[str, ...] = ()
    limits: int = 0


@contextmanager
def counted() -> Iterator[Graphs]:
    """Within the block nothing is generated, and what would be compiled is counted."""
    torch._dynamo.reset()
    dynamo.counters.clear()
    dynamo.clear_compilation_metrics()
    told = _Told()
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(told)
    graphs = Graphs()
    try:
        with patch.object(torch, "compile", _without_code(torch.compile)):
            yield graphs
    finally:
        logger.removeHandler(told)
        entries = [entry for entry in dynamo.get_compilation_metrics() if entry.co_name and not entry.fail_type]
        reasons = [
            entry.recompile_reason.partition("#")[0].partition("\n")[0] for entry in entries if entry.recompile_reason
        ]
        graphs.graphs = dynamo.counters["stats"]["unique_graphs"]
        graphs.functions = len({(entry.co_filename, entry.co_firstlineno) for entry in entries})
        graphs.again = len(reasons)
        graphs.breaks = sum(dynamo.counters["graph_break"].values())
        graphs.reasons = tuple(dict.fromkeys(reason.partition(": ")[2].strip() for reason in reasons))
        graphs.limits = told.limits
        torch._dynamo.reset()


def _without_code(original: Any) -> Any:
    """``torch.compile``, whatever backend it is asked for."""

    def compile_plainly(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "backend": "eager"})

    return compile_plainly


class _Told(logging.Handler):
    """Counts the warnings of functions that are given up."""

    limits = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.limits += LIMIT in record.getMessage().partition("\n")[0]


def _count(found: Findings, here: Here, case: Case, folder: Path) -> None:
    recipe = load_recipe(case.recipe, overrides=[*COMMON, *case.more])
    with counted() as graphs:
        run_steps(recipe, {**transformer_config(), "num_layers": LAYERS}, here, folder)
    figures = {"graphs": graphs.graphs, "functions": graphs.functions, "again": graphs.again, "breaks": graphs.breaks}
    found.note({"steps": recipe.stage.steps, **figures, "limits": graphs.limits}, case.name)
    if graphs.reasons:
        found.note({"guards": list(graphs.reasons[:8])}, case.name)
    if graphs.limits:
        found.is_wrong(
            f"{case.name}: PyTorch met its limit of recompilations after {graphs.graphs} graphs and goes on "
            "uncompiled: hardware.compile=false costs nothing here"
        )
    if not graphs.graphs:
        found.is_wrong(f"{case.name}: nothing was compiled: hardware.compile has no effect here")
    if graphs.breaks:
        found.advise(f"{case.name}: {graphs.breaks} breaks of graphs: compiled steps are slower than they could be")


def compile_block(found: Findings, here: Here, folder: Path) -> None:
    """A network of one block, compiled in earnest: seconds until it runs, and milliseconds beside the plain one."""
    network = new_backbone({**transformer_config(), "num_layers": 1}, 0).to(here.device)
    latents = torch.randn(8, 5, 16, 8, 12, device=here.device)
    times = torch.full((8,), 500.0, device=here.device)
    told = Conditions(Text(torch.randn(8, 24, 64, device=here.device), None, 24))

    def step() -> None:
        network(latents, times, times, told).square().mean().backward()

    plain = here.seconds(step, repeats=5)
    compile_blocks(network)
    began = time.perf_counter()
    step()
    took = here.now() - began
    compiled = here.seconds(step, repeats=5)
    figures: dict[str, Any] = {"compile_seconds": took, "plain_ms": 1000 * plain, "compiled_ms": 1000 * compiled}
    found.note({**figures, "speedup": plain / compiled}, "block")
