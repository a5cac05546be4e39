"""The memory of a training step without the devices: the real network, wrapped as in training, on fake tensors.

Fake tensors have shapes and no storage, and the "fake" process group plays any number of ranks. Every operation of the
step is dispatched as it would be, with FSDP2 gathering and freeing, checkpointed blocks run twice, and optimisers that
have their state; what is alive is summed. The peak of each phase (a pass without gradient, forward, backward, update)
grows exactly linearly in the layers, so two small depths are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from anyflow.backbone.conditions import Conditions
from anyflow.backbone.context import join_context
from anyflow.backbone.controls import MODULE as CONTROLS
from anyflow.backbone.controls import ControlSettings, add_controls
from anyflow.backbone.layout import check_heads
from anyflow.backbone.load import backbone_class, weight_precision, wrap
from anyflow.backbone.lora import add_lora
from anyflow.backbone.parallelize import checkpoint_activations, device_mesh, load_parts, parallelize
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.quantized import check_quantizer, quantize_base
from anyflow.backbone.roles import AdapterRoles, Role, Roles, SeparateRoles
from anyflow.memory.codec import rows_of_curve
from anyflow.memory.peak import Peak, fake_ranks, local_part
from anyflow.memory.phases import Memory
from anyflow.memory.turns import sample_once, turns
from anyflow.recipe import Recipe
from anyflow.training.assemble import frozen_dtype, lora_settings, parallel_settings, roles_kind, weights_dtype
from anyflow.training.controls import asked_controls

DEPTHS = (4, 6)
"""Layers that are simulated, enough for blocks to be gathered ahead; a network of no more than the second is simulated
whole."""


def simulate(recipe: Recipe, config: dict[str, Any], latents: tuple[int, int, int, int]) -> Memory:
    """The peak of one training step of a recipe on one of its ranks, and of sampling.

    Args:
        recipe: its hardware says how many ranks, and how they share.
        config: the transformer's.
        latents: ``(F, C, H, W)`` of a clip.
    """
    check_quantizer(recipe.model.lora.base)
    depth = int(config["num_layers"])
    depths = DEPTHS if depth > DEPTHS[1] else (depth,)
    low, *rest = (_simulate(recipe, {**config, "num_layers": layers}, latents) for layers in depths)
    high = rest[0] if rest else low
    steps = (depth - depths[0]) / (depths[-1] - depths[0]) if rest else 0.0
    grown = {name: value + (high.sizes[name] - value) * steps for name, value in low.sizes.items()}
    peak = max(a + (b - a) * steps for a, b in zip(low.peaks, high.peaks, strict=True))
    return Memory(
        **grown,
        activations=max(0.0, peak - sum(grown.values())),
        sampling=low.sampling + (high.sampling - low.sampling) * steps,
        student=low.student + (high.student - low.student) * steps,
        largest=high.largest,
        rows=high.rows,
        exchanged=low.exchanged + (high.exchanged - low.exchanged) * steps,
    )


@dataclass(frozen=True)
class _Run:
    """What a simulated depth gave: sizes of what lies there, the peak of each part of a step, what sampling took, and
    what was sent to the ranks that share clips."""

    sizes: dict[str, float]
    peaks: list[float]
    sampling: float
    student: float
    largest: float
    rows: int
    exchanged: float


def _simulate(recipe: Recipe, config: dict[str, Any], latents: tuple[int, int, int, int]) -> _Run:
    sharded, context = recipe.hardware.strategy == "fsdp" and recipe.world_size > 1, recipe.hardware.context
    check_heads(context, config["num_attention_heads"])
    roles = _networks(recipe, config)
    roles.student.fit_clip(latents[0])
    with fake_ranks(recipe.world_size if sharded or context > 1 else 1):
        nodes = recipe.hardware.num_nodes if recipe.hardware.shard_within == "node" else 1
        mesh = device_mesh("cpu", nodes) if sharded else None
        with FakeTensorMode():
            for network in roles.networks:
                network.context = join_context(context)
                dtype = frozen_dtype(recipe) if network is roles.frozen else weights_dtype(recipe)
                _materialise(recipe, network, dtype, mesh)
            return _measure(recipe, roles, latents, sharded)


def _measure(recipe: Recipe, roles: Roles, latents: tuple[int, int, int, int], sharded: bool) -> _Run:
    """Run a step with everything in place; both roles' turns in on-policy distillation."""
    trained: dict[Role, list[nn.Parameter]] = {"student": [p for _, p in roles.parameters("student")]}
    if recipe.has_critic:
        trained["critic"] = [p for _, p in roles.parameters("critic")]
    if recipe.has_tail:
        trained["teacher"] = [p for _, p in roles.parameters("teacher")]
    optimizers = {role: _optimizer(weights) for role, weights in trained.items()}
    average = [weight.detach().clone() for weight in trained["student"]] if recipe.ema.decay > 0 else []
    weights = {id(w): w for network in roles.networks for w in network.parameters()}
    everything = [weight for group in trained.values() for weight in group]
    if recipe.hardware.accumulate > 1:
        for weight in everything:
            weight.grad = torch.zeros_like(weight)
    # plain ddp sums gradients in buckets of its own
    buckets = [torch.empty_like(w) for w in everything] if recipe.world_size > 1 and not sharded else []
    waiting = [weight.grad for weight in everything if weight.grad is not None] + buckets
    sizes: dict[str, float] = {
        "weights": _bytes(weights.values()),
        "gradients": _bytes(waiting),
        "optimizer": 2 * _bytes(everything),
        "ema": _bytes(average),
    }
    mixed = recipe.hardware.precision != "32-true" and not sharded
    tracker = Peak()
    for tensor in (*weights.values(), *average, *waiting, *(t for o in optimizers.values() for t in _state(o))):
        tracker.count(tensor)
    precision = partial(torch.autocast, "cpu", torch.bfloat16, enabled=mixed)
    with tracker, precision():
        for role, turn in turns(recipe, roles, latents, tracker.next_phase).items():
            turn()
            tracker.next_phase()
            nn.utils.get_total_norm([weight.grad for weight in trained[role] if weight.grad is not None])
            optimizers[role].step()
            optimizers[role].zero_grad()
            tracker.next_phase()
    sent = tracker.exchanged * (1 - 1 / recipe.hardware.context) * recipe.hardware.accumulate
    tracker.peak = lying = tracker.live
    rows = rows_of_curve(recipe, roles.student.clips_at_once(latents))
    if recipe.sampling.prompts:
        with tracker, precision():
            sample_once(recipe, roles, latents, rows)
    own = list(roles.student.parameters())
    largest = max(weight.numel() * weight.element_size() for weight in own)
    return _Run(sizes, tracker.peaks, tracker.peak - lying, _bytes(own), largest, rows, sent)


def _networks(recipe: Recipe, config: dict[str, Any]) -> Roles:
    """The recipe's networks on ``meta``, with adapters and roles as in training."""

    _, kind = backbone_class(recipe.model.architecture)
    learnt = ControlSettings.of(config)
    controls = asked_controls(recipe, 4, learnt) or learnt

    def build() -> FlowMapBackbone:
        transformer: Any = kind.from_config(config)  # type: ignore[attr-defined]
        gate = torch.tensor([0.25], device="cpu")
        transformer.condition_embedder.register_buffer("delta_emb_gate", gate, persistent=False)
        if controls is not None:
            add_controls(transformer, controls)
        backbone = wrap(transformer)
        if recipe.hardware.gradient_checkpointing:
            checkpoint_activations(backbone, recipe.hardware.keep_attention)
        return backbone

    which = roles_kind(recipe)
    with torch.device("meta"):
        student = build()
        if recipe.model.lora.enabled:
            add_lora(student, lora_settings(recipe, student))
            if recipe.stage.onpolicy.teacher and recipe.declared.teacher == "given":
                # an adapter of the teacher stage: as wide, without the time embedders, which that stage leaves alone
                blocks_alone = [target for target in recipe.model.lora.targets if "_embedder" not in target]
                told = tuple(name for name in lora_settings(recipe, student).full if name == CONTROLS)
                settings = replace(lora_settings(recipe, student), targets=blocks_alone, full=told)
                add_lora(student, settings, adapter="teacher")
            if recipe.has_teacher:
                return AdapterRoles(student, lora_settings(recipe, student), **which)
        if recipe.has_teacher:
            return SeparateRoles(student, build(), **which)
        return _Alone(student)


class _Alone(Roles):
    """One network, for the stages without roles."""

    def __call__(
        self, role: Role, latents: Tensor, timestep: Tensor, r_timestep: Tensor, conditions: Conditions, **view: Any
    ) -> Tensor:
        return self.student(latents, timestep, r_timestep, conditions, **view)

    def parameters(self, role: Role) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.student.named_parameters() if weight.requires_grad]


class _BlankWeights:
    """Stands for the files: parts of the right shape and precision, without contents."""

    def __init__(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        self._shapes = {name: weight.shape for name, weight in transformer.named_parameters()}
        self._dtype = dtype

    def read(self, name: str, window: tuple[slice, ...] = ()) -> Tensor:
        shape = [part.stop - part.start for part in window] if window else self._shapes[name]
        return torch.empty(shape, dtype=weight_precision(name, self._dtype))


def _materialise(recipe: Recipe, network: FlowMapBackbone, dtype: torch.dtype, mesh: Any) -> None:
    for module in network.modules():  # built on meta outside of the fake mode, which takes its own tensors alone
        for name, weight in module.named_parameters(recurse=False):
            blank = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            setattr(module, name, nn.Parameter(blank, weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
    network.stored, network.residual = _BlankWeights(network.transformer, dtype), recipe.hardware.residual
    if mesh is not None:
        parallelize(network, parallel_settings(recipe, compiled=False), torch.device("cpu"), mesh)
    elif recipe.model.lora.base != "full":
        quantize_base(network, recipe.model.lora.base, torch.device("cpu"))
    else:
        load_parts(network, torch.device("cpu"))


def _optimizer(weights: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with its state in place, as it is after the first step."""
    optimizer = torch.optim.AdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for fields in optimizer.state.values():
        yield from (value for value in fields.values() if isinstance(value, Tensor) and value.ndim)


def _bytes(tensors: Any) -> int:
    return sum(local_part(tensor).numel() * tensor.element_size() for tensor in tensors)
