"""The forward objective against the golden case, and its variants against the formulas written out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from anyflow.backbone.load import StoredWeights
from anyflow.backbone.options import BaseWeights
from anyflow.backbone.quantized import check_quantizer, quantize_base
from anyflow.flowmap.intervals import draw_intervals, keep_first_frame
from anyflow.flowmap.objective import (
    FlowMapLoss,
    FlowMapObjective,
    diffusion_statistics,
    flow_map_loss,
    plain_flow_map_loss,
    rebalance,
)
from anyflow.flowmap.schedule import interpolate, train_weight

from .reference import NEGATIVE, GoldenVelocity, load_case, relative_error

CASE = load_case("bi_pretrain")
INTERVALS = draw_intervals(torch.stack([CASE["draw/u1"], CASE["draw/u2"]], dim=1))
OWN_TEXTS = torch.arange(4)


@dataclass(frozen=True)
class Variant:
    """One setting of the released step: times per frame, texts, the scale of guidance."""

    t: Tensor
    r: Tensor
    rows: Tensor
    scale: float = 3.0


def spread(time: Tensor) -> Tensor:
    return time[:, None].expand(-1, 3).clone()


PLAIN = Variant(spread(INTERVALS.timestep), spread(INTERVALS.r_timestep), OWN_TEXTS)
FIRST_FRAME_GIVEN = PLAIN.t.clone()
FIRST_FRAME_GIVEN[:, 0] = 0
VARIANTS = {
    "plain": PLAIN,
    "noguidance": replace(PLAIN, scale=1.0),
    "droptext": replace(PLAIN, rows=torch.tensor([0, NEGATIVE + 1, NEGATIVE + 2, 3])),
    # The published code leaves r of the given frame as drawn and counts its error: only injected here.
    "i2v": replace(PLAIN, t=FIRST_FRAME_GIVEN),
}


def by_the_formulas(velocity: GoldenVelocity, variant: Variant) -> dict[str, Tensor]:
    """The step written out once more, formula by formula, sharing nothing with the library but the weight table."""
    clean, noise, g, delta = velocity.clean, CASE["draw/noise"], variant.scale, 5
    t, r, rows = variant.t, variant.r, variant.rows
    sigma = (t / 1000)[..., None, None, None]
    z, v = sigma * noise + (1 - sigma) * clean, noise - clean
    pred_cond = velocity(z, t, r, rows)
    with torch.no_grad():
        pred_uncond = velocity(z, t, r, torch.full_like(rows, NEGATIVE))
        ahead = velocity(z + v * delta / 1000, t + delta, r, rows)
        behind = velocity(z - v * delta / 1000, t - delta, r, rows)
    derivative = (ahead - behind) / (2 * delta * g)
    target = v - (t - r)[..., None, None, None] * derivative
    error = ((pred_cond - (1 - g) * pred_uncond) / g - target).square().mean(dim=(1, 2, 3, 4))
    weighted = (error[:, None] * train_weight(t)).mean(dim=1)
    anchor = weighted[INTERVALS.is_diffusion].mean().detach()
    scale = torch.where(INTERVALS.is_diffusion, 1.0, anchor / (weighted.detach() + 1e-5))
    return {
        "z": z,
        "pred_cond": pred_cond,
        "pred_uncond": pred_uncond,
        "dF_dt": derivative,
        "target": target,
        "error": error,
        "weighted": weighted,
        "loss": (weighted * scale).mean(),
    }


def reduce(found: FlowMapLoss) -> Tensor:
    """Rebalance and average as a stage does on one rank, with the drawn shares."""
    total, count = diffusion_statistics(found.per_sample, INTERVALS.is_diffusion)
    return rebalance(found.per_sample, INTERVALS.is_diffusion, total / count).mean()


def test_intervals() -> None:
    torch.testing.assert_close(INTERVALS.timestep, CASE["out/t"][:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(INTERVALS.r_timestep, CASE["out/r"][:, 0], rtol=1e-6, atol=1e-6)
    assert torch.equal(INTERVALS.is_diffusion, CASE["out/is_diffusion"])


def test_the_formulas_written_out_agree_with_the_case() -> None:
    """Trust in the variants below rests on this one."""
    found = by_the_formulas(GoldenVelocity(), PLAIN)
    for mine, stored in (("z", "noisy_latents"), ("pred_cond", "pred_cond"), ("pred_uncond", "pred_uncond")):
        assert relative_error(found[mine], CASE[f"out/{stored}"]) < 1e-4
    assert relative_error(found["dF_dt"], CASE["out/dF_dt"]) < 1e-4
    torch.testing.assert_close(found["error"], CASE["out/mse_per_sample"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["loss"], CASE["out/loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("base", "within"), [("int8", 0.004), ("nf4", 0.1)])
def test_the_formulas_on_a_quantised_base(base: BaseWeights, within: float) -> None:
    """The network's answers and their derivative move by as much as the weights do, and no more."""
    check_quantizer(base)
    velocity = GoldenVelocity()
    stored = StoredWeights(dict(velocity.network.state_dict()), lambda name: torch.float32)
    quantize_base(SimpleNamespace(transformer=velocity.network, stored=stored), base, torch.device("cpu"))  # type: ignore[arg-type]
    found = by_the_formulas(velocity, PLAIN)
    for name in ("pred_cond", "pred_uncond", "dF_dt"):
        assert within / 10 < relative_error(found[name], CASE[f"out/{name}"]) < within
    torch.testing.assert_close(found["loss"], CASE["out/loss"], rtol=within / 10, atol=0)


@pytest.mark.parametrize("loss_function", [flow_map_loss, plain_flow_map_loss])
def test_forward_step(loss_function) -> None:  # type: ignore[no-untyped-def]
    velocity = GoldenVelocity()
    found: FlowMapLoss = loss_function(
        FlowMapObjective(),
        velocity,
        velocity.clean,
        CASE["draw/noise"],
        INTERVALS.timestep,
        INTERVALS.r_timestep,
        OWN_TEXTS,
    )
    torch.testing.assert_close(found.per_sample, CASE["out/weighted_per_sample"], rtol=1e-5, atol=0)
    assert torch.equal(found.is_diffusion, CASE["out/is_diffusion"])
    guided = (CASE["out/pred_cond"] + 2 * CASE["out/pred_uncond"]) / 3
    assert relative_error(found.prediction, guided) < 1e-4
    interval = (CASE["out/t"] - CASE["out/r"])[..., None, None, None]
    target = CASE["draw/noise"] - velocity.clean - interval * CASE["out/dF_dt"]
    assert relative_error(found.target, target) < 1e-4
    assert relative_error(interpolate(velocity.clean, CASE["draw/noise"], CASE["out/t"]), CASE["out/noisy_latents"]) < (
        1e-4
    )

    loss = reduce(found)
    loss.backward()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, CASE["out/loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(velocity.gradient_norm(), CASE["out/grad_norm"], rtol=1e-5, atol=0)
    gradients = {name: weight.grad for name, weight in velocity.network.named_parameters()}
    stored = [key for key in CASE if key.startswith("grad/")]
    assert stored
    for key in stored:
        assert relative_error(gradients[key.removeprefix("grad/")], CASE[key]) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("loss_function", [flow_map_loss, plain_flow_map_loss])
def test_variants(name: str, loss_function) -> None:  # type: ignore[no-untyped-def]
    """No guidance, dropped texts and per-frame times with every frame counted, to the released order of work."""
    variant = VARIANTS[name]
    reference, velocity = GoldenVelocity(), GoldenVelocity()
    expected = by_the_formulas(reference, variant)
    expected["loss"].backward()
    found: FlowMapLoss = loss_function(
        FlowMapObjective(guidance_scale=variant.scale),
        velocity,
        velocity.clean,
        CASE["draw/noise"],
        variant.t,
        variant.r,
        variant.rows,
        loss_frames=torch.ones(4, 3) if name == "i2v" else None,
    )
    loss = reduce(found)
    loss.backward()
    assert relative_error(found.target, expected["target"]) < 1e-4
    torch.testing.assert_close(found.per_sample, expected["weighted"], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(velocity.gradient_norm(), reference.gradient_norm(), rtol=1e-5, atol=0)


def test_each_piece_of_work_is_done_once() -> None:
    """Two of four samples are intervals and one text is dropped: 2 + 2 + 3 rows without gradient, then 4 with."""
    velocity = GoldenVelocity()
    rows = torch.tensor([0, NEGATIVE, 2, 3])
    inputs = (velocity.clean, CASE["draw/noise"], INTERVALS.timestep, INTERVALS.r_timestep, rows)
    flow_map_loss(FlowMapObjective(), velocity, *inputs)
    assert velocity.calls == [7, 4]
    velocity.calls.clear()
    plain_flow_map_loss(FlowMapObjective(), velocity, *inputs)
    assert velocity.calls == [4, 4, 4, 4]


def test_jvp_goes_through_the_network() -> None:
    """Forward-mode AD through diffusers' attention gives the derivative that a narrow central difference nears.

    In float64, with a width well below the fastest wave of the time embedding (a radian a timestep).
    """
    velocity = GoldenVelocity().double()
    inputs = (
        velocity.clean.double(),
        CASE["draw/noise"].double(),
        INTERVALS.timestep.double(),
        INTERVALS.r_timestep.double(),
        OWN_TEXTS,
    )
    exact = flow_map_loss(FlowMapObjective(derivative="jvp"), velocity, *inputs)
    narrow = flow_map_loss(FlowMapObjective(delta=0.1), velocity, *inputs)
    assert velocity.calls == [4, 2, 4, 8, 4]
    assert exact.per_sample.requires_grad and not exact.target.requires_grad
    assert relative_error(exact.target, narrow.target) < 0.01


def test_image_to_video_keeps_the_first_frame() -> None:
    """Our own image-to-video: the given frame is clean in every call, its time 0, its error uncounted."""
    velocity, seen = GoldenVelocity(), []

    def recording(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        seen.append((z[:, 0], t[:, 0], r[:, 0]))
        return velocity(z, t, r, rows)

    everyone = torch.ones(4, dtype=torch.bool)
    t, r, frames = keep_first_frame(INTERVALS.timestep, INTERVALS.r_timestep, 3, everyone)
    found = flow_map_loss(
        FlowMapObjective(), recording, velocity.clean, CASE["draw/noise"], t, r, OWN_TEXTS, loss_frames=frames
    )
    known = velocity.clean[:, 0]
    for z, time, r_time in seen:
        assert not time.any() and not r_time.any()
        assert all(any(torch.equal(row, clean) for clean in known) for row in z)
    assert torch.equal(found.is_diffusion, INTERVALS.is_diffusion)
    error = (found.prediction - found.target)[:, 1:].square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(found.per_sample, error * train_weight(INTERVALS.timestep), rtol=1e-5, atol=0)
