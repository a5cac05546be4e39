"""The options of the mathematics: fields of a recipe's stage, and of what takes them."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow.system.option import option as _option


@dataclass(frozen=True)
class ObjectiveOptions:
    """Of :class:`anyflow.flowmap.objective.FlowMapObjective`; the defaults are the released recipe."""

    guidance_scale: float = _option(3.0, "guidance fused into the weights; the result samples at scale 1", low=1)
    guided_tangent: bool = _option(
        False,
        "move the finite difference along the guided velocity: no difference was found (docs/forward.md)",
    )
    derivative: str = _option(
        "central",
        "total derivative by central difference, or exact by jvp (slower, more memory)",
        choices=("central", "jvp"),
    )
    delta: float = _option(5.0, "half width of the central difference, in timestep units of 1000", above=0, high=100)
    weight: str = _option("beta08", "weight of the loss over timesteps", choices=("beta08", "gaussian", "uniform"))
    rebalance: bool = _option(True, "scale flow-map losses to the diffusion loss; off, jumps crowd out the velocity")


@dataclass(frozen=True)
class ShareOptions:
    """How a step's samples are divided: the rest of them has a free r."""

    diffusion_share: float = _option(
        0.5, "share of the global batch with r = t (instantaneous velocity)", low=0, high=1
    )
    consistency_share: float = _option(
        0.25, "share of the global batch with r = 0 (one jump to the data)", low=0, high=1
    )
