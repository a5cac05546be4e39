"""Backward simulation, distribution matching and the critic's loss against the golden cases."""

from __future__ import annotations

import json

import pytest
import torch

from anyflow.flowmap.matching import critic_loss, matching_gradient, matching_loss, matching_timestep
from anyflow.flowmap.objective import Velocity
from anyflow.flowmap.rollout import BackwardSimulation
from anyflow.flowmap.schedule import TIMESTEPS, shift_sigma

from .reference import HERE, GoldenVelocity, load_case, relative_error

ROLLOUT = load_case("bi_rollout")
STORED = json.loads((HERE / "bi_rollout.json").read_text())["cases"]
ROWS = torch.arange(2)
NEGATIVE_OF_FOUR = 4
"""The cases use two of four texts: the negative prompt, row 2 of the batch, is row 4 of the network's."""


def roll(velocity: GoldenVelocity, noise: torch.Tensor, num_steps: int, index: int) -> torch.Tensor:
    return BackwardSimulation(num_steps, index, 5.0).run(lambda z, t, r: velocity(z, t, r, ROWS), noise)


def of_two(velocity: GoldenVelocity) -> Velocity:
    """The seam of a batch of two: its rows 2 and 3 are the negative prompt."""
    return lambda z, t, r, rows: velocity(z, t, r, torch.where(rows >= 2, NEGATIVE_OF_FOUR, rows))


@pytest.mark.parametrize("name", STORED)
def test_rollout(name: str) -> None:
    velocity = GoldenVelocity()
    samples = roll(velocity, ROLLOUT["in/init_noise"], *map(int, name.split("_")))
    assert relative_error(samples, ROLLOUT[f"out/rollout/{name}"]) < 1e-4
    asked = [call[:2] for call in STORED[name]["model_calls_t_r_iscache"]]
    torch.testing.assert_close(torch.tensor(velocity.times), torch.tensor(asked), rtol=1e-6, atol=0)
    (samples * ROLLOUT["in/grad_probe"]).sum().backward()
    expected = STORED[name]["grad_norm_of_sum_out_times_probe"]
    assert float(velocity.gradient_norm()) == pytest.approx(expected, rel=1e-5)


def test_generator() -> None:
    draws, case = load_case("bi_generator_draws"), load_case("bi_generator_4_1")
    student, teacher, critic = (GoldenVelocity(f"weights_{name}") for name in ("student_bi", "teacher", "fake"))
    samples = roll(student, draws["draw/init_noise"], 4, 1)
    assert relative_error(samples, case["out/pred_video"]) < 1e-4
    timestep = matching_timestep(draws["draw/dmd_u"], 5.0)
    torch.testing.assert_close(timestep, case["out/dmd_timesteps"], rtol=1e-5, atol=1e-4)
    found = matching_gradient(
        of_two(critic), of_two(teacher), samples, draws["draw/dmd_noise"], timestep, ROWS, extra_guidance=3.0
    )
    assert relative_error(found.raw, case["out/kl_grad_raw"]) < 1e-4
    assert relative_error(found.normaliser, case["out/kl_normalizer"]) < 1e-4
    assert relative_error(found.gradient, case["out/kl_grad_normalized"]) < 1e-4
    loss = matching_loss(samples, found.gradient).mean()
    assert loss.dtype == torch.float64
    assert float(loss.detach()) == pytest.approx(float(case["out/loss"]), rel=1e-5)
    loss.backward()
    assert float(student.gradient_norm()) == pytest.approx(float(case["out/grad_norm"]), rel=1e-5)
    for name in (key.removeprefix("grad/") for key in case if key.startswith("grad/")):
        assert relative_error(student.network.get_parameter(name).grad, case[f"grad/{name}"]) < 1e-4
    assert all(weight.grad is None for network in (teacher, critic) for weight in network.parameters())


def test_critic() -> None:
    case = load_case("bi_discriminator")
    student, critic = GoldenVelocity(), GoldenVelocity("weights_fake")
    with torch.no_grad():
        samples = roll(student, case["draw/init_noise"], 4, 1)
    timestep = TIMESTEPS * shift_sigma(case["draw/u_logit_normal"], 5.0)
    torch.testing.assert_close(timestep, case["out/timesteps"][:, 0], rtol=1e-6, atol=1e-4)
    loss = critic_loss(of_two(critic), samples, case["draw/noise"], timestep, ROWS).mean()
    assert float(loss.detach()) == pytest.approx(float(case["out/loss"]), rel=1e-5)
    loss.backward()
    # In the published network the one embedder serves both times: its gradient is the sum of ours.
    gradients = {name: weight.grad for name, weight in critic.network.named_parameters()}
    for name in [name for name in gradients if "delta_embedder" in name]:
        gradients[name.replace("delta", "time")] += gradients.pop(name)
    norm = sum(gradient.double().square().sum() for gradient in gradients.values()).sqrt()
    assert float(norm) == pytest.approx(float(case["out/grad_norm"]), rel=1e-5)
    for name in (key.removeprefix("grad/") for key in case if key.startswith("grad/")):
        assert relative_error(gradients[name], case[f"grad/{name}"]) < 1e-4
