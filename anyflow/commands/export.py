"""``anyflow export``: a run or a checkpoint as a folder that diffusers loads, or as LoRA weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from anyflow.commands.common import Json, check_model, fresh_folder, print_json, whole_folder
from anyflow.errors import UserError

PRECISIONS = ("bfloat16", "float16", "float32")


def export(
    source: Annotated[str, typer.Argument(metavar="RUN|PATH", help="A run's folder, a model folder, or a hub id.")],
    to: Annotated[Path, typer.Option("--to", help="A new folder.")],
    lora: Annotated[
        bool, typer.Option("--lora/--merge", help="The adapter alone, or a whole pipeline with the adapter merged.")
    ] = False,
    precision: Annotated[str, typer.Option(help=f"Of the network's weights: {', '.join(PRECISIONS)}.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Export weights: the averaged ones of a run's newest checkpoint, or a published model in today's layout.

    \b
    Examples:
      anyflow export runs/finetune-driving-tiny-001 --to models/driving
      anyflow export runs/finetune-driving-wan --to models/driving-lora --lora
      anyflow export Wan-AI/Wan2.1-T2V-1.3B-Diffusers --to models/wan-as-flow-map
    \b
    Then, in Python: diffusers.AnyFlowPipeline.from_pretrained("models/driving"); for a causal model see its README.md
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision!r} is not known: give one of {', '.join(PRECISIONS)}")
    target = fresh_folder(to, str(to))
    if (Path(source) / "recipe.yaml").is_file():
        _export_run(Path(source), target, lora, precision)
    elif lora:
        raise UserError(
            f"--lora: {source} is not a run, so no adapter is known of it: name a run's folder, or use --merge"
        )
    else:
        check_model(source)
        _export_model(source, target, precision)
    if as_json:
        print_json({"source": source, "folder": target, "kind": "lora" if lora else "pipeline"})
    else:
        is_causal = (target / "pipeline.py").is_file()
        loader = "AnyFlowFARPipeline.from_pretrained" if is_causal else "AnyFlowPipeline.from_pretrained"
        loader = "pipe.load_lora_weights" if lora else loader
        typer.echo(f"{target}   (load it by {loader}({str(target)!r}))")


def _export_run(run: Path, target: Path, lora: bool, precision: str) -> None:
    from anyflow.assemble import Parts, assemble
    from anyflow.backbone.export import export_lora, export_pipeline
    from anyflow.console import quiet_libraries
    from anyflow.finish import averaged, model_card
    from anyflow.recipe import load_recipe
    from anyflow.runs import RunFolder

    recipe = load_recipe(str(run / "recipe.yaml"))
    if lora and not recipe.model.lora.enabled:
        raise UserError(f"--lora: {run} trained every weight (model.lora.enabled=false): export it with --merge")
    finished = run / ("lora" if lora else "model")
    if finished.is_dir() and precision == "bfloat16":
        _copy(finished, target)
        return
    checkpoint = RunFolder(run).checkpoint
    if checkpoint is None:
        raise UserError(f"{run} has neither a finished model nor a checkpoint: train it first")
    quiet_libraries()
    parts: Parts = assemble(recipe)
    _load_weights(parts, checkpoint)
    card = model_card(recipe, {})
    with averaged(parts):
        if lora:
            export_lora(target, parts.backbone, card)
        else:
            options: dict[str, Any] = {"dtype": _dtype(precision), "sampler": recipe.sampler}
            export_pipeline(target, parts.backbone.transformer, parts.codec, recipe.model.shift, card, **options)


def _load_weights(parts: Any, checkpoint: Path) -> None:
    """The stage's trained weights and their average, from a checkpoint of the same recipe, sharded or not."""
    from anyflow.callbacks.sharded import read_checkpoint
    from anyflow.stages.base import check_complete

    weights = read_checkpoint(checkpoint)["state_dict"]
    check_complete(parts.stage, weights)
    parts.stage.load_state_dict(weights, strict=False)


def _export_model(source: str, target: Path, precision: str) -> None:
    from anyflow.backbone.codec import Codec
    from anyflow.backbone.export import export_pipeline
    from anyflow.backbone.load import load_backbone, read_sampler, read_shift
    from anyflow.backbone.model_card import ModelCard
    from anyflow.commands.models import trained_shape
    from anyflow.console import quiet_libraries

    quiet_libraries()
    dtype = _dtype(precision)
    codec, backbone = Codec.from_folder(source), load_backbone(source, dtype=dtype)
    frames, height, width, fps = trained_shape(source) or (81, 480, 832, 16.0)
    card = ModelCard(
        title=target.name,
        base_model=source,
        summary=f"The weights of {source}, written by anyflow.",
        size=(frames, height, width),
        fps=fps or 8.0,
    )
    sampler = read_sampler(source)
    export_pipeline(target, backbone.transformer, codec, read_shift(source), card, sampler=sampler, dtype=dtype)


def _dtype(precision: str) -> Any:
    import torch

    return getattr(torch, precision)


def _copy(source: Path, target: Path) -> None:
    """The folder as it stands, whole or not at all."""
    with whole_folder(target) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
