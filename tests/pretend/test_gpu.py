"""The pretended GPU sees what a GPU refuses, waits for and computes in; what it would miss, whole runs would too."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu import pretended
from torch import nn
from torch.utils.checkpoint import checkpoint


def test_mixed_devices_are_a_mismatch() -> None:
    with pretended() as gpu:
        there = torch.ones(3, device="cuda")
        _ = there * 2 + torch.tensor(1.0)  # a number of the host's is welcome
        _ = there[torch.tensor([0, 2])]
        assert not gpu.findings.mismatches
        _ = there + torch.ones(3)
        _ = torch.cat([there, torch.ones(3)])
        torch.zeros(()).add_(there.sum())
        assert len(gpu.findings.mismatches) == 3


def test_results_views_and_copies_are_where_their_sources_are() -> None:
    with pretended():
        there = torch.ones(4, 4).to("cuda")
        assert [x.device.type for x in (there[0], there.T, there @ there, torch.zeros_like(there))] == ["cuda"] * 4
        assert there.new_tensor([1.0]).is_cuda and copy.deepcopy(there).is_cuda
        back = there.cpu()
        assert back.device.type == "cpu" and (back * 2).device.type == "cpu" and there.is_cuda
        assert torch.zeros_like(there, device="cpu").device.type == "cpu"


def test_a_module_moves_there_and_back_with_its_weights_and_gradients() -> None:
    """Lightning's teardown moves the module to the host: work after it must be seen there."""
    with pretended() as gpu:
        net = nn.Linear(4, 4)
        weight = net.weight
        net.to("cuda")
        assert net.weight is weight and weight.is_cuda

        def block(video: torch.Tensor) -> torch.Tensor:
            return net(video) + torch.ones(4, device=video.device)

        checkpoint(block, torch.ones(2, 4, device="cuda"), use_reentrant=False).sum().backward()
        assert weight.grad is not None and weight.grad.is_cuda and not gpu.findings.mismatches
        optimizer = torch.optim.AdamW(net.parameters())
        optimizer.step()
        assert optimizer.state[weight]["exp_avg"].is_cuda
        net.cpu()
        assert not weight.is_cuda
        gpu.findings.work.clear()
        net(torch.ones(2, 4))
        assert {device for _, _, device, _ in gpu.findings.work} == {"cpu"}


def test_waiting_for_the_device_is_seen_wherever_it_hides() -> None:
    with pretended() as gpu:
        there = torch.arange(4.0, device="cuda")
        waits = [
            lambda: there.sum().item(),
            lambda: bool(there.any()),
            lambda: float(there.max()),
            lambda: there[there > 1],
            lambda: there.nonzero(),
            lambda: there.cpu(),
            lambda: there.tolist(),
            lambda: there.repeat_interleave(torch.ones(4, dtype=torch.int64, device="cuda")),
            lambda: torch.zeros(4).copy_(there),
            torch.cuda.synchronize,
        ]
        for number, wait in enumerate(waits):
            wait()
            assert sum(gpu.findings.syncs[""].values()) == number + 1
        there.repeat_interleave(torch.ones(4, dtype=torch.int64, device="cuda"), output_size=4)
        torch.ones(4).sum().item()
        with pytest.raises(TypeError):
            there.numpy()
        assert sum(gpu.findings.syncs[""].values()) == len(waits)


def test_the_precision_of_work_is_that_of_autocast() -> None:
    with pretended() as gpu:
        net, video = nn.Linear(4, 4).to("cuda"), torch.ones(2, 4, device="cuda")
        for phase, enabled in (("training", True), ("sampling", False)):
            gpu.findings.phase = phase
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
                checkpoint(net, video, use_reentrant=False).sum().backward()
        assert {(phase, dtype) for phase, _, _, dtype in gpu.findings.work} == {
            ("training", "bfloat16"),
            ("sampling", "float32"),
        }


def test_jvp_is_computed_there() -> None:
    with pretended() as gpu:
        net, z = nn.Linear(4, 4).to("cuda"), torch.ones(2, 4, device="cuda")
        value, slope = torch.func.jvp(net, (z,), (z,))
        assert value.is_cuda and slope.is_cuda and not gpu.findings.mismatches


def test_nothing_is_left_of_it_afterwards() -> None:
    before = torch.cuda.is_available(), torch.autocast.__init__
    with pretended():
        kept = torch.ones(2, device="cuda")
    assert before == (torch.cuda.is_available(), torch.autocast.__init__) and kept.device.type == "cpu"
