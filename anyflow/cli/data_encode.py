"""``anyflow data encode``: latents and prompt embeddings beforehand, on every GPU of a machine or a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from anyflow.cli.common import Card, Json, parse_names, parse_size, print_json
from anyflow.cli.options import with_options
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model
from anyflow.recipe import load_recipe, parse_shape
from anyflow.system.engine_options import EngineOptions, engine_of
from anyflow.system.files import require_place


@with_options
def encode(
    card: Card,
    model: Annotated[
        str, typer.Option(help="Folder or hub id of the model whose VAE and text encoder encode.")
    ] = "data/models/tiny",
    splits: Annotated[str, typer.Option(help="Splits, with commas.")] = "train",
    frames: Annotated[int | None, typer.Option(help="Frames of a clip; without it the model's own.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; without it the model's own.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second; without it the model's own.")] = None,
    buckets: Annotated[str, typer.Option(help="Further shapes, FRAMESxHEIGHTxWIDTH with commas.")] = "",
    devices: Annotated[int, typer.Option(help="Processes, one a device; 0: all GPUs, or one on the CPU.", min=0)] = 0,
    precision: Annotated[
        str, typer.Option(help="hardware.precision of the training to come; without it that of the model's recipe.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Where the cache is made; without it beside the card.")] = None,
    *,
    engine: EngineOptions,
    as_json: Json = False,
) -> None:
    """Encode clips and captions once, on all GPUs: training with data.precompute=true then needs no VAE and no text
    encoder in memory (it also encodes by itself, on one device). Broken off, the same command goes on.

    \b
    Examples:
      anyflow data encode driving
      anyflow data encode driving --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --splits train,heldout
      anyflow data encode driving --frames 17 --size 96x64 --buckets 9x64x96 --devices 2
      anyflow data encode /shared/drives/card.yaml --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --engine ray
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "data encode starts its own processes, one a GPU: start it once, without torchrun; on several machines by "
            "--engine ray"
        )
    engine.check(devices)
    check_model(model)
    if out is not None:
        require_place(out, "--out")
    if precision:
        load_recipe("finetune/driving", overrides=[f"hardware.precision={precision}"])  # or its sentence
    width, height = parse_size(size) or (None, None)
    further = [parse_shape(text.strip(), "--buckets") for text in filter(None, buckets.split(","))]
    folders = _encode(card, model, splits, (frames, height, width, fps), further, precision, devices, out, engine)
    if as_json:
        print_json({"card": card, "model": model, "caches": folders})
    else:
        for split, folder in folders.items():
            typer.echo(f"{split}: {folder}")


def _encode(
    card: str,
    model: str,
    splits: str,
    wanted: tuple[int | None, int | None, int | None, float | None],
    buckets: list[tuple[int, int, int]],
    precision: str,
    devices: int,
    out: Path | None,
    chosen: EngineOptions,
) -> dict[str, Path]:
    """Split -> its cache."""
    from anyflow.backbone.codec import codec_dtypes
    from anyflow.data.decode import ClipShape
    from anyflow.evaluation.models import native_shape, recipe_of
    from anyflow.system.console import quiet_libraries
    from anyflow.training.encoding import EncodingJob, devices_here, encode

    quiet_libraries()
    frames, height, width, fps = wanted
    own = native_shape(model, frames=frames, height=height, width=width, fps=fps)
    recipe = recipe_of(model)
    kind, count = devices_here()
    if kind == "gpu" and devices > count:
        raise UserError(f"--devices {devices}: this machine has {count} GPU{'s' * (count > 1)}: ask for fewer")
    processes = devices or count
    engine = engine_of(chosen, processes if processes > 1 else 0, gpus=kind == "gpu")
    usual = recipe.hardware.precision if recipe else "bf16-mixed" if engine.has_gpus() else "32-true"
    # training refuses what was made in another precision than its own
    dtypes = codec_dtypes(precision or usual)
    shapes = (own, *(ClipShape(*shape, own.fps) for shape in buckets))
    prompts = (recipe.model.negative_prompt if recipe else "",)
    if not parse_names(splits):
        raise UserError(f"--splits {splits!r} names none: give for example --splits train,heldout")
    jobs = {split: EncodingJob(card, split, model, *dtypes, shapes, out, prompts) for split in parse_names(splits)}
    codec = next(iter(jobs.values())).codec()
    for shape in shapes:
        codec.check_video_shape(shape.frames, shape.height, shape.width)
    return {split: encode(job, engine) for split, job in jobs.items()}
