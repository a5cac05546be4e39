"""``anyflow export``: a run or a checkpoint as a folder that diffusers loads, or as LoRA weights."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import Json, fresh_folder, print_json, whole_folder
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model
from anyflow.system.places import find_shipped

if TYPE_CHECKING:
    from anyflow.recipe import Recipe

PRECISIONS = ("bfloat16", "float16", "float32")
LAYOUTS = ("diffusers", "comfyui")


def export(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|PATH", help="A run's folder, a model folder, or a hub id.", parser=find_shipped),
    ],
    to: Annotated[Path, typer.Option("--to", help="A new folder.")],
    lora: Annotated[
        bool, typer.Option("--lora/--merge", help="The adapter alone, or a whole pipeline with the adapter merged.")
    ] = False,
    layout: Annotated[
        str, typer.Option(help=f"Whose names an adapter's weights get: {' or '.join(LAYOUTS)}; with --lora.")
    ] = LAYOUTS[0],
    single_file: Annotated[
        bool, typer.Option("--single-file", help="All of the network's weights in one file, however large.")
    ] = False,
    precision: Annotated[str, typer.Option(help=f"Of the network's weights: {', '.join(PRECISIONS)}.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Export weights: the averaged ones of a run's newest checkpoint, or a published model in today's layout.

    \b
    Examples:
      anyflow export runs/finetune-driving-tiny-open-001 --to models/driving
      anyflow export runs/finetune-driving-wan --to models/driving-lora --lora
      anyflow export runs/finetune-driving-wan --to models/driving-comfyui --lora --layout comfyui
      anyflow export Wan-AI/Wan2.1-T2V-1.3B-Diffusers --to models/wan-as-flow-map
    \b
    Then, in Python: diffusers.AnyFlowPipeline.from_pretrained("models/driving"); for a causal model see its README.md
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision!r} is not known: give one of {', '.join(PRECISIONS)}")
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout!r} is not known: give one of {', '.join(LAYOUTS)}")
    if layout != LAYOUTS[0] and not lora:
        raise UserError(f"--layout {layout} is for adapters: add --lora, or leave it out")
    target = fresh_folder(to, option="--to")
    if (Path(source) / "recipe.yaml").is_file():
        with whole_folder(target) if lora else nullcontext(target) as place:
            _export_run(Path(source), place, lora, precision, single_file)
            if layout == "comfyui":
                _rename_for_comfyui(place, target.name)
    elif lora:
        raise UserError(
            f"--lora: {source} is not a run, so no adapter is known of it: name a run's folder, or use --merge"
        )
    else:
        check_model(source, "RUN|PATH")
        _export_model(source, target, precision, single_file)
    if as_json:
        print_json({"source": source, "folder": target, "kind": "lora" if lora else "pipeline", "layout": layout})
    elif layout == "comfyui":
        typer.echo(f"{target / target.name}.safetensors   (put it into ComfyUI's models/loras)")
    else:
        has_code = (target / "pipeline.py").is_file()
        loader = "pipe.load_lora_weights" if lora else "AnyFlowPipeline.from_pretrained"
        how = "its README.md says how to load it" if has_code else f"load it by {loader}({str(target)!r})"
        typer.echo(f"{target}   ({how})")


def _export_run(run: Path, target: Path, lora: bool, precision: str, single_file: bool) -> None:
    """From the newest checkpoint, of any number of ranks, on this process: neither GPU nor data are needed."""
    from anyflow.backbone.export import export_lora, export_pipeline
    from anyflow.recipe import load_recipe
    from anyflow.system.console import quiet_libraries
    from anyflow.tracking.checkpoints import require_whole
    from anyflow.tracking.runs import RunFolder
    from anyflow.training.finish import model_card

    recipe = load_recipe(str(run / "recipe.yaml"))
    if lora and not recipe.model.lora.enabled:
        raise UserError(f"--lora: {run} trained every weight (model.lora.enabled=false): export it with --merge")
    finished = run / ("lora" if lora else "model")
    if finished.is_dir() and precision == "bfloat16" and not single_file:
        _copy(finished, target)
        return
    checkpoint = RunFolder(run).checkpoint
    if checkpoint is None:
        raise UserError(f"{run} has neither a finished model nor a checkpoint: train it first")
    require_whole(checkpoint.parent.parent)
    quiet_libraries()
    codec, backbone, stage = _restored(recipe, checkpoint)
    card = model_card(recipe, {})
    with stage.ema.applied() if stage.ema is not None else nullcontext():
        if lora:
            export_lora(target, backbone, card)
        else:
            form: dict[str, Any] = {"dtype": _dtype(precision), "single_file": single_file}
            export_pipeline(target, backbone.transformer, codec, recipe.model.shift, card, **form)


def _rename_for_comfyui(folder: Path, name: str) -> None:
    """An exported adapter's folder in ComfyUI's layout, and what that loses."""
    from anyflow.backbone.export import rename_for_comfyui

    if lost := rename_for_comfyui(folder, name):
        typer.echo(f"ComfyUI leaves {lost} layers of delta_embedding out (README.md says what that means)", err=True)


def _restored(recipe: Recipe, checkpoint: Path) -> tuple[Any, Any, Any]:
    """Codec, network and stage with the trained weights and their average of a checkpoint, sharded or not."""
    from anyflow.stages.base import check_complete
    from anyflow.training.assemble import build_stage, load_networks
    from anyflow.training.callbacks.sharded import read_checkpoint

    recipe = replace(recipe.on_full_base, hardware=replace(recipe.hardware, accelerator="cpu", compile=False))
    codec, backbone = load_networks(recipe)
    stage = build_stage(recipe, codec, backbone)
    weights = read_checkpoint(checkpoint)["state_dict"]
    check_complete(stage, weights)
    stage.load_state_dict(weights, strict=False)
    return codec, backbone, stage


def _export_model(source: str, target: Path, precision: str, single_file: bool) -> None:
    from anyflow.backbone.codec import Codec
    from anyflow.backbone.export import export_pipeline
    from anyflow.backbone.files import check_start
    from anyflow.backbone.load import load_backbone
    from anyflow.backbone.model_card import ModelCard
    from anyflow.data.card import common_rate
    from anyflow.evaluation.models import has_guidance, recipe_of, shift_of, trained_shape, way_of
    from anyflow.system.console import quiet_libraries

    quiet_libraries()
    dtype = _dtype(precision)
    check_start(source)  # before the codec, whose text encoder is large
    codec, backbone = Codec.from_folder(source), load_backbone(source, dtype=dtype)
    frames, height, width, fps = trained_shape(source) or codec.layout.usual_clip
    recipe = recipe_of(source)
    sampler, guidance = way_of(source)
    card = ModelCard(
        title=target.name,
        base_model=source,
        summary=f"The weights of {source}, written by anyflow.",
        size=(frames, height, width),
        fps=fps or common_rate(recipe.data.card if recipe else []) or 8.0,
        own_rates=not fps,
        sampler=sampler,
        guidance=None if has_guidance(source) else guidance,
        given=(Path(source) / "pipeline.py").is_file(),  # a folder that takes them still does
    )
    form: dict[str, Any] = {"dtype": dtype, "single_file": single_file}
    export_pipeline(target, backbone.transformer, codec, shift_of(source), card, **form)


def _dtype(precision: str) -> Any:
    import torch

    return getattr(torch, precision)


def _copy(source: Path, target: Path) -> None:
    """The folder as it stands, whole or not at all."""
    with whole_folder(target) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
