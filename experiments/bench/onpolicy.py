"""An on-policy step by backward simulation against the same step by whole rollouts; three roles on one base.

``step``: the student's turn and the critic's, the samples made in at most three jumps, or by all steps of the sampler
with the graph kept. ``weights``: what three roles hold in memory as adapters on one base, and as three networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers import AnyFlowTransformer3DModel
from torch import Tensor

from anyflow.backbone.bidirectional import BidirectionalBackbone
from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.embedded import SHIFT, transformer_config
from anyflow.backbone.layout import PUBLISHED
from anyflow.backbone.load import new_backbone
from anyflow.backbone.lora import LoraSettings, add_lora
from anyflow.backbone.roles import AdapterRoles, Roles, bind
from anyflow.flowmap.intervals import draw_intervals
from anyflow.flowmap.matching import critic_loss, matching_gradient, matching_loss, matching_timestep
from anyflow.flowmap.objective import FlowMapObjective, flow_map_loss
from anyflow.flowmap.rollout import BackwardSimulation
from anyflow.flowmap.sampling import follow
from anyflow.flowmap.schedule import inference_timesteps, logit_normal_timestep
from experiments.bench.compare import compare, gains

BUDGET = 16
"""Steps of the sampler that is simulated."""


def onpolicy_benchmark(
    *, batch_size: int = 8, size: tuple[int, int, int] = (5, 8, 12), repeats: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Seconds and memory of one on-policy step of the embedded network, with adapters on one base, both ways.

    Returns:
        Per way ``seconds`` (median) and ``peak_bytes``; ``speedup`` and ``memory_ratio`` of backward simulation.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = _ways(batch_size, size, seed, device)
    costs = compare(ways, repeats, device)
    simulated, whole = ways
    return {
        "ways": costs,
        **gains(costs[simulated], costs[whole]),
        "batch_size": batch_size,
        "device": device,
    }


def _ways(batch_size: int, size: tuple[int, int, int], seed: int, device: str) -> dict[str, Callable[[], None]]:
    """The two steps, at the same weights and draws."""
    backbone = new_backbone(transformer_config(), seed)
    add_lora(backbone, LoraSettings(32, 32.0))
    backbone.to(device)
    roles = AdapterRoles(backbone, LoraSettings(32, 32.0))
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = size
    shape = (batch_size, frames, backbone.transformer.config.in_channels, height, width)
    text = Text(torch.randn(batch_size + 1, 24, backbone.transformer.config.text_dim, generator=generator), None, 24)
    latents = torch.randn(5, *shape, generator=generator).to(device)
    plan = BackwardSimulation(BUDGET, BUDGET // 2, SHIFT)
    schedule = inference_timesteps(BUDGET, SHIFT).tolist()
    ends = list(pairwise(schedule))

    def way(jumps: list[tuple[float, float]]) -> Callable[[], None]:
        return lambda: _step(roles, Conditions(text.to(device)), latents, jumps)

    return {"backward simulation": way(plan.jumps), f"all {BUDGET} steps": way(ends)}


def _step(roles: Roles, conditions: Conditions, latents: Tensor, jumps: list[tuple[float, float]]) -> None:
    """Student's turn and critic's turn, with gradients and without optimisers."""
    clean, start, noise, other_start, critic_noise = latents
    rows = torch.arange(len(clean), device=clean.device)
    uniforms = torch.linspace(0.05, 0.95, len(clean), device=clean.device)
    student, critic, teacher = (
        bind(partial(roles, role), lambda rows: conditions.select(rows.clamp(max=len(clean))))
        for role in ("student", "critic", "teacher")  # type: ignore[arg-type]
    )

    samples = follow(lambda z, t, r: student(z, t, r, rows), start, jumps)
    timestep = matching_timestep(uniforms, SHIFT)
    found = matching_gradient(critic, teacher, samples, noise, timestep, rows)
    matching_loss(samples, found.gradient).mean().backward()
    drawn = draw_intervals(torch.stack([uniforms, 1 - uniforms], dim=1), shift=SHIFT)
    data = flow_map_loss(FlowMapObjective(shift=SHIFT), student, clean, noise, drawn.timestep, drawn.r_timestep, rows)
    data.per_sample.mean().backward()

    with torch.no_grad():
        samples = follow(lambda z, t, r: student(z, t, r, rows), other_start, jumps)
    timestep = logit_normal_timestep(torch.special.ndtri(uniforms), SHIFT)
    critic_loss(critic, samples, critic_noise, timestep, rows).mean().backward()
    roles.student.zero_grad(set_to_none=True)


def role_weights(ranks: Sequence[int] = (32, 256)) -> list[dict[str, Any]]:
    """Bytes of weights that student, critic and teacher hold: adapters on one base, and three networks.

    The embedded network is built, in float32, at the first rank. The published ones are known by their shapes: a
    bfloat16 base with float32 adapters, at every rank (the released one is 256), against three bfloat16 networks.
    """
    found = [_held("tiny", new_backbone(transformer_config(), 0), ranks[0])]
    for size in ("1.3b", "14b"):
        for rank in ranks:
            with torch.device("meta"):
                transformer = AnyFlowTransformer3DModel(**PUBLISHED[size]).to(torch.bfloat16)
            found.append(_held(f"wan2.1-t2v-{size}", BidirectionalBackbone(transformer), rank))
    return found


def _held(name: str, backbone: BidirectionalBackbone, rank: int) -> dict[str, Any]:
    copies = 3 * sum(weight.numel() * weight.element_size() for weight in backbone.parameters())
    settings = LoraSettings(rank, float(rank))
    add_lora(backbone, settings)
    shared = AdapterRoles(backbone, settings).weight_bytes
    facts = {"one_base_bytes": shared, "three_copies_bytes": copies, "ratio": shared / copies}
    return {"network": name, "rank": rank, **facts}
