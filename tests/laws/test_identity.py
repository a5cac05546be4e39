"""The objective on exact maps: nothing is left to learn; and a wrong sign anywhere is noticed."""

from __future__ import annotations

import inspect
import sys
import types
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow.flowmap import objective as shipped

from .exact import EXACT, GAUSSIAN, GUIDED, Gaussian, Mixture, draw, pair_through

COUNT = 12
TEXT = torch.arange(COUNT)
DROPPED = TEXT + COUNT


def unguided_gap(module: types.ModuleType, flow: Gaussian | Mixture, **options: Any) -> float:
    """The largest difference of target and prediction for the exact map, guidance off."""
    z, t, r = draw(flow, COUNT)
    clean, noise = pair_through(z, flow.velocity(z, t / 1000), t)
    found = module.flow_map_loss(
        module.FlowMapObjective(guidance_scale=1.0, **options),
        lambda z, t, r, rows: flow.mean_velocity(z, t, r),
        clean,
        noise,
        t,
        r,
        TEXT,
    )
    return gap(found)


def guided_gap(module: types.ModuleType, is_dropped: bool, **options: Any) -> float:
    """The same for the exact guided map, whose data velocity is the text's own."""
    flow = GUIDED.negative if is_dropped else GUIDED.text
    z, t, r = draw(flow, COUNT)
    clean, noise = pair_through(z, flow.velocity(z, t / 1000), t)

    def velocity(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        guided, negative = GUIDED.mean_velocity(z, t, r), GUIDED.negative.mean_velocity(z, t, r)
        return torch.where((rows >= COUNT)[:, None], negative, guided)

    setting = module.FlowMapObjective(guidance_scale=GUIDED.scale, **options)
    rows = DROPPED if is_dropped else TEXT
    return gap(module.flow_map_loss(setting, velocity, clean, noise, t, r, rows))


def gap(found: shipped.FlowMapLoss) -> float:
    assert found.per_sample.isfinite().all() and found.is_diffusion.sum() == COUNT / 3
    return (found.prediction - found.target).abs().max().item()


WAYS: list[dict[str, Any]] = [{"derivative": "jvp"}, {"derivative": "central", "delta": 0.1}]


@pytest.mark.parametrize("options", WAYS, ids=["jvp", "central"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_map_has_nothing_to_learn(name: str, options: dict[str, Any]) -> None:
    """Target equals prediction: to the solver's accuracy with jvp, to O(delta^2) with the central difference."""
    assert unguided_gap(shipped, EXACT[name], **options) < (1e-6 if options["derivative"] == "jvp" else 1e-5)


def test_the_difference_is_central() -> None:
    """Halving delta divides the error by four."""
    wide, narrow = (unguided_gap(shipped, GAUSSIAN, delta=delta) for delta in (4.0, 2.0))
    assert wide / narrow == pytest.approx(4, rel=0.1)


def test_flow_matching_of_the_exact_velocity_is_zero() -> None:
    z, t, _ = draw(GAUSSIAN, COUNT)
    clean, noise = pair_through(z, GAUSSIAN.velocity(z, t / 1000), t)
    loss = shipped.flow_matching_loss(
        lambda z, t, r, rows: GAUSSIAN.mean_velocity(z, t, r), clean, noise, t, torch.arange(COUNT)
    )
    assert loss.shape == (COUNT,) and loss.max() < 1e-20


def test_target_is_right_on_average_over_the_data() -> None:
    """For data velocities V + d and V - d through the same z, the mean target is the exact mean velocity.

    The Gaussian's map is affine in z, so the derivative is linear in the tangent and the two halves cancel.
    """
    z, t, r = draw(GAUSSIAN, COUNT)
    exact = GAUSSIAN.mean_velocity(z, t, r)
    aside = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    setting = shipped.FlowMapObjective(guidance_scale=1.0, derivative="jvp")
    targets = []
    for sign in (1, -1):
        clean, noise = pair_through(z, GAUSSIAN.velocity(z, t / 1000) + sign * aside, t)
        found = shipped.flow_map_loss(
            setting, lambda z, t, r, rows: GAUSSIAN.mean_velocity(z, t, r), clean, noise, t, r, TEXT
        )
        torch.testing.assert_close(found.prediction, exact)
        targets.append(found.target)
    assert (targets[0] - exact).abs().max() > 0.1
    torch.testing.assert_close((targets[0] + targets[1]) / 2, exact)


@pytest.mark.parametrize("options", WAYS, ids=["jvp", "central"])
@pytest.mark.parametrize("is_dropped", [False, True], ids=["text", "dropped"])
def test_guided_tangent_solves_the_guided_map(is_dropped: bool, options: dict[str, Any]) -> None:
    """With the guided tangent the exact guided map (text) and the exact unguided map (dropped) are the solution."""
    assert guided_gap(shipped, is_dropped, guided_tangent=True, **options) < 1e-4


@pytest.mark.parametrize("is_dropped", [False, True], ids=["text", "dropped"])
def test_released_tangent_does_not(is_dropped: bool) -> None:
    """The released order leaves a gap there: the reason for the option."""
    assert guided_gap(shipped, is_dropped, guided_tangent=False, derivative="jvp") > 0.05


def test_both_tangents_agree_without_guidance() -> None:
    for tangent in (False, True):
        assert unguided_gap(shipped, GAUSSIAN, guided_tangent=tangent, derivative="jvp") < 1e-8


def test_the_unharmed_source_keeps_the_laws() -> None:
    assert keeps_the_laws(inspect.getsource(shipped))


MUTATIONS = {
    "target: sign of the derivative": ("(batch.v - like_latents", "(batch.v + like_latents"),
    "target: interval reversed": ("like_latents(batch.t - batch.r, total)", "like_latents(batch.r - batch.t, total)"),
    "target: no derivative": ("total[moving] = derivative", "total[moving] = 0 * derivative"),
    "velocity reversed": ("v=at_least_float32(noise) - at_least_float32(clean)", "v=clean - noise"),
    "difference reversed": ("(ahead - behind)", "(behind - ahead)"),
    "difference halved": ("(2 * objective.delta)", "objective.delta"),
    "z moves backwards": ("(z + move, t + later, r, rows), (z - move,", "(z - move, t + later, r, rows), (z + move,"),
    "t moves backwards": ("t + later, r, rows), (z - move, t - later", "t - later, r, rows), (z - move, t + later"),
    "t does not move": ("batch.time_direction(index) * objective.delta", "batch.time_direction(index) * 0"),
    "z does not move": ("(objective.delta / TIMESTEPS)", "(0 / TIMESTEPS)"),
    "z moves 1000 times too far": ("(objective.delta / TIMESTEPS)", "objective.delta"),
    "jvp: z moves backwards": ("(_tangent(objective", "(-_tangent(objective"),
    "jvp: tangent in the wrong unit": ("index) / TIMESTEPS, batch.time", "index), batch.time"),
    "fusion: sign of the unconditional part": ("(answer - (1 - scale)", "(answer + (1 - scale)"),
    "fusion: not divided": ("* unconditional) / scale", "* unconditional)"),
    "guided tangent: sign": ("tangent + (1 - scale)", "tangent - (1 - scale)"),
    "guided tangent: unconditional jump, not velocity": ("self.t if objective.guided_tangent else self.r", "self.r"),
    "derivative not divided by the scale": ("derivative / scale[moving]", "derivative"),
    "dropped texts guided": ("scale.masked_fill(is_dropped, 1.0)", "scale"),
    "intervals mistaken for diffusion": ("else t != r", "else t == r"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_sign_anywhere_is_noticed(name: str) -> None:
    """The laws above, on the objective's source with one thing wrong, must break."""
    right, wrong = MUTATIONS[name]
    source = inspect.getsource(shipped)
    assert right in source, "the mutation no longer applies: bring it up to date with objective.py"
    assert not keeps_the_laws(source.replace(right, wrong))


def keeps_the_laws(source: str) -> bool:
    """Whether a source text of objective.py runs and leaves no gap in any law; stops at the first that it breaks."""
    module = types.ModuleType("objective_under_test")
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    try:
        exec(compile(source, module.__name__, "exec"), module.__dict__)
        unguided = (unguided_gap(module, GAUSSIAN, **options) for options in WAYS)
        guided = (
            guided_gap(module, dropped, guided_tangent=True, **options) for dropped in (False, True) for options in WAYS
        )
        return all(gap < 1e-3 for gap in chain(unguided, guided))
    except (AssertionError, RuntimeError):
        return False
    finally:
        del sys.modules[module.__name__]
