"""Optimisers: what Muon is given, what state survives, how the learning rate moves."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from anyflow.stages.ema import Ema, EmaSettings
from anyflow.stages.muon import Muon, orthogonalise
from anyflow.stages.optimizers import MuonWithAdamW, OptimizerSettings, build_optimizer, build_schedule


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(4, 8, 3), nn.Flatten(), nn.Linear(8, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        x = torch.randn(5, 4, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def test_muon_takes_matrices_and_kernels_and_adamw_the_rest() -> None:
    net = network()
    optimizer = build_optimizer(OptimizerSettings("muon", lr=1e-2), net.named_parameters())
    assert isinstance(optimizer, MuonWithAdamW)
    muon, adamw = optimizer.param_groups
    assert {tuple(p.shape) for p in muon["params"]} == {(8, 4, 3, 3, 3), (3, 8)}
    assert {tuple(p.shape) for p in adamw["params"]} == {(8,), (3,)}


def test_muon_is_torchs_on_flattened_kernels_in_more_digits() -> None:
    """Alike weights go together, tall and wide ones apart; torch's own orthogonalises in bfloat16."""
    shapes = [(8, 4, 3, 3, 3), (6, 16), (16, 6), (6, 16)]
    ours = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(9))) for shape in shapes]
    theirs = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in ours]
    optimizer = MuonWithAdamW(ours, [], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [weight.detach().clone() for weight in theirs]
    for step in range(3):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(10 * step + index))
            other.grad = one.grad.flatten(1).clone()
        optimizer.step()
        reference.step()
    for start, one, other in zip(before, ours, theirs, strict=True):
        moved, expected = one.detach().flatten(1) - start, other.detach() - start
        assert float((moved - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("shape", [(3, 6, 16), (1, 16, 6), (2, 8, 8)])
def test_a_direction_has_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor(7.0)
    found = orthogonalise(matrices)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.3 and float(values.max()) < 1.3
    whole = torch.stack([orthogonalise(matrix[None])[0] for matrix in matrices])
    torch.testing.assert_close(found, whole)


def test_a_weight_without_gradient_stays() -> None:
    one, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    one.grad = torch.ones(2, 3)
    Muon([one, other], lr=0.1).step()
    assert not torch.equal(one.detach(), torch.ones(2, 3)) and torch.equal(other.detach(), torch.ones(2, 3))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_bitwise(name: str) -> None:
    settings = OptimizerSettings(name, lr=1e-2, warmup_steps=3, schedule="cosine")
    whole = network()
    optimizer = build_optimizer(settings, whole.named_parameters())
    train(whole, optimizer, 4)
    weights, state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, 3, start=4)

    resumed = network()
    resumed.load_state_dict(weights)
    restored = build_optimizer(settings, resumed.named_parameters())
    restored.load_state_dict(state)
    train(resumed, restored, 3, start=4)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_frozen_parameters_are_left_out() -> None:
    net = network()
    net[0].requires_grad_(False)
    optimizer = build_optimizer(OptimizerSettings("adamw"), net.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_the_schedule_warms_up_then_follows_its_shape() -> None:
    def rates(schedule: str) -> list[float]:
        settings = OptimizerSettings("adamw", lr=1.0, warmup_steps=4, schedule=schedule)
        optimizer = build_optimizer(settings, network().named_parameters())
        scheduler = build_schedule(settings, optimizer, total_steps=12)
        found = []
        for _ in range(12):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    assert rates("constant") == [0.25, 0.5, 0.75, 1.0] + [1.0] * 8
    cosine = rates("cosine")
    assert cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(late < early for early, late in pairwise(cosine[4:]))
    assert 0 < cosine[-1] < 0.05


def test_the_average_is_the_weights_until_it_starts_then_lags() -> None:
    net = nn.Linear(1, 1, bias=False)
    ema = Ema(net.parameters(), EmaSettings(decay=0.9, start_step=2))
    nn.init.constant_(net.weight, 1.0)
    ema.update(1)
    assert float(ema.shadows[0]) == 1.0
    nn.init.constant_(net.weight, 2.0)
    ema.update(2)
    assert float(ema.shadows[0]) == 2.0
    nn.init.constant_(net.weight, 12.0)
    ema.update(3)
    assert float(ema.shadows[0]) == pytest.approx(0.9 * 2 + 0.1 * 12)
    with ema.applied():
        assert float(net.weight) == pytest.approx(3.0)
    assert float(net.weight) == 12.0


def test_the_average_holds_trainable_weights_alone() -> None:
    net = network()
    net[0].requires_grad_(False)
    assert len(Ema(net.parameters(), EmaSettings()).shadows) == 2
