"""The mathematics of any-step generation: pure tensor functions and frozen dataclasses over torch alone.

Conventions, the same in every file:

=================  ==================================================================================================
``clean``          clean normalised latents ``[B, F, C, H, W]``, frames before channels
``noise``          standard normal, same shape
``sigma``          time in [0, 1]: 0 is data, 1 is noise
``timestep``, t    ``1000 * sigma``, the networks' unit: ``[B]``, or ``[B, F]`` where frames differ; float32 or better
``r_timestep``, r  where a jump lands, ``r <= t``, same unit and shape
``z``              ``(1 - sigma) * clean + sigma * noise``, the linear path
``v``              ``noise - clean``, its velocity
``u(z, t, r)``     the network: the mean velocity between t and r; ``u(z, t, t)`` is the instantaneous velocity
flow map           ``z_r = z_t - (sigma_t - sigma_r) * u(z_t, t, r)``
shift, s           ``sigma -> s * sigma / (1 + (s - 1) * sigma)``, applied to every drawn or scheduled sigma
``rows``           whose text each row of a call carries: 0..B-1 the batch's, B the negative prompt
=================  ==================================================================================================

The identity behind training: for the exact map, ``u = v - (t - r) * du/dt``, the total derivative taken along the
path. Random draws and statistics over ranks come in as arguments; losses go out per sample, unreduced. Arithmetic is
float32 or better whatever the network's precision.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "chunks": "ChunkLayout Lesson draw_layout layout_of partition_frames teach",
    "endpoint": "Renoise consistency_loss guided_velocity normalised",
    "intervals": "Intervals IntervalShares draw_intervals keep_first_frame",
    "matching": "MatchingGradient critic_loss matching_gradient matching_loss matching_timestep",
    "objective": "FlowMapLoss FlowMapObjective Velocity diffusion_statistics flow_map_loss flow_matching_loss "
    "plain_flow_map_loss rebalance",
    "rollout": "DEFAULT_BUDGETS RELEASED_BUDGETS BackwardSimulation RenoisingSimulation draw_simulation",
    "sampling": "BoundVelocity SamplerKind follow follow_chunks guide sample take_jump take_velocity",
    "schedule": "TIMESTEPS WeightKind inference_timesteps interpolate logit_normal_timestep shift_sigma step "
    "train_weight weight_table",
}
"""Where names come from; torch is imported with the first of them, so that options alone cost nothing."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
