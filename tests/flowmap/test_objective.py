"""The objective on a tiny smooth network: quick against plain order of work, options, masks, rebalancing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from anyflow.flowmap.intervals import keep_first_frame
from anyflow.flowmap.objective import (
    FlowMapLoss,
    FlowMapObjective,
    diffusion_statistics,
    flow_map_loss,
    flow_matching_loss,
    plain_flow_map_loss,
    rebalance,
)
from anyflow.flowmap.schedule import train_weight

from .networks import FrameNetwork

NEGATIVE = 4
"""Added to a sample's row: its text is the negative prompt."""
T = torch.tensor([900.0, 500.0, 700.0, 300.0])
R = torch.tensor([900.0, 0.0, 200.0, 300.0])
ROWS = torch.tensor([0, NEGATIVE + 1, 2, NEGATIVE + 3])


@dataclass(frozen=True)
class Inputs:
    """Four samples: diffusion, consistency, interval, diffusion; texts 1 and 3 dropped."""

    clean: Tensor
    noise: Tensor
    timestep: Tensor = T
    r_timestep: Tensor = R
    rows: Tensor = ROWS
    loss_frames: Tensor | None = None

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter((self.clean, self.noise, self.timestep, self.r_timestep, self.rows, self.loss_frames))


def inputs(dtype: torch.dtype = torch.float32, **changes: Tensor) -> Inputs:
    clean, noise = torch.randn(2, 4, 3, 3, 1, 1, generator=torch.Generator().manual_seed(2)).to(dtype)
    return replace(Inputs(clean, noise), **changes)


def image_to_video() -> Inputs:
    t, r, frames = keep_first_frame(T, R, 3, torch.tensor([False, True, True, False]))
    return inputs(timestep=t, r_timestep=r, loss_frames=frames)


def gradients(network: FrameNetwork, found: FlowMapLoss) -> list[Tensor]:
    return list(torch.autograd.grad(found.per_sample.sum(), list(network.parameters())))


CASES = {
    "mixed": inputs(),
    "own texts": inputs(rows=torch.arange(4)),
    "all dropped": inputs(rows=torch.arange(4) + NEGATIVE),
    "all diffusion": inputs(r_timestep=T),
    "no diffusion": inputs(r_timestep=T / 2),
    "per frame": inputs(timestep=T[:, None].expand(-1, 3), r_timestep=R[:, None].expand(-1, 3)),
    "image to video": image_to_video(),
}
SETTINGS = {
    "released": FlowMapObjective(),
    "guided tangent": FlowMapObjective(guided_tangent=True),
    "no guidance": FlowMapObjective(guidance_scale=1.0),
    "no guidance, guided tangent": FlowMapObjective(guidance_scale=1.0, guided_tangent=True),
    "uniform, narrow": FlowMapObjective(weight="uniform", delta=1.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_quick_and_plain_orders_agree(case: str, setting: str) -> None:
    """Same loss, prediction, target and gradients to 1e-5."""
    network = FrameNetwork()
    quick = flow_map_loss(SETTINGS[setting], network, *CASES[case])
    plain = plain_flow_map_loss(SETTINGS[setting], network, *CASES[case])
    torch.testing.assert_close(quick.per_sample, plain.per_sample, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(quick.prediction, plain.prediction, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quick.target, plain.target, rtol=1e-4, atol=1e-5)
    assert torch.equal(quick.is_diffusion, plain.is_diffusion)
    for mine, other in zip(gradients(network, quick), gradients(network, plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("guided_tangent", [False, True])
def test_jvp_and_central_difference_agree(case: str, guided_tangent: bool) -> None:
    """In float64 with a narrow difference."""
    network = FrameNetwork().double()
    clean, noise, t, r, *rest = CASES[case]
    doubled = (clean.double(), noise.double(), t.double(), r.double(), *rest)
    setting = FlowMapObjective(guided_tangent=guided_tangent, delta=0.1)
    central = flow_map_loss(setting, network, *doubled)
    jvp = flow_map_loss(replace(setting, derivative="jvp"), network, *doubled)
    torch.testing.assert_close(jvp.target, central.target, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(jvp.per_sample, central.per_sample, rtol=1e-6, atol=1e-6)


EXPECTED_CALLS = {
    # intervals ahead, behind, negatives for texts kept; then everything with gradient
    "released": [(5, 2) * 2 + (4, 6), (0, 5, 2, 7)],
    "guided tangent": [(4, 6), (5, 2) * 2, (0, 5, 2, 7)],
    "no guidance": [(5, 2) * 2, (0, 5, 2, 7)],
}


@pytest.mark.parametrize("setting", EXPECTED_CALLS)
def test_only_what_is_needed_is_asked(setting: str) -> None:
    network = FrameNetwork()
    flow_map_loss(SETTINGS[setting], network, *CASES["mixed"])
    assert network.calls == EXPECTED_CALLS[setting]


def test_nothing_to_ask_means_no_call() -> None:
    network = FrameNetwork()
    flow_map_loss(FlowMapObjective(guidance_scale=1.0), network, *CASES["all diffusion"])
    assert len(network.calls) == 1


@pytest.mark.parametrize("derivative", ["central", "jvp"])
@pytest.mark.parametrize("guided_tangent", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_ranks_can_keep_in_step(guidance_scale: float, guided_tangent: bool, derivative: str) -> None:
    """With ``same_calls`` the number of calls does not depend on the samples, nor the result on the vain ones."""
    setting = FlowMapObjective(guidance_scale, guided_tangent, derivative)  # type: ignore[arg-type]
    nothing_to_ask = inputs(r_timestep=T, rows=torch.arange(4) + NEGATIVE)
    counts = set()
    for case in (*CASES.values(), nothing_to_ask):
        network = FrameNetwork()
        found = flow_map_loss(setting, network, *case, same_calls=True)
        counts.add(len(network.calls))
        assert torch.equal(found.per_sample, flow_map_loss(setting, network, *case).per_sample)
    assert len(counts) == 1


def test_dropped_texts_see_only_the_negative_prompt() -> None:
    """Their loss is the same whatever the other texts say."""
    network = FrameNetwork()
    before = flow_map_loss(FlowMapObjective(), network, *CASES["mixed"]).per_sample
    network.texts[:NEGATIVE] += 1
    after = flow_map_loss(FlowMapObjective(), network, *CASES["mixed"]).per_sample
    dropped = CASES["mixed"].rows >= NEGATIVE
    assert torch.equal(before == after, dropped)


def test_low_precision_networks_get_times_and_paths_in_float32() -> None:
    network = FrameNetwork().bfloat16()
    found = flow_map_loss(FlowMapObjective(), network, *inputs(torch.bfloat16))
    assert network.dtypes == {torch.float32}
    assert found.prediction.dtype == found.target.dtype == torch.float32
    assert found.per_sample.dtype == torch.float64 and found.per_sample.isfinite().all()


def test_guidance_taken_out_of_the_prediction() -> None:
    """prediction = (u + (g - 1) u_negative) / g, the gradient through u alone."""
    network, case = FrameNetwork(), CASES["own texts"]
    found = flow_map_loss(FlowMapObjective(guidance_scale=2.0), network, *case)
    sigma = (T / 1000)[:, None, None, None, None]
    z = sigma * case.noise + (1 - sigma) * case.clean
    own = network(z, T, R, case.rows)
    negative = network(z, T, R, torch.full((4,), NEGATIVE))
    torch.testing.assert_close(found.prediction, (own + negative) / 2)
    (through,) = torch.autograd.grad(found.prediction.sum(), network.second, retain_graph=True)
    torch.testing.assert_close(through, torch.autograd.grad(own.sum() / 2, network.second)[0])


def test_weights_multiply_the_error() -> None:
    network, case = FrameNetwork(), CASES["mixed"]
    plain = flow_map_loss(FlowMapObjective(weight="uniform"), network, *case).per_sample
    for kind in ("beta08", "gaussian"):
        weighted = flow_map_loss(FlowMapObjective(weight=kind, shift=3.0), network, *case).per_sample
        torch.testing.assert_close(weighted, plain * train_weight(T, kind, 3.0), rtol=1e-6, atol=0)


def test_given_frames_do_not_move_and_carry_no_loss() -> None:
    """Changing the noise of a given frame changes nothing."""
    network, case = FrameNetwork(), CASES["image to video"]
    before = flow_map_loss(FlowMapObjective(), network, *case).per_sample
    other = case.noise.clone()
    other[1:3, 0] += 5
    after = flow_map_loss(FlowMapObjective(), network, *replace(case, noise=other)).per_sample
    assert torch.equal(before, after)
    other[0, 0] += 5
    assert flow_map_loss(FlowMapObjective(), network, *replace(case, noise=other)).per_sample[0] != before[0]


def test_flow_matching_is_the_objective_at_no_interval() -> None:
    network, case = FrameNetwork(), CASES["all diffusion"]
    matching = flow_matching_loss(network, case.clean, case.noise, T, case.rows)
    setting = FlowMapObjective(guidance_scale=1.0, weight="uniform")
    torch.testing.assert_close(matching.double(), flow_map_loss(setting, network, *case).per_sample)
    assert matching.requires_grad


def test_rebalanced_losses_have_the_diffusion_mean_and_their_own_direction() -> None:
    losses = torch.tensor([2.0, 4.0, 50.0, 0.1], dtype=torch.float64, requires_grad=True)
    is_diffusion = torch.tensor([True, True, False, False])
    total, count = diffusion_statistics(losses, is_diffusion)
    balanced = rebalance(losses, is_diffusion, total / count)
    torch.testing.assert_close(balanced.detach(), torch.tensor([2.0, 4.0, 3.0, 3.0]).double(), rtol=1e-3, atol=0)
    balanced.sum().backward()
    expected = torch.tensor([1, 1, 3 / (50 + 1e-5), 3 / (0.1 + 1e-5)], dtype=torch.float64)
    torch.testing.assert_close(losses.grad, expected)


@pytest.mark.parametrize("mean", [None, math.nan, torch.tensor(math.nan)])
def test_without_diffusion_samples_the_scale_is_one(mean: float | Tensor | None) -> None:
    losses = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
    balanced = rebalance(losses, torch.tensor([False, False]), mean)
    balanced.sum().backward()
    assert torch.equal(balanced, losses) and torch.equal(losses.grad, torch.ones(2).double())  # type: ignore[arg-type]


def test_statistics_of_ranks_add_up() -> None:
    """Two ranks, one without any diffusion sample: summed, the mean is the global batch's."""
    losses, is_diffusion = torch.tensor([1.0, 5.0, 3.0, 8.0]), torch.tensor([True, True, False, False])
    parts = [diffusion_statistics(losses[part], is_diffusion[part]) for part in (slice(0, 3), slice(3, 4))]
    total, count = sum(parts)  # type: ignore[misc]
    assert total / count == losses[is_diffusion].mean()
    alone, none = parts[1]
    assert (alone / none).isnan()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("guidance_scale", 0.0, "must be above 0"),
        ("delta", math.nan, "must be above 0"),
        ("shift", -1.0, "must be above 0"),
        ("derivative", "forward", "choose one of central, jvp"),
        ("weight", "cosine", "choose one of beta08, gaussian, uniform"),
    ],
)
def test_wrong_options_are_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*{said}"):
        FlowMapObjective(**{field: value})  # type: ignore[arg-type]
