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

from anyflow.flowmap.chunks import ChunkLayout, Lesson, draw_layout, layout_of, partition_frames, teach
from anyflow.flowmap.endpoint import Renoise, consistency_loss, guided_velocity, normalised
from anyflow.flowmap.intervals import Intervals, IntervalShares, draw_intervals, keep_first_frame
from anyflow.flowmap.matching import (
    MatchingGradient,
    critic_loss,
    matching_gradient,
    matching_loss,
    matching_timestep,
)
from anyflow.flowmap.objective import (
    FlowMapLoss,
    FlowMapObjective,
    Velocity,
    diffusion_statistics,
    flow_map_loss,
    flow_matching_loss,
    plain_flow_map_loss,
    rebalance,
)
from anyflow.flowmap.rollout import (
    DEFAULT_BUDGETS,
    RELEASED_BUDGETS,
    BackwardSimulation,
    RenoisingSimulation,
    draw_simulation,
)
from anyflow.flowmap.sampling import (
    BoundVelocity,
    SamplerKind,
    follow,
    follow_chunks,
    guide,
    sample,
    take_jump,
    take_velocity,
)
from anyflow.flowmap.schedule import (
    TIMESTEPS,
    WeightKind,
    inference_timesteps,
    interpolate,
    logit_normal_timestep,
    shift_sigma,
    step,
    train_weight,
    weight_table,
)

__all__ = [
    "DEFAULT_BUDGETS",
    "RELEASED_BUDGETS",
    "TIMESTEPS",
    "BackwardSimulation",
    "BoundVelocity",
    "ChunkLayout",
    "FlowMapLoss",
    "FlowMapObjective",
    "IntervalShares",
    "Intervals",
    "Lesson",
    "MatchingGradient",
    "Renoise",
    "RenoisingSimulation",
    "SamplerKind",
    "Velocity",
    "WeightKind",
    "consistency_loss",
    "critic_loss",
    "diffusion_statistics",
    "draw_intervals",
    "draw_layout",
    "draw_simulation",
    "flow_map_loss",
    "flow_matching_loss",
    "follow",
    "follow_chunks",
    "guide",
    "guided_velocity",
    "inference_timesteps",
    "interpolate",
    "keep_first_frame",
    "layout_of",
    "logit_normal_timestep",
    "matching_gradient",
    "matching_loss",
    "matching_timestep",
    "normalised",
    "partition_frames",
    "plain_flow_map_loss",
    "rebalance",
    "sample",
    "shift_sigma",
    "step",
    "take_jump",
    "take_velocity",
    "teach",
    "train_weight",
    "weight_table",
]
