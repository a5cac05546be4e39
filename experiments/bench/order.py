"""What a training step asks for, in the plain order of work and as the stages do it: FLOPs, passes, bytes, seconds.

The plain order is the published one: every pass for every sample, one after another; prompts padded to 512 tokens, all
of which are attended to; times embedded for every frame, and modulations for every token; chunks of a causal network
under a mask over the whole sequence. Both ways have the same weights and draws, and their losses agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import mean
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from anyflow.backbone.causal import CausalBackbone
from anyflow.backbone.codec import MAX_TEXT_TOKENS
from anyflow.backbone.conditions import Text
from anyflow.flowmap.objective import plain_flow_map_loss
from anyflow.recipe import load_recipe
from anyflow.stages import forward
from anyflow.stages.batch import Batches, FlowBatch
from anyflow.training.assemble import build_stage, load_networks
from experiments.bench.compare import gains, peak_bytes

STAGES = {
    "forward": ("forward/tiny", "tiny", 16),
    "on-policy": ("onpolicy/tiny", "tiny", 8),
    "forward, causal": ("forward/tiny-causal", "tiny-causal", 16),
    "on-policy, causal": ("onpolicy/tiny", "tiny-causal", 8),
}
"""Recipe, embedded model and clips of each step that is compared."""

SIZE = (5, 16, 8, 12)
"""Frames, channels, rows and columns of a clip's latents: 17 x 64 x 96 pixels."""


def order_benchmark(repeats: int = 3) -> dict[str, Any]:
    """Each stage's step both ways, at the published guidance of 3.

    Returns:
        By stage: per way the means over its steps of ``flops``, ``passes`` (clips that the networks are asked about, a
        step), ``seconds`` and the largest ``peak_bytes``; the largest relative ``loss_difference``; the gains.
    """
    return {name: _compare(*terms, repeats) for name, terms in STAGES.items()}


def _compare(recipe: str, model: str, clips: int, repeats: int) -> dict[str, Any]:
    orders: dict[str, Callable[[], Any]] = {"plain": plain_order, "anyflow": nullcontext}
    steps = {way: _stepper(recipe, model, clips, order) for way, order in orders.items()}
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in steps}
    for _ in range(repeats + 1):
        for way, step in steps.items():
            seen[way].append(step(counted=not seen[way]))
    counted = {way: found[0] for way, found in seen.items()}
    differences = [
        abs(one["loss"] - other["loss"]) / abs(other["loss"]) for one, other in zip(*seen.values(), strict=True)
    ]
    ways = {
        way: {
            **{name: counted[way][name] for name in ("flops", "passes", "peak_bytes")},
            "seconds": mean(found["seconds"] for found in seen[way][1:]),
        }
        for way in steps
    }
    return {
        "ways": ways,
        "loss_difference": max(differences),
        **gains(ways["anyflow"], ways["plain"]),
        "flop_ratio": ways["plain"]["flops"] / ways["anyflow"]["flops"],
        "batch_size": clips,
    }


def _stepper(recipe: str, model: str, clips: int, order: Callable[[], Any]) -> Callable[..., dict[str, float]]:
    """Takes one whole step after the other (both turns of an on-policy one), without moving a weight."""
    stage = _stage(recipe, model)
    latents = torch.randn(clips, *SIZE, generator=torch.Generator().manual_seed(0))
    batch = {"latents": latents, "caption": [f"A green car drives on a road, {i}." for i in range(clips)]}
    passes = 0

    def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal passes
        passes += len(inputs[0])

    for network in [stage.backbone] if stage.roles is None else stage.roles.networks:
        network.register_forward_pre_hook(count)

    def turns() -> float:
        loss = 0.0
        for turn in range(1 if stage.roles is None else 2):
            stage.turn = turn
            stage.begin_pass()
            answer = stage.training_step(batch, 0)
            if stage.automatic_optimization:
                answer.backward()
            loss += float(answer.detach())
            stage.zero_grad(set_to_none=True)
        return loss

    def step(counted: bool) -> dict[str, float]:
        nonlocal passes
        with order():
            if not counted:
                started = time.perf_counter()
                return {"loss": turns(), "seconds": time.perf_counter() - started}
            passes, flops = 0, FlopCounterMode(display=False, custom_mapping=_ON_CPU)
            found: dict[str, float] = {}
            with flops:
                position = stage.update.position
                found["loss"] = turns()
                found |= {"flops": float(flops.get_total_flops()), "passes": float(passes)}
            stage.update.go_on_from(position)
            return {**found, "peak_bytes": float(peak_bytes(turns, "cpu"))}

    return step


def _stage(recipe: str, model: str) -> Any:
    """A recipe's stage on an embedded model, outside of a Trainer; its weights stay."""
    folder = f"data/models/{model}"
    changes = [f"model.weights={folder}", f"stage.onpolicy.teacher={folder}", "stage.guidance_scale=3"]
    options = load_recipe(recipe, model=model, overrides=[*changes, "stage.onpolicy.budgets=[16]"])
    codec, backbone = load_networks(options)
    stage: Any = build_stage(options, codec, backbone)
    stage.report = stage.end_turn = lambda *_, **__: None
    stage.manual_backward = lambda loss, **more: loss.backward(**more)
    return stage


@contextmanager
def plain_order() -> Iterator[None]:
    """Within the block the stages work in the published order."""
    velocity, prepare, attend = FlowBatch.velocity, Batches.prepare, CausalBackbone._chunks_at_once

    def each_frame(self: FlowBatch, ask: Any, layout: Any = None) -> Any:
        asked = velocity(self, ask, layout)

        def spread(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
            t, r = (time[:, None].expand(-1, z.shape[1]) if time.ndim == 1 else time for time in (t, r))
            return asked(z, t, r, rows)

        return spread

    def padded(self: Batches, *arguments: Any, **options: Any) -> FlowBatch:
        found = prepare(self, *arguments, **options)
        missing = MAX_TEXT_TOKENS - found.text.embeddings.shape[1]
        text = Text(F.pad(found.text.embeddings, (0, 0, 0, missing)), None, MAX_TEXT_TOKENS)
        object.__setattr__(found, "text", text)
        return found

    def masked(self: CausalBackbone, *arguments: Any) -> Tensor:
        with mock.patch.object(self, "attention", "dense"):
            return attend(self, *arguments)

    def loss(*arguments: Any, same_calls: bool = False, **options: Any) -> Any:
        return plain_flow_map_loss(*arguments, **options)

    with (
        mock.patch.object(forward, "flow_map_loss", loss),
        mock.patch.object(FlowBatch, "velocity", each_frame),
        mock.patch.object(Batches, "prepare", padded),
        mock.patch.object(CausalBackbone, "_chunks_at_once", masked),
    ):
        yield


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def told(result: dict[str, Any]) -> list[str]:
    """The figure in words."""
    lines = ["a step in the plain order of work and as it is (one of the embedded networks):"]
    for name, found in result.items():
        faster, smaller = f"{found['speedup']:.2f}", f"1/{found['memory_ratio']:.2f}"
        lines.append(
            f"  {name} ({found['batch_size']} clips): {faster} times as fast, 1/{found['flop_ratio']:.2f} of the FLOPs "
            f"in {smaller} of the memory; losses within {found['loss_difference']:.0e}"
        )
        for way, cost in found["ways"].items():
            lines.append(
                f"    {way:<8} {cost['flops'] / 1e9:8.1f} GFLOP  {cost['passes']:4.0f} passes  "
                f"{cost['peak_bytes'] / 1e6:7.1f} MB  {cost['seconds']:6.2f} s"
            )
    return lines
