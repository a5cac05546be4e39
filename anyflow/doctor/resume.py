"""A tiny run that is killed and resumed, against one that was left alone: are their weights bitwise equal?

The two begin at once. One is killed (SIGKILL) when its first checkpoint is there, and started again with ``--resume
auto``. Where their weights differ, the checkpoints before the kill tell whether two runs that nobody stops differ too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from anyflow.doctor.findings import Findings
from anyflow.doctor.here import Here
from anyflow.doctor.items import TINY
from anyflow.recipe.fields import all_fields
from anyflow.tracking.checkpoints import latest_checkpoint

STEPS, EVERY = 8, 2

OVERRIDES = (
    *(f"stage.steps={STEPS}", f"checkpoint.every_steps={EVERY}", f"checkpoint.keep={STEPS}", "data.global_batch=2"),
    *("data.num_workers=0", "data.precompute=false", "optimizer.warmup_steps=2", "ema.start_step=2"),
    *("sampling.prompts=0", "run.tracking_uri="),
)

EXACT = "run.deterministic"
"""The option that makes runs on a GPU bitwise the same, where there is one."""


def examine(found: Findings, here: Here, folder: Path) -> None:
    """Run both, kill one, resume it, and compare."""
    if not TINY.is_dir():
        found.leave_out("runs", f"{TINY} is not here: run it in a clone of the project")
        return
    more = (f"{EXACT}=true",) if here.is_gpu and EXACT in all_fields() else ()
    found.note({"steps": STEPS, "deterministic": bool(more) or not here.is_gpu})
    whole, cut = folder / "whole", folder / "cut"
    left_alone = _start(whole, folder, *more)
    step = _kill_at_first_checkpoint(cut, folder, *more)
    found.note({"killed_at_step": step})
    failed = [name for name, code in (("whole", left_alone.wait()), ("cut", _start(cut, folder, *more).wait())) if code]
    for name in failed:
        print((folder / f"{name}.log").read_text(errors="replace"), file=sys.stderr)
        found.is_wrong(f"the run {name} failed: its last words are on stderr; try anyflow train finetune/driving")
    if failed:
        return
    figures = {
        "largest_difference_before": difference(whole, cut, step) if step < STEPS else None,
        "largest_difference": difference(whole, cut, STEPS),
    }
    found.note({**figures, "bitwise": figures["largest_difference"] == 0})
    judge(found, here, figures)


def judge(found: Findings, here: Here, figures: dict[str, float | None]) -> None:
    """On a CPU, or with deterministic kernels, nothing may differ; on other GPUs the line says what holds."""
    before, after = figures["largest_difference_before"], figures["largest_difference"]
    if after == 0:
        return
    if before == 0:
        found.is_wrong(
            f"the resumed run's weights are off by {after:.2g}, though both were equal before the kill: do not rely "
            "on resuming here, and report it with this line"
        )
    elif here.is_gpu and not found.figures["deterministic"]:
        found.advise(
            f"two runs differ by {before:.2g} before any kill, and by {after:.2g} at the end: this GPU's kernels add "
            "in another order each time; a resumed run goes on as exactly as a run repeats itself (docs/resume.md)"
        )
    else:
        found.is_wrong(f"two runs of one seed differ by {after:.2g}: see whether other work disturbs this machine")


def _start(out: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """``anyflow train``, going on where there is something to go on with; its output in a file of the folder."""
    command = [sys.executable, "-m", "anyflow", "train", "finetune/driving", "--model", "tiny", "--out", str(out)]
    with open(folder / f"{out.name}.log", "ab") as log:
        return subprocess.Popen(
            [*command, "--hardware", "local", "--resume", "auto", *OVERRIDES, *more],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(os.environ),
        )


def _kill_at_first_checkpoint(out: Path, folder: Path, *more: str) -> int:
    """Start a run and kill it when it has saved itself; returns the step that it goes on from."""
    process = _start(out, folder, *more)
    while latest_checkpoint(out / "checkpoints") is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = latest_checkpoint(out / "checkpoints")
    return int(newest.parent.name.split("_")[1]) if newest is not None else 0


def difference(one: Path, other: Path, step: int) -> float | None:
    """The largest between two runs' states at a step, their averages and optimisers included; None without them."""
    places = [run / "checkpoints" / f"step_{step:08d}" / "state.ckpt" for run in (one, other)]
    if not all(place.exists() for place in places):
        return None
    first, second = (_tensors(torch.load(place, weights_only=True)) for place in places)
    if first.keys() != second.keys():
        return float("inf")
    return max(
        float((first[name].double() - second[name].double()).abs().max()) for name in first if first[name].numel()
    )


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            flat[name] = value.cpu()
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}.{key}", part)
        elif isinstance(value, list):
            for number, part in enumerate(value):
                walk(f"{name}.{number}", part)

    for part in ("state_dict", "optimizer_states"):
        walk(part, state.get(part, {}))
    return flat
