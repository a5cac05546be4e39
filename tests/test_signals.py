"""Signals at any moment: while importing, between network calls, on one rank of several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn, zeros

from anyflow.errors import EXIT_PREEMPTED
from anyflow.system.ranks import PLACE, _note_end, _Rank, _wait
from anyflow.system.signals import Listener, Terminated, signals_raise
from anyflow.training.callbacks.preemption import stop_between_calls
from anyflow.training.callbacks.sampling import Sampling


def catches_sigterm(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("more", [(), ("hardware.devices=2",)])
def test_sigterm_while_importing_says_start_me_again(more: tuple[str, ...], tmp_path: Path) -> None:
    """143 is the end for a scheduler: the run would not be started again. (Also of the process that watches ranks.)"""
    words = ["train", "finetune/driving", *more, "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-m", "anyflow", *words], stderr=subprocess.PIPE, text=True)
    while not catches_sigterm(process.pid):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == EXIT_PREEMPTED
    assert "--resume" in told and "Traceback" not in told and not (tmp_path / "run").exists()


def test_other_commands_end_by_the_signal() -> None:
    """75 would have a scheduler start a command again that does not go on where it was."""
    code = "import sys; sys.argv = ['anyflow', 'export']; import anyflow.system.early, signal; "
    code += "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


class Network(nn.Module):
    """Counts its calls and sends its process a signal at one of them."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.calls, self.at = 0, at

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return z


def test_a_signal_while_sampling_ends_it_at_the_next_network_call() -> None:
    """It used to be remembered until the whole curve was there: at 50 steps of 14B that is not within 300 s."""
    network = Network(at=3)
    with Listener() as listener, pytest.raises(Terminated), stop_between_calls(network, listener):
        for _ in range(50):
            network(zeros(1))
    assert network.calls == 3
    network(zeros(1))
    assert network.calls == 4, "outside of the block nobody asks"


class Stage(nn.Module):
    """As much of a stage as sampling asks."""

    step, turn, update = 4, 0, SimpleNamespace(is_complete=True)


def test_a_stopped_curve_is_measured_when_the_run_goes_on() -> None:
    """The step is saved and the run ends; resumed, the curve of this very step comes before the next step."""
    network, measured, stage = Network(at=1), [], Stage()

    def measure(label: str) -> None:
        with stop_between_calls(network, listener):
            network(zeros(1))
            network(zeros(1))
        measured.append(label)

    listener = Listener()
    sampling = Sampling(measure, every_steps=4, total_steps=8, listener=listener)
    listener.start()
    try:
        sampling.on_train_batch_end(None, stage)  # type: ignore[arg-type]
    finally:
        listener.stop()
    assert not measured and listener.received is signal.SIGTERM and stage.training
    listener = Listener()
    resumed = Sampling(measure, every_steps=4, total_steps=8, listener=listener)
    try:
        resumed.on_train_start(None, stage)  # type: ignore[arg-type]
        stage.turn = 1  # the student's update of the next step
        resumed.on_train_batch_end(None, stage)  # type: ignore[arg-type]
    finally:
        listener.stop()
    assert measured == ["step_00000004"]


def test_a_second_ctrl_c_ends_at_once_and_the_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Listener() as listener:
        os.kill(os.getpid(), signal.SIGINT)
        assert listener.received is signal.SIGINT
        with pytest.raises(Terminated) as caught:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert caught.value.at_once
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(Terminated) as stop, signals_raise():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert stop.value.received is signal.SIGTERM


def ended(*codes: int, folder: Path) -> list[_Rank]:
    """Ranks that have ended so."""
    ranks = []
    for number, code in enumerate(codes):
        how = f"import os; os.kill(os.getpid(), {-code})" if code < 0 else f"raise SystemExit({code})"
        process: Any = subprocess.Popen([sys.executable, "-c", how])
        process.wait()
        ranks.append(_Rank(number, process, folder / "none", folder / "none"))
    return ranks


@pytest.mark.parametrize(
    "codes, passed, expected",
    [
        ((75, 1), [signal.SIGTERM], 75),  # the second lost its peer in a collective
        ((-signal.SIGTERM, 75), [signal.SIGTERM], 75),  # one had no handler yet
        ((0, 0), [signal.SIGTERM], 0),  # it came too late
        ((1, 1), [signal.SIGTERM], 1),  # that is another story
        ((130, 1), [signal.SIGINT], 130),
        ((75, 1), [], 1),
    ],
)
def test_ranks_that_were_told_to_stop_have_stopped(
    codes: tuple[int, ...], passed: list[int], expected: int, tmp_path: Path
) -> None:
    assert _wait(ended(*codes, folder=tmp_path), 2, "again", passed) == expected


@pytest.mark.parametrize("code, state", [(75, "preempted"), (137, "failed")])
def test_the_watcher_notes_the_end_of_ranks_that_could_not(code: int, state: str, tmp_path: Path) -> None:
    """A rank that is killed in a collective leaves "running" behind."""
    status = tmp_path / "training" / "status.json"
    status.parent.mkdir()
    (tmp_path / PLACE).write_text(str(status.parent))
    status.write_text('{"state": "running", "start": "x"}')
    _note_end(tmp_path, code)
    assert json.loads(status.read_text()) == {"state": state, "start": "x"}
    status.write_text('{"state": "finished"}')
    _note_end(tmp_path, code)
    assert json.loads(status.read_text()) == {"state": "finished"}
