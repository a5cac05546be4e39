"""A training step's time and memory, beside what ``anyflow plan`` says of it.

Random networks of the published widths, of as many layers as the plan simulates, take the heaviest step there is (every
sample moves, prompts of full length). Its peak is compared with the plan's for that very network; its seconds are
carried on to the whole depth, in which they are linear.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.flop_counter import FlopCounterMode

from anyflow.doctor.findings import Findings
from anyflow.doctor.here import GIB, Here, is_out_of_memory
from anyflow.doctor.training import run_steps
from anyflow.memory.need import plan, transformer_config_of
from anyflow.memory.phases import CODEC, RESERVE, STEP
from anyflow.memory.simulate import DEPTHS
from anyflow.recipe import Recipe, load_recipe

HEAVIEST = ("stage.diffusion_share=0", "stage.consistency_share=0", "stage.text_drop=0", "optimizer.name=adamw")
"""What the plan takes for granted."""

STEPS = 4
"""The first of which warms up, and has its operations counted."""

FAR = 0.15
"""How far a step may be above its plan: as far as ``tests/test_memory_plan.py`` lets it be."""


@dataclass(frozen=True)
class Case:
    """Fine-tuning of one size.

    Attributes:
        name: for the figures.
        model: the recipe's.
        hardware: the recipe's.
        clips: of one pass.
        depths: layers of the networks that are stepped; the last is compared with the plan.
        more: overrides.
    """

    name: str
    model: str
    hardware: str
    clips: int
    depths: tuple[int, ...]
    more: tuple[str, ...] = ()


GPU_CASES = (
    Case("1.3b", "anyflow-wan2.1-t2v-1.3b", "1gpu", 2, DEPTHS),
    Case("14b", "anyflow-wan2.1-t2v-14b", "1gpu", 1, DEPTHS),
)
CPU_CASES = (Case("tiny", "tiny", "cpu", 2, (2, 4)),)


def examine(found: Findings, here: Here, folder: Path) -> None:
    """Step every size that fits."""
    if here.is_gpu:
        found.note({"matmul_tflops": matmul_tflops(here)})
    else:
        found.leave_out("memory beside the plan", "what a process holds on a CPU is more than its tensors")
        found.leave_out("1.3b, 14b", "a step takes a CPU minutes")
        found.leave_out("operations", "PyTorch does not count those of a CPU's attention")
    for case in GPU_CASES if here.is_gpu else CPU_CASES:
        _case(found, here, case, folder / case.name)
        here.tidy()


def _case(found: Findings, here: Here, case: Case, folder: Path) -> None:
    config = transformer_config_of(_recipe(case))
    seconds: dict[int, float] = {}
    operations = 0.0
    for layers in case.depths:
        shallow = {**config, "num_layers": layers}
        recipe = _recipe(case, shallow, folder / f"network-{layers}")
        planned = planned_gib(recipe) if here.is_gpu else None
        if planned is not None and planned > (free := here.free_gib()):
            found.leave_out(f"{case.name}, {layers} layers", f"needs {planned:.1f} GiB, and {free:.1f} are free")
            return
        measured = Measure(here, STEPS)
        try:
            run_steps(recipe, shallow, here, folder / f"run-{layers}", measured, long_prompts=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found.is_wrong(
                f"{case.name}: memory ran out in a step of {layers} layers"
                + (f", for which anyflow plan says {planned:.1f} GiB: trust its figures less here" if planned else "")
            )
            return
        seconds[layers], operations = measured.seconds, measured.operations
        found.note({"seconds": measured.seconds}, f"{case.name}.{layers}_layers")
        if planned is not None:
            _compare(found, case, layers, planned, measured)
    _whole_depth(found, here, case, seconds, config["num_layers"], operations)


def _compare(found: Findings, case: Case, layers: int, planned: float, measured: Measure) -> None:
    figures = {"peak_gib": measured.peak_gib, "planned_gib": planned, "reserved_gib": measured.reserved_gib}
    found.note({**figures, "of_plan": measured.peak_gib / planned}, f"{case.name}.{layers}_layers")
    if measured.peak_gib > (1 + FAR) * planned:
        found.is_wrong(
            f"{case.name}: a step of {layers} layers takes {measured.peak_gib:.1f} GiB, and anyflow plan says "
            f"{planned:.1f}: count on {measured.peak_gib / planned:.2f} times its figures on this machine"
        )


def _whole_depth(
    found: Findings, here: Here, case: Case, seconds: dict[int, float], depth: int, operations: float
) -> None:
    """Seconds of the whole network, from two depths; and how much of the device is used at the deeper of the two."""
    low, high = case.depths[0], case.depths[-1]
    grown = seconds[low] + (seconds[high] - seconds[low]) * (depth - low) / (high - low)
    figures = {"layers": depth, "clips": case.clips, "seconds_a_pass": grown, "seconds_a_clip": grown / case.clips}
    found.note(figures, case.name)
    if here.is_gpu:
        rate = operations / seconds[high] / 1e12
        found.note({"tflops": rate, "of_matmul": rate / found.figures["matmul_tflops"]}, case.name)


def _recipe(case: Case, config: dict[str, Any] | None = None, folder: Path | None = None) -> Recipe:
    """The shipped fine-tuning at its heaviest, a pass a step; with a network of another depth, known by its folder."""
    given = [*HEAVIEST, f"stage.steps={STEPS}", f"data.global_batch={case.clips}", f"data.batch_size={case.clips}"]
    given += ["sampling.prompts=0", "checkpoint.every_steps=1000", *case.more]
    if config is not None and folder is not None:
        (folder / "transformer").mkdir(parents=True, exist_ok=True)
        (folder / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        given.append(f"model.weights={folder}")
    return load_recipe("finetune/driving", model=case.model, hardware=case.hardware, overrides=given)


def planned_gib(recipe: Recipe) -> float:
    """What ``anyflow plan`` says of the training step itself: neither the codec nor what PyTorch does not count."""
    need = plan(recipe, remedies=False)
    of_step = need.phases[STEP]
    return sum(size for name, size in of_step.items() if name not in (CODEC, RESERVE)) / GIB


class Measure(Callback):
    """Seconds and peak of the steps after the first, operations of the first.

    Attributes:
        operations: floating point, a product and a sum counted as two.
        peak_gib: the most that was allocated; 0 on a CPU.
        reserved_gib: the most that PyTorch had taken for it.
    """

    def __init__(self, here: Here, steps: int) -> None:
        self._here, self._steps = here, steps
        self._times: list[float] = []
        self._began = 0.0
        self._counter: Any = None
        self.operations = self.peak_gib = self.reserved_gib = 0.0

    @property
    def seconds(self) -> float:
        """Of one step, the median."""
        return median(self._times)

    def on_train_batch_start(self, trainer: Any, stage: Any, batch: Any, index: int) -> None:
        """Count the first, time the others."""
        if index == 0:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        self._began = self._here.now()

    def on_train_batch_end(self, trainer: Any, stage: Any, outputs: Any, batch: Any, index: int) -> None:
        """Note what it took."""
        took = self._here.now() - self._began
        if index == 0:
            self._counter.__exit__(None, None, None)
            self.operations = float(self._counter.get_total_flops())
            if self._here.is_gpu:
                torch.cuda.reset_peak_memory_stats()
            return
        self._times.append(took)
        if self._here.is_gpu:
            self.peak_gib = torch.cuda.max_memory_allocated() / GIB
            self.reserved_gib = torch.cuda.max_memory_reserved() / GIB


def matmul_tflops(here: Here, side: int = 8192) -> float:
    """What a product of large bfloat16 matrices reaches: the measure of how much of the device a step uses."""
    first, second = (torch.randn(side, side, device=here.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / here.seconds(lambda: first @ second, repeats=5) / 1e12
