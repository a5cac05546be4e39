"""A step of several passes is not lost between them: it is done again, bitwise, or in another number of passes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from shell import run
from test_resume import training

from anyflow.errors import EXIT_PREEMPTED
from anyflow.tracking.checkpoints import latest_checkpoint

STOPPED_IN_A_PASS = """
import os, signal
from anyflow.cli.main import main
from anyflow.stages.base import Stage

begin, begun = Stage.begin_pass, []

def stop_once(self, place=None):
    begin(self, place)
    begun.append(place)
    if len(begun) == {passes}:
        os.kill(os.getpid(), {number})

Stage.begin_pass = stop_once
main()
"""
"""The command line, stopped by itself while it works on a pass."""

ACCUMULATED = (
    "data.global_batch=4",
    "data.batch_size=1",
    "data.frames=5",
    "data.height=32",
    "data.width=32",
    "stage.steps=3",
    "checkpoint.every_steps=1",
    "ema.start_step=0",
)
"""Three steps of four passes, of small clips."""
LORA = ("model.lora.enabled=true", "model.lora.rank=4")
SPLIT: dict[str, tuple[str, ...]] = {
    "finetune/driving": (),
    "finetune/driving, tail": (*LORA, "stage.steps=1", "stage.tail.teacher_steps=1", "stage.tail.steps=1"),
    "teacher/tiny": ("model.init=weights", "model.codec=", "data.card=driving"),
    "onpolicy/tiny": (*LORA, "stage.onpolicy.teacher=", "data.card=driving", "stage.steps=2"),
    "dmd/tiny": (*LORA, "data.card=driving", "stage.steps=2", "stage.onpolicy.budgets=[2]"),
    "consistency/tiny": (*LORA, "data.card=driving"),
    "codec/tiny": (
        "data.card=driving",
        "data.frames=9",
        "stage.codec.crop_frames=5",
        "stage.codec.crop_height=16",
        "stage.codec.crop_width=16",
        "model.init=new",
        "model.weights=",
    ),
}


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("finetune/driving", 6),
        *(pytest.param(name, passes, marks=pytest.mark.slow) for name in SPLIT for passes in (3, 5, 8)),
    ],
)
def test_a_run_stopped_between_the_passes_of_a_step_goes_on_bitwise(
    name: str, passes: int, small_model: Path, tmp_path: Path
) -> None:
    """Half a step's gradients are not saved: what they came from is done again, and no good checkpoint is touched."""
    whole, out = tmp_path / "whole", tmp_path / "cut"

    def words(folder: Path, *more: str) -> list[str]:
        _, _, *options = training(small_model, folder, *ACCUMULATED, *SPLIT[name], *more)
        return ["train", name.partition(",")[0], *options]

    finished = run(*words(whole))
    assert finished.returncode == 0, finished.stderr
    script = STOPPED_IN_A_PASS.format(passes=passes, number=int(signal.SIGTERM))
    stopped = run(*words(out), program=script)
    assert stopped.returncode == EXIT_PREEMPTED, stopped.stderr
    before = {path: path.stat().st_ino for path in (out / "checkpoints").glob("*/state.ckpt")}
    assert bool(before) == (passes >= 4), "there is one as soon as an update is done"
    finished = run(*words(out, "checkpoint.keep=9", "--accept-changes", "--resume", "auto"))
    assert finished.returncode == 0, finished.stderr
    assert all(path.stat().st_ino == inode for path, inode in before.items()), "written again"
    expected, found = (torch.load(latest_checkpoint(f / "checkpoints"), weights_only=True) for f in (whole, out))
    assert expected["state_dict"].keys() == found["state_dict"].keys()
    assert not [key for key, one in expected["state_dict"].items() if not torch.equal(one, found["state_dict"][key])]
    assert expected["global_step"] == found["global_step"]
    assert expected["loops"]["fit_loop"]["epoch_loop.state_dict"] == found["loops"]["fit_loop"]["epoch_loop.state_dict"]


@pytest.mark.slow
def test_a_run_goes_on_with_its_steps_in_other_passes(small_model: Path, tmp_path: Path) -> None:
    """As on a machine with fewer devices: the same clips, draws and shares, so the same weights but for rounding."""
    whole, out = tmp_path / "whole", tmp_path / "cut"
    plain = ("optimizer.name=adamw", "optimizer.lr=1e-4", "optimizer.warmup_steps=0", "ema.decay=0.0")

    def words(folder: Path, *more: str) -> list[str]:
        return training(small_model, folder, *ACCUMULATED, *plain, *more)

    finished = run(*words(whole))
    assert finished.returncode == 0, finished.stderr
    script = STOPPED_IN_A_PASS.format(passes=6, number=int(signal.SIGTERM))
    stopped = run(*words(out), program=script)
    assert stopped.returncode == EXIT_PREEMPTED, stopped.stderr
    begun = torch.load(latest_checkpoint(out / "checkpoints"), weights_only=True)
    finished = run(*words(out, "data.batch_size=4", "--resume", "auto"))
    assert finished.returncode == 0, finished.stderr
    expected, found = (torch.load(latest_checkpoint(f / "checkpoints"), weights_only=True) for f in (whole, out))
    assert (
        found["anyflow"]["step"] == expected["anyflow"]["step"] == expected["global_step"] == found["global_step"] == 3
    )
    apart = sum(float((one - found["state_dict"][key]).square().sum()) for key, one in expected["state_dict"].items())
    moved = sum(float((one - begun["state_dict"][key]).square().sum()) for key, one in expected["state_dict"].items())
    assert 0 < apart < 0.01 * moved
