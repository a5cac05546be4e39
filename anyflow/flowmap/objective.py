"""The forward flow-map objective: how a network learns mean velocities from data (sec. 3).

Everything here takes the velocity seam ``u(z, t, r, rows) -> velocity``: ``z [n, F, C, H, W]`` (any ``[n, ...]``
without frame masks), ``t`` and ``r`` timesteps ``[n]`` or ``[n, F]``, ``rows [n]`` int64 telling whose conditions each
row carries: i those of sample i, B + i the same with the negative prompt for its text, as a sample has whose text was
dropped. The network must be deterministic (no dropout): noise between two passes would swamp the finite difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow.flowmap.options import ObjectiveOptions
from anyflow.flowmap.schedule import (
    TIMESTEPS,
    WeightKind,
    at_least_float32,
    interpolate,
    is_positive,
    like_latents,
    train_weight,
)

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Derivative = Literal["central", "jvp"]

Ask = tuple[Tensor, Tensor, Tensor, Tensor]
"""One question to the network: z, t, r and rows."""


@dataclass(frozen=True)
class FlowMapObjective(ObjectiveOptions):
    """The options of the objective; the defaults are the released recipe.

    Attributes:
        guidance_scale: Classifier-free guidance fused into the weights, so that sampling needs one pass a step. 1 turns
            it off and saves the unconditional pass. Higher follows the text more and varies less; must be above 0.
        guided_tangent: False is the released order: the derivative follows the data velocity and is divided by the
            scale, for dropped texts too, so the learnt map is not quite the guided flow's. True follows the guided
            velocity ``g v + (1 - g) u(z, t, t, negative)``, fuses the same instantaneous unconditional velocity, and
            leaves dropped texts unguided: the exact guided map is then the solution. It is better at 1 and 2 steps,
            can be slightly worse at 32, and costs one more (batched, no-gradient) call, since the tangent needs the
            unconditional answer.
        derivative: ``central`` asks the network twice, at t + delta and t - delta. ``jvp`` is exact and has no width to
            choose, but needs forward-mode AD through the network, which only the math attention offers (slower, more
            memory), and it sees the fastest waves of the time embedding (a radian a timestep), which delta smooths.
        delta: Half-width of the central difference in timestep units. Smaller follows curvature better, but the
            difference drowns in the network's rounding; larger smooths it. 5 suits bfloat16 networks.
        weight: Train weight of the time t: see :func:`anyflow.flowmap.schedule.weight_table`.
        shift: Shift of the grid that the weight lives on; the shift that the intervals are drawn with.
        rebalance: Whether the stage scales intervals' losses to the diffusion samples' mean (:func:`rebalance`).
            Without it the long jumps' large losses drown the velocity that they build on, and few-step quality
            collapses.
    """

    shift: float = 5.0

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "delta", "shift"):
            if not is_positive(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name, choices in (("derivative", get_args(Derivative)), ("weight", get_args(WeightKind))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class FlowMapLoss:
    """What one batch gave.

    Attributes:
        per_sample: ``[B]`` float64, weighted, unreduced, before rebalancing; carries the gradient.
        is_diffusion: ``[B]`` bool, samples with t = r in every frame.
        prediction: The network's answer with the guidance taken out, shaped as the latents; carries the gradient.
        target: What it should have been; no gradient.
    """

    per_sample: Tensor
    is_diffusion: Tensor
    prediction: Tensor
    target: Tensor


def flow_map_loss(
    objective: FlowMapObjective,
    velocity: Velocity,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    r_timestep: Tensor,
    rows: Tensor,
    loss_frames: Tensor | None = None,
    *,
    same_calls: bool = False,
) -> FlowMapLoss:
    """Return the weighted flow-map loss of each sample, doing each piece of work once.

    Samples with r = t get no finite difference (its factor t - r is zero); dropped texts get no unconditional pass (the
    conditional one is it); what is left to ask without gradient is asked in ONE call of the network (two with the
    guided tangent or jvp), before the pass with gradient, so that the two do not share the memory peak.

    Args:
        objective: The options.
        velocity: The seam ``u(z, t, r, rows)``.
        clean: Clean normalised latents ``[B, F, C, H, W]``, any precision; all arithmetic here is float32 or better.
        noise: Standard normal, as ``clean``.
        timestep: t, ``[B]`` or ``[B, F]``, in 0..1000.
        r_timestep: r <= t, shaped as ``timestep`` (or ``[B]``).
        rows: ``[B]`` int64: i for sample i's own text, B + i where it was dropped.
        loss_frames: ``[B, F]`` mask of the frames that are trained; the others are given (t = r = 0), stay where they
            are in the finite difference and carry no loss. None: all frames.
        same_calls: Call the network equally often on every rank even where a rank has nothing to ask (one row is asked
            in vain). Needed when the network's forward is a collective (sharded weights); a rank would hang otherwise.
    """
    batch = _pose(objective, clean, noise, timestep, r_timestep, rows, loss_frames)
    moving = torch.nonzero(batch.is_interval).flatten()
    is_fused = objective.guidance_scale != 1
    guided = torch.nonzero(~batch.is_dropped & is_fused).flatten()
    spare = batch.first_row() if same_calls else None
    with torch.no_grad():
        unconditional = torch.zeros_like(batch.z)
        negative = batch.ask_negative(objective, guided)
        if is_fused and (objective.guided_tangent or objective.derivative == "jvp"):
            [unconditional[guided]] = _ask_once(velocity, [negative], spare)
            negative = batch.ask_negative(objective, guided[:0])
        if objective.derivative == "central":
            asks = [*_both_sides(objective, batch, unconditional, moving), negative]
            ahead, behind, answered = _ask_once(velocity, asks, spare)
            derivative = (ahead - behind) / (2 * objective.delta)
            unconditional[guided[: len(answered)]] = answered
        else:
            derivative = _jvp(objective, velocity, batch, unconditional, moving, same_calls)
    [answer] = _ask_once(velocity, [(batch.z, batch.t, batch.r, batch.rows)], None)
    unconditional = torch.where(like_latents(batch.is_dropped, answer), answer.detach(), unconditional)
    scale = like_latents(batch.scale, answer)
    prediction = (answer - (1 - scale) * unconditional) / scale
    total = torch.zeros_like(batch.z)
    total[moving] = derivative / scale[moving]
    target = (batch.v - like_latents(batch.t - batch.r, total) * total).detach()
    return FlowMapLoss(_weighted_error(objective, batch, prediction, target), ~batch.is_interval, prediction, target)


def plain_flow_map_loss(
    objective: FlowMapObjective,
    velocity: Velocity,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    r_timestep: Tensor,
    rows: Tensor,
    loss_frames: Tensor | None = None,
) -> FlowMapLoss:
    """The same loss in the plain order of work: every pass for every sample, one after another.

    The yardstick of the benchmark, and the check that :func:`flow_map_loss` saves work without changing the result.
    Central difference only; the arguments are :func:`flow_map_loss`'s.
    """
    batch = _pose(objective, clean, noise, timestep, r_timestep, rows, loss_frames)
    everyone = torch.arange(len(rows), device=rows.device)
    [answer] = _ask_once(velocity, [(batch.z, batch.t, batch.r, batch.rows)], None)
    with torch.no_grad():
        [unconditional] = _ask_once(velocity, [batch.ask_negative(objective, everyone)], None)
        sides = _both_sides(objective, batch, unconditional, everyone)
        ahead, behind = (_ask_once(velocity, [side], None)[0] for side in sides)
    scale = like_latents(batch.scale, answer)
    prediction = (answer - (1 - scale) * unconditional) / scale
    total = (ahead - behind) / (2 * objective.delta * scale)
    target = (batch.v - like_latents(batch.t - batch.r, total) * total).detach()
    return FlowMapLoss(_weighted_error(objective, batch, prediction, target), ~batch.is_interval, prediction, target)


def flow_matching_loss(
    velocity: Velocity,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    rows: Tensor,
    loss_frames: Tensor | None = None,
) -> Tensor:
    """Return the plain flow-matching losses ``[B]``, unweighted: the mean of ``|u(z, t, t) - v|^2`` (sec. 2)."""
    z = interpolate(clean, noise, timestep)
    answer = at_least_float32(velocity(z, at_least_float32(timestep), at_least_float32(timestep), rows))
    error = (answer - (at_least_float32(noise) - at_least_float32(clean))).square()
    return _mean_over_frames(error, loss_frames)


def rebalance(per_sample: Tensor, is_diffusion: Tensor, diffusion_mean: Tensor | float | None) -> Tensor:
    """Scale the losses ``[B]`` of intervals to the mean diffusion loss of the step's whole batch (sec. 3, step 8).

    Each keeps its gradient's direction and gets the size of ``diffusion_mean``, so no jump's length dominates. The
    mean is over all ranks and passes (:func:`diffusion_statistics`, summed over them); None or NaN means that the batch
    had no diffusion sample: there is nothing to balance against and the losses stay as they are.
    """
    if diffusion_mean is None:
        return per_sample
    mean = torch.as_tensor(diffusion_mean, dtype=per_sample.dtype, device=per_sample.device)
    # The choice is made on the scale: made on the losses, a NaN not chosen would still reach their gradient.
    scale = torch.where(is_diffusion | mean.isnan(), 1.0, mean / (per_sample.detach() + 1e-5))
    return per_sample * scale


def diffusion_statistics(per_sample: Tensor, is_diffusion: Tensor) -> Tensor:
    """Return the sum and the count ``[2]`` of this rank's diffusion losses.

    Summed over ranks, sum / count is the global mean: NaN without any, as :func:`rebalance` expects.
    """
    losses = per_sample.detach() * is_diffusion
    return torch.stack([losses.sum(), is_diffusion.sum().to(losses)])


# The work behind it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """A batch on the path: shapes as in :func:`flow_map_loss`, all float32 or better.

    ``frames`` is the float mask ``[B, F]`` of trained frames or None; ``scale [B]`` is the guidance scale of each
    sample.
    """

    z: Tensor
    v: Tensor
    t: Tensor
    r: Tensor
    rows: Tensor
    frames: Tensor | None
    scale: Tensor
    is_dropped: Tensor
    is_interval: Tensor

    def ask_negative(self, objective: FlowMapObjective, index: Tensor) -> Ask:
        """The unconditional question for some samples: the mean velocity, or the velocity for the guided tangent."""
        r = self.t if objective.guided_tangent else self.r
        return self.z[index], self.t[index], r[index], index + len(self.z)

    def first_row(self) -> Ask:
        """A question of one row, to ask in vain."""
        return self.z[:1], self.t[:1], self.r[:1], self.rows[:1]

    def time_direction(self, index: Tensor) -> Tensor:
        """How each time moves along the path, ``[n]`` or ``[n, F]``: 1, or 0 for given frames."""
        return torch.ones_like(self.t[index]) if self.frames is None else self.frames[index]


def _pose(
    objective: FlowMapObjective,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    r_timestep: Tensor,
    rows: Tensor,
    loss_frames: Tensor | None,
) -> _Batch:
    """Put a batch on the path, in float32 or better."""
    t, r = at_least_float32(timestep), at_least_float32(r_timestep)
    if loss_frames is not None and t.ndim == 1:
        t = t.unsqueeze(1).expand(loss_frames.shape)
    if r.ndim < t.ndim:
        r = r.unsqueeze(1)
    r = r.expand(t.shape)
    is_dropped = rows >= clean.shape[0]
    scale = torch.full(rows.shape, objective.guidance_scale, dtype=t.dtype, device=clean.device)
    if objective.guided_tangent:
        scale = scale.masked_fill(is_dropped, 1.0)
    return _Batch(
        z=interpolate(clean, noise, t),
        v=at_least_float32(noise) - at_least_float32(clean),
        t=t,
        r=r,
        rows=rows,
        frames=None if loss_frames is None else loss_frames.to(t.dtype),
        scale=scale,
        is_dropped=is_dropped,
        is_interval=(t != r).flatten(1).any(dim=1) if t.ndim > 1 else t != r,
    )


def _tangent(objective: FlowMapObjective, batch: _Batch, unconditional: Tensor, index: Tensor) -> Tensor:
    """The velocity along which z moves: the data's or the guided one, ``g v + (1 - g) u``; 0 for given frames."""
    tangent = batch.v[index]
    if objective.guided_tangent:
        scale = like_latents(batch.scale[index], tangent)
        tangent = scale * tangent + (1 - scale) * unconditional[index]
    return tangent * like_latents(batch.time_direction(index), tangent)


def _both_sides(objective: FlowMapObjective, batch: _Batch, unconditional: Tensor, index: Tensor) -> list[Ask]:
    """What to ask for the central difference: the points delta ahead and behind on the path (times not clamped)."""
    move = _tangent(objective, batch, unconditional, index) * (objective.delta / TIMESTEPS)
    later = batch.time_direction(index) * objective.delta
    z, t, r, rows = batch.z[index], batch.t[index], batch.r[index], batch.rows[index]
    return [(z + move, t + later, r, rows), (z - move, t - later, r, rows)]


def _jvp(
    objective: FlowMapObjective,
    velocity: Velocity,
    batch: _Batch,
    unconditional: Tensor,
    index: Tensor,
    same_calls: bool,
) -> Tensor:
    """The total derivative ``du/dt`` along the path of some samples, per timestep unit, by forward-mode AD."""
    if not len(index):
        if not same_calls:
            return batch.z[index]
        # One row is derived in vain, to keep in step with the other ranks.
        return _jvp(objective, velocity, batch, unconditional, index.new_zeros(1), same_calls)[:0]
    r, rows = batch.r[index], batch.rows[index]

    def along(z: Tensor, t: Tensor) -> Tensor:
        return velocity(z, t, r, rows).to(z.dtype)

    tangents = (_tangent(objective, batch, unconditional, index) / TIMESTEPS, batch.time_direction(index))
    with sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no forward-mode derivative
        return torch.func.jvp(along, (batch.z[index], batch.t[index]), tangents)[1]


def _ask_once(velocity: Velocity, asks: list[Ask], spare: Ask | None) -> list[Tensor]:
    """Ask several things in one call of the network; return the answers in the same order.

    Where there is nothing to ask the network is not called, or asked ``spare`` in vain where that is given.
    """
    sizes = [len(ask[0]) for ask in asks]
    if not sum(sizes):
        if spare is not None:
            velocity(*spare)
        return [ask[0] for ask in asks]
    z, t, r, rows = (torch.cat(parts) for parts in zip(*asks, strict=True))
    return list(velocity(z, t, r, rows).to(z.dtype).split(sizes))


def _weighted_error(objective: FlowMapObjective, batch: _Batch, prediction: Tensor, target: Tensor) -> Tensor:
    """The squared error of each sample times its mean train weight, ``[B]`` float64 (sec. 3, step 7)."""
    error = _mean_over_frames((prediction - target).square(), batch.frames)
    weight = train_weight(batch.t, objective.weight, objective.shift)  # type: ignore[arg-type]
    return error * (_mean_over_frames(weight, batch.frames) if weight.ndim > 1 else weight)


def _mean_over_frames(values: Tensor, frames: Tensor | None) -> Tensor:
    """The mean of ``[B, F, ...]`` (or ``[B, ...]``) over everything but the batch, over the masked frames alone."""
    if frames is None:
        return values.flatten(1).mean(dim=1)
    mask = frames.to(values.dtype)
    per_frame = values.flatten(2).mean(dim=2) if values.ndim > 2 else values
    return (per_frame * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
