"""How long a training step takes, by arithmetic: its network passes, what they multiply, and the rate of a GPU.

Counted are matrix products and attention, as they are done: a checkpointed block runs once more in the backward pass,
a frozen layer has no gradient of its own. Left out are communication, optimisers, what moves memory alone, and encoding
(none, where clips are encoded beforehand). ``UTILISATION`` of a GPU's rate is what well-tuned trainings reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from anyflow.recipe import Recipe

if TYPE_CHECKING:
    from anyflow.flowmap.chunks import ChunkLayout

TERAFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 5090": 210, "RTX 4090": 165}
"""Dense bfloat16 products a second, 10^12, by the makers' data sheets."""

UTILISATION = 0.4

BACKWARD_ATTENTION = 2.5
"""Products of attention's backward pass for each of its forward's, the scores worked out anew included."""

USUAL_TEXT = 128
"""Of a prompt with its folded padding: about 90 words."""


@dataclass(frozen=True)
class Pass:
    """Operations of one clip's way through a network.

    Attributes:
        layers: in products with weights.
        adapters: in products with adapters.
        attention: in attention.
    """

    layers: float
    adapters: float
    attention: float

    @property
    def forward(self) -> float:
        """Without gradient."""
        return self.layers + self.adapters + self.attention

    def with_gradient(self, *, trains_all: bool, recomputes: bool, keeps_attention: bool) -> float:
        """Forward and backward: the inputs' gradients, those of what is trained, and what is worked out again."""
        backward = self.layers * (2 if trains_all else 1) + 2 * self.adapters + BACKWARD_ATTENTION * self.attention
        again = self.forward - self.attention * keeps_attention if recomputes else 0.0
        return self.forward + backward + again


@dataclass(frozen=True)
class Passes:
    """Clips that the networks are asked about for each clip of a step, on average."""

    without_gradient: float
    with_gradient: float


def step_operations(recipe: Recipe, config: Mapping[str, Any], latents: tuple[int, int, int, int]) -> float | None:
    """Floating-point operations of a step, all its clips; None where no count is known.

    Args:
        recipe: with its batch.
        config: dimensions of the network.
        latents: frames, channels, rows, columns of a clip.
    """
    counts = passes_of(recipe)
    if counts is None or (recipe.model.architecture == "causal" and recipe.has_critic):
        return None  # rollouts chunk by chunk look back in ways that are not counted
    hardware, total = recipe.hardware, 0.0
    for layout, share in _layouts(recipe, config, latents[0]):
        one = network_pass(recipe, config, latents, layout)
        gradient = one.with_gradient(
            trains_all=not recipe.model.lora.enabled,
            recomputes=hardware.gradient_checkpointing,
            keeps_attention=hardware.keep_attention,
        )
        is_extra = layout is None and recipe.model.architecture == "causal"  # the loss on all frames at once
        asked = Passes(float(_is_guided(recipe)), 1.0) if is_extra else counts
        total += share * (asked.without_gradient * one.forward + asked.with_gradient * gradient)
    return total * recipe.global_batch


def step_seconds(operations: float, gpus: int, gpu: str) -> float:
    """Seconds of a step at :data:`UTILISATION` of the rate of so many GPUs of a kind."""
    return operations / (gpus * TERAFLOPS[gpu] * 1e12 * UTILISATION)


def passes_of(recipe: Recipe) -> Passes | None:
    """The passes of all turns of a step; None for a stage whose steps are of several kinds, or are not counted."""
    if recipe.has_tail or recipe.sampler == "renoise":
        return None
    turns: list[Passes] = []
    for role, turn in recipe.declared.turns.items():
        counted = _TURNS.get(turn) if isinstance(turn, str) else None
        if counted is None:
            return None
        turns += [counted(recipe)] * (recipe.stage.onpolicy.critic_turns if role == "critic" else 1)
    return Passes(sum(turn.without_gradient for turn in turns), sum(turn.with_gradient for turn in turns))


def _flow_map(recipe: Recipe) -> Passes:
    stage = recipe.stage
    return Passes(2 * (1 - stage.diffusion_share) + _is_guided(recipe) * (1 - stage.text_drop), 1.0)


def _generator(recipe: Recipe) -> Passes:
    judged = 2.0 + (recipe.stage.onpolicy.extra_guidance > 0)
    again = (jumps(recipe) - 1) * recipe.hardware.recompute_jumps
    on_data = _flow_map(recipe) if recipe.stage.onpolicy.forward_weight > 0 else Passes(0.0, 0.0)
    return Passes(judged + again + on_data.without_gradient, jumps(recipe) + on_data.with_gradient)


def _critic(recipe: Recipe) -> Passes:
    return Passes(jumps(recipe), 1.0)


_TURNS: dict[str, Callable[[Recipe], Passes]] = {
    "flow_matching": lambda recipe: Passes(0.0, 1.0),
    "flow_map": _flow_map,
    "generator": _generator,
    "critic": _critic,
}


def jumps(recipe: Recipe) -> float:
    """Of a rollout, on average over budgets and steps."""
    from anyflow.flowmap.rollout import BackwardSimulation

    budgets = recipe.stage.onpolicy.budgets
    return mean(mean(len(BackwardSimulation(steps, index).jumps) for index in range(steps)) for steps in budgets)


def _is_guided(recipe: Recipe) -> bool:
    return recipe.fuses_guidance and recipe.stage.guidance_scale != 1


def _layouts(recipe: Recipe, config: Mapping[str, Any], frames: int) -> Iterable[tuple[ChunkLayout | None, float]]:
    """What a step's passes look at, each with its share of the steps; None: all frames at once."""
    if recipe.model.architecture != "causal":
        return [(None, 1.0)]
    from anyflow.flowmap.chunks import layout_of, partition_frames

    chunks = partition_frames(frames, config.get("chunk_partition", (1, 3, 3, 3, 3, 3, 3, 2)))
    limit, share = config.get("full_chunk_limit", 3), recipe.stage.long_context
    longer = [layout_of(chunks[:count], limit) for count in range(limit + 1, len(chunks) + 1)]
    short = layout_of(chunks[:limit], limit)
    drawn = [(layout, share / len(longer)) for layout in longer] + [(short, 1 - share if longer else 1.0)]
    return [*drawn, (None, recipe.stage.bidirectional_prob)]


def network_pass(
    recipe: Recipe, config: Mapping[str, Any], latents: tuple[int, int, int, int], layout: ChunkLayout | None = None
) -> Pass:
    """One clip's pass; with a ``layout`` that of its chunks."""
    frames, _, rows, columns = latents
    _, high, wide = config.get("patch_size", (1, 2, 2))
    each = (rows // high) * (columns // wide)
    if layout is None:
        tokens, pairs = frames * each, float(frames * each) ** 2
    else:
        from anyflow.backbone.segments import segment_mask

        _, far_high, far_wide = config.get("compressed_patch_size", (1, 4, 4))
        mask = segment_mask(layout, each, (rows // far_high) * (columns // far_wide), "segments")
        tokens = sum(mask.lengths)
        reads = zip(mask.lengths, mask.reads, strict=True)
        pairs = float(sum(own * sum(mask.lengths[run] for run in seen) for own, seen in reads))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    hidden, layers = config["ffn_dim"], config["num_layers"]
    linear = tokens * (6 * width**2 + 2 * width * hidden) + 2 * USUAL_TEXT * width**2
    rank = recipe.model.lora.rank if recipe.model.lora.enabled else 0
    adapted = tokens * rank * (4 * 2 * width + 2 * (width + hidden))  # the released targets: self-attention and ffn
    attention = 2 * width * (pairs + tokens * USUAL_TEXT)
    return Pass(2.0 * layers * linear, 2.0 * layers * adapted, 2.0 * layers * attention)
