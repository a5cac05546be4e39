"""Random states of other machines: saved for one device a rank, taken up by as many ranks and GPUs as there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow.training.callbacks.checkpoints import Checkpoints


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """A machine with two GPUs, of which this rank has the first: their states."""
    states = {0: torch.tensor([0]), 1: torch.tensor([1])}

    def restore(state: torch.Tensor, device: Any = None) -> None:
        states[0 if device is None else int(device)] = state

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: states[0])
    monkeypatch.setattr(torch.cuda, "set_rng_state", restore)
    return states


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, every_steps=1, keep=1)


def test_a_rank_saves_the_state_of_its_own_device(gpus: dict[int, torch.Tensor], tmp_path: Path) -> None:
    saved = checkpoints(tmp_path).state_dict()["random"]
    assert len(saved) == 1 and [state.tolist() for state in saved[0]["cuda"]] == [[0]]


@pytest.mark.parametrize("devices", [0, 1, 8])
def test_states_of_more_or_fewer_gpus_are_taken_up(
    devices: int, gpus: dict[int, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of before hold the states of a whole node: those of eight GPUs could not be restored on two."""
    callback = checkpoints(tmp_path)
    state = callback.state_dict()
    own = {**state["random"][0], "cuda": [torch.tensor([10 + index]) for index in range(devices)]}
    callback.load_state_dict({"random": [own]})
    torch.rand(1)
    callback.on_train_batch_start()
    assert gpus[0].tolist() == ([10] if devices else [0]) and gpus[1].tolist() == [1]
    assert torch.equal(torch.get_rng_state(), own["torch"])
    assert capsys.readouterr().err == ""


def test_another_number_of_ranks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = checkpoints(tmp_path)
    own = callback.state_dict()["random"][0]
    callback.load_state_dict({"random": [own, own]})
    told = capsys.readouterr().err
    assert "saved by 2 ranks and taken up by 1" in told and "not bitwise" in told and told.count("\n") == 1
