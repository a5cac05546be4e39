"""What can be changed about a recipe that needs more memory than there is, the cheapest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from anyflow.backbone.options import BaseWeights
from anyflow.errors import UserError
from anyflow.memory.phases import DECODING, ENCODING, EXPORT, READING, SAMPLING, STEP
from anyflow.recipe import Recipe
from anyflow.recipe.check import fit_batch
from anyflow.system.data_ranks import data_rank

LOW_RANK = 32
"""Of adapters that are offered where memory is short."""


def changes(recipe: Recipe, phase: str = STEP, heads: int = 1) -> Iterator[tuple[str, Recipe, str]]:
    """Single changes that lower what a phase needs, the cheapest first: ``(what to write, the recipe, its cost)``.

    ``heads`` are those of the network's attention.
    """
    hardware, data = recipe.hardware, recipe.data
    if phase == STEP:
        yield from _of_step(recipe)
    if phase in (STEP, ENCODING) and data.batch_size > 1:
        passes = _with(recipe, "hardware", accumulate=hardware.accumulate * data.batch_size)
        yield "data.batch_size=1", _with(passes, "data", batch_size=1), "more passes a step"
    if phase == STEP and not hardware.park_codec and not data.precompute:
        yield "hardware.park_codec=true", _with(recipe, "hardware", park_codec=True), "seconds more a batch"
    if phase in (STEP, ENCODING, READING) and not data.precompute:
        yield "data.precompute=true", _with(recipe, "data", precompute=True), "disk, and encoding before training"
    if phase in (SAMPLING["during"], DECODING["during"]):
        yield "sampling.every_steps=0", _with(recipe, "sampling", every_steps=0), "no curve during training"
    if phase in (*SAMPLING.values(), *DECODING.values()):
        yield "sampling.prompts=0", _with(recipe, "sampling", prompts=0), "no curve: evaluate the model later"
    if phase in (STEP, *SAMPLING.values()):
        yield from _of_context(recipe, heads)
    yield from _of_all(recipe, phase)


def _with(recipe: Recipe, group: str, **fields: Any) -> Recipe:
    """The recipe with other values in one of its groups."""
    return dataclasses.replace(recipe, **{group: dataclasses.replace(getattr(recipe, group), **fields)})


def _of_step(recipe: Recipe) -> Iterator[tuple[str, Recipe, str]]:
    hardware = recipe.hardware
    if not hardware.gradient_checkpointing:
        yield (
            "hardware.gradient_checkpointing=true",
            _with(recipe, "hardware", gradient_checkpointing=True),
            "a third more time",
        )
    elif hardware.keep_attention:
        yield "hardware.keep_attention=false", _with(recipe, "hardware", keep_attention=False), "more recomputation"
    if not hardware.recompute_jumps and recipe.declared.keeps_rollouts:
        yield "hardware.recompute_jumps=true", _with(recipe, "hardware", recompute_jumps=True), "a tenth more time"


def _of_context(recipe: Recipe, heads: int) -> Iterator[tuple[str, Recipe, str]]:
    """Clips shared by more ranks; the batch over all ranks stays, in more passes."""
    hardware = recipe.hardware
    for size in (2, 4, 8):
        if size > hardware.context and hardware.devices % size == 0 and heads % size == 0:
            more = size // hardware.context
            shared = _with(recipe, "hardware", context=size, accumulate=hardware.accumulate * more)
            passes = f" hardware.accumulate={hardware.accumulate * more}" if not recipe.data.global_batch else ""
            yield (
                f"hardware.context={size}{passes}",
                shared,
                f"{more} times the passes, each at best {more} times as fast",
            )


def _of_all(recipe: Recipe, phase: str) -> Iterator[tuple[str, Recipe, str]]:
    """What lowers every phase."""
    hardware, data = recipe.hardware, recipe.data
    if hardware.strategy != "fsdp" and recipe.world_size > 1 and not recipe.whole_weights:
        yield "hardware.strategy=fsdp", _with(recipe, "hardware", strategy="fsdp"), "weights travel"
    if not recipe.model.lora.enabled and recipe.model.init == "weights":
        lora = dataclasses.replace(recipe.model.lora, enabled=True)
        words = "one base for all roles" if recipe.has_teacher else "adapters instead of all weights"
        yield f"model.lora.enabled=true ({words})", _with(recipe, "model", lora=lora), "less capacity"
    if recipe.model.lora.enabled:
        yield from _of_adapters(recipe)
    if hardware.strategy == "fsdp" or (recipe.world_size == 1 and not recipe.whole_weights):
        for count in (2, 4, 8):
            more = recipe.world_size * count
            if more <= 64:
                with suppress(UserError):  # more than there are clips
                    yield f"{more} GPUs", with_gpus(recipe, more), f"{count} times the GPUs"
    if hardware.strategy == "fsdp":
        yield "hardware.offload=true", _with(recipe, "hardware", offload=True), "several times slower"
    for frames in (49, 33, 17):
        if frames < data.frames and phase != EXPORT:
            yield f"data.frames={frames}", _with(recipe, "data", frames=frames), "shorter clips"


def _of_adapters(recipe: Recipe) -> Iterator[tuple[str, Recipe, str]]:
    """A base in fewer bits, on one GPU (several would each hold all of it); adapters of a lower rank."""
    bases: dict[BaseWeights, str] = {"full": "", "int8": "weights off by 0.6 %", "nf4": "weights off by 9 %"}
    own, can_round = recipe.model.lora, recipe.world_size == 1 and find_spec("bitsandbytes") is not None
    for base, cost in list(bases.items())[list(bases).index(own.base) + 1 :] if can_round else ():
        yield f"model.lora.base={base}", _with(recipe, "model", lora=dataclasses.replace(own, base=base)), cost
    if own.rank > LOW_RANK and not own.start:
        low = dataclasses.replace(own, rank=LOW_RANK, alpha=float(LOW_RANK))
        change = f"model.lora.rank={LOW_RANK} model.lora.alpha={LOW_RANK}"
        yield change, _with(recipe, "model", lora=low), "less capacity"


def with_gpus(recipe: Recipe, gpus: int) -> Recipe:
    """The recipe on another number of GPUs: one node up to 8, nodes of 8 above.

    Raises:
        UserError: they are not whole nodes, or do not divide ``data.global_batch``: training would refuse them.
    """
    if gpus > 8 and gpus % 8:
        raise UserError(f"--gpus {gpus} is no multiple of 8: nodes have 8 GPUs, so give 16, 24, ... or at most 8")
    nodes = max(1, gpus // 8)
    hardware, total = recipe.hardware, recipe.data.global_batch
    if min(gpus, 8) % hardware.context:
        raise UserError(
            f"--gpus {gpus}: hardware.context={hardware.context} ranks share a clip, and do not divide the GPUs of a "
            f"node: give a multiple of {hardware.context}, or another hardware.context"
        )
    ranks = data_rank(0, gpus, hardware.context)[1]
    if total % ranks:
        near = max(1, round(total / ranks)) * ranks
        kind = "GPUs" if hardware.context == 1 else f"groups of {hardware.context} GPUs"
        raise UserError(
            f"--gpus {gpus}: data.global_batch={total} does not divide over {ranks} {kind}: give "
            f"data.global_batch={near}, or another number"
        )
    fsdp = "fsdp" if gpus > 1 and not recipe.whole_weights else "auto"
    changed = dataclasses.replace(
        hardware,
        devices=min(gpus, 8),
        num_nodes=nodes,
        strategy=hardware.strategy if gpus > 1 and hardware.strategy != "auto" else fsdp,
    )
    return fit_batch(dataclasses.replace(recipe, hardware=changed))
