"""Options that somebody typed and that change nothing in this run."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow.backbone.parallelize import accelerator_here
from anyflow.recipe import Recipe


def idle_options(recipe: Recipe) -> Iterator[str]:
    """A sentence for each; those of files are left alone, which serve several recipes."""
    hardware, stage = recipe.hardware, f"stage {recipe.stage.name}"
    on_cpu = accelerator_here(hardware.accelerator) == "cpu"
    idle = {
        "keep_attention": "" if hardware.gradient_checkpointing else "hardware.gradient_checkpointing is false",
        "recompute_jumps": "" if recipe.declared.keeps_rollouts or recipe.has_tail else f"{stage} keeps no rollouts",
        "residual": "hardware.precision is 32-true" if hardware.precision == "32-true" else "",
        "attention": "it is for GPUs" if on_cpu else "",
    }
    for field, why in idle.items():
        key = f"hardware.{field}"
        if why and recipe.sources.get(key) == "command line":
            yield f"note: {key}={getattr(hardware, field)} changes nothing here: {why}"
