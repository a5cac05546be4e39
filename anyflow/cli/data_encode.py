"""``anyflow data encode``: latents and prompt embeddings beforehand, on every GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anyflow.cli.common import Card, Json, Model, parse_names, parse_size, print_json
from anyflow.evaluation.models import check_model
from anyflow.recipe import load_recipe, parse_shape
from anyflow.system.files import require_place
from anyflow.system.ranks import end_with_watcher, needs_watcher, watch


def encode(
    card: Card,
    model: Model = "data/models/tiny",
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
    as_json: Json = False,
) -> None:
    """Encode clips and captions once, on all GPUs: training with data.precompute=true then needs no VAE and no text
    encoder in memory (it also encodes by itself, on one device). Broken off, the same command goes on.

    \b
    Examples:
      anyflow data encode driving
      anyflow data encode driving --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --splits train,heldout
      anyflow data encode driving --frames 17 --size 96x64 --buckets 9x64x96 --devices 2
    """
    check_model(model)
    if out is not None:
        require_place(out, "--out")
    if precision:
        load_recipe("finetune/driving", overrides=[f"hardware.precision={precision}"])  # or its sentence
    width, height = parse_size(size) or (None, None)
    further = [parse_shape(text.strip(), "--buckets") for text in filter(None, buckets.split(","))]
    if devices > 1 and needs_watcher(devices):
        raise typer.Exit(watch(devices, 1))
    from anyflow.training.encoding import devices_here

    _, count = devices_here()
    if not devices and needs_watcher(count):
        raise typer.Exit(watch(count, 1))
    end_with_watcher()
    folders = _encode(card, model, splits, (frames, height, width, fps), further, precision, devices or count, out)
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
) -> dict[str, Path]:
    """Split -> its cache; called on every rank."""
    from anyflow.backbone.codec import Codec, codec_dtypes
    from anyflow.backbone.parallelize import leave_ranks
    from anyflow.data.decode import ClipShape
    from anyflow.data.encode import Encoding
    from anyflow.evaluation.models import native_shape, recipe_of
    from anyflow.system.console import quiet_libraries
    from anyflow.training.encoding import devices_here, encode_on_ranks

    quiet_libraries()
    frames, height, width, fps = wanted
    own = native_shape(model, frames=frames, height=height, width=width, fps=fps)
    recipe = recipe_of(model)
    accelerator, _ = devices_here()
    usual = recipe.hardware.precision if recipe else "bf16-mixed" if accelerator == "gpu" else "32-true"
    # training refuses what was made in another precision than its own
    dtype, text_dtype = codec_dtypes(precision or usual)
    codec = Codec.from_folder(model, dtype=dtype, text_dtype=text_dtype, stored=True)
    shapes = [own, *(ClipShape(*shape, own.fps) for shape in buckets)]
    for shape in shapes:
        codec.check_video_shape(shape.frames, shape.height, shape.width)
    folders = {}
    for split in parse_names(splits):
        encoding = Encoding(card, split, codec, shapes, out, prompts=[recipe.model.negative_prompt if recipe else ""])
        encode_on_ranks(encoding, codec, accelerator, devices)
        folders[split] = encoding.folder
    leave_ranks()
    return folders
