"""``anyflow data encode``: latents and prompt embeddings beforehand, on every GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from anyflow.cli.common import Card, Json, print_json
from anyflow.cli.options import with_options
from anyflow.evaluation.models import check_model
from anyflow.recipe import load_recipe, parse_shape
from anyflow.system.files import require_place
from anyflow.system.option import option
from anyflow.system.ranks import end_with_watcher, needs_watcher, watch


@dataclass(frozen=True)
class EncodeOptions:
    """What is encoded, and by what."""

    model: str = option(
        "data/models/tiny", "Folder or hub id of the model whose VAE and text encoder encode.", is_path=True
    )
    splits: tuple[str, ...] = option(("train",), "Splits, with commas.")
    frames: int | None = option(None, "Frames of a clip; without it the model's own.")
    size: tuple[int, int] | None = option(None, "WIDTHxHEIGHT; without it the model's own.")
    fps: float | None = option(None, "Frames a second; without it the model's own.")
    buckets: tuple[str, ...] = option((), "Further shapes, FRAMESxHEIGHTxWIDTH with commas.")
    devices: int = option(0, "Processes, one a device; 0: all GPUs, or one on the CPU.", low=0)
    precision: str = option("", "hardware.precision of the training to come; without it that of the model's recipe.")
    out: Path | None = option(None, "Where the cache is made; without it beside the card.")

    def check(self) -> None:
        """Everything that can be known before libraries are loaded.

        Raises:
            UserError: an option cannot be right.
        """
        check_model(self.model)
        if self.out is not None:
            require_place(self.out, "--out")
        if self.precision:
            load_recipe("finetune/driving", overrides=[f"hardware.precision={self.precision}"])  # or its sentence
        for text in self.buckets:
            parse_shape(text, "--buckets")


@with_options
def encode(card: Card, options: EncodeOptions, as_json: Json = False) -> None:
    """Encode clips and captions once, on all GPUs: training with data.precompute=true then needs no VAE and no text
    encoder in memory (it also encodes by itself, on one device). Broken off, the same command goes on.

    \b
    Examples:
      anyflow data encode driving
      anyflow data encode driving --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --splits train,heldout
      anyflow data encode driving --frames 17 --size 96x64 --buckets 9x64x96 --devices 2
    """
    options.check()
    if options.devices > 1 and needs_watcher(options.devices):
        raise typer.Exit(watch(options.devices, 1))
    from anyflow.training.encoding import devices_here

    _, count = devices_here()
    if not options.devices and needs_watcher(count):
        raise typer.Exit(watch(count, 1))
    end_with_watcher()
    folders = _encode(card, options, options.devices or count)
    if as_json:
        print_json({"card": card, "model": options.model, "caches": folders})
    else:
        for split, folder in folders.items():
            typer.echo(f"{split}: {folder}")


def _encode(card: str, options: EncodeOptions, devices: int) -> dict[str, Path]:
    """Split -> its cache; called on every rank."""
    from anyflow.backbone.codec import Codec, codec_dtypes
    from anyflow.backbone.parallelize import leave_ranks
    from anyflow.data.decode import ClipShape
    from anyflow.data.encode import Encoding
    from anyflow.evaluation.models import native_shape, recipe_of
    from anyflow.system.console import quiet_libraries
    from anyflow.training.encoding import devices_here, encode_on_ranks

    quiet_libraries()
    width, height = options.size or (None, None)
    own = native_shape(options.model, frames=options.frames, height=height, width=width, fps=options.fps)
    recipe = recipe_of(options.model)
    accelerator, _ = devices_here()
    usual = recipe.hardware.precision if recipe else "bf16-mixed" if accelerator == "gpu" else "32-true"
    # training refuses what was made in another precision than its own
    dtype, text_dtype = codec_dtypes(options.precision or usual)
    codec = Codec.from_folder(options.model, dtype=dtype, text_dtype=text_dtype, stored=True)
    shapes = [own, *(ClipShape(*parse_shape(text, "--buckets"), own.fps) for text in options.buckets)]
    for shape in shapes:
        codec.check_video_shape(shape.frames, shape.height, shape.width)
    folders = {}
    for split in options.splits:
        encoding = Encoding(
            card, split, codec, shapes, options.out, prompts=[recipe.model.negative_prompt if recipe else ""]
        )
        encode_on_ranks(encoding, codec, accelerator, devices)
        folders[split] = encoding.folder
    leave_ranks()
    return folders
