"""``anyflow data encode``: latents and prompt embeddings beforehand, on every GPU of a machine or a cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import typer

from anyflow.cli.common import Card, Json, print_json
from anyflow.cli.options import with_options
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model
from anyflow.recipe import load_recipe, parse_shape
from anyflow.system.engine_options import EngineOptions, engine_of
from anyflow.system.files import require_place
from anyflow.system.option import option


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
    devices: int = option(0, "Processes, one a GPU, or of one CPU thread each; 0: all GPUs, or one on the CPU.", low=0)
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
        if not self.splits:
            raise UserError("--splits names none: give for example --splits train,heldout")
        for text in self.buckets:
            parse_shape(text, "--buckets")


@with_options
def encode(card: Card, options: EncodeOptions, engine: EngineOptions, as_json: Json = False) -> None:
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
    engine.check(options.devices)
    options.check()
    folders = _encode(card, options, engine)
    if as_json:
        print_json({"card": card, "model": options.model, "caches": folders})
    else:
        for split, folder in folders.items():
            typer.echo(f"{split}: {folder}")


def _encode(card: str, options: EncodeOptions, chosen: EngineOptions) -> dict[str, Path]:
    """Split -> its cache."""
    from anyflow.backbone.codec import codec_dtypes
    from anyflow.data.decode import ClipShape
    from anyflow.evaluation.models import native_shape, recipe_of
    from anyflow.system.console import quiet_libraries
    from anyflow.training.encoding import EncodingJob, devices_here, encode

    quiet_libraries()
    kind, count = devices_here()
    if kind == "gpu" and options.devices > count:
        raise UserError(f"--devices {options.devices}: this machine has {count} GPU{'s' * (count > 1)}: ask for fewer")
    width, height = options.size or (None, None)
    own = native_shape(options.model, frames=options.frames, height=height, width=width, fps=options.fps)
    recipe = recipe_of(options.model)
    processes = options.devices or count
    engine = engine_of(chosen, processes if processes > 1 else 0, gpus=kind == "gpu")
    usual = recipe.hardware.precision if recipe else "bf16-mixed" if engine.has_gpus() else "32-true"
    # training refuses what was made in another precision than its own
    dtypes = codec_dtypes(options.precision or usual)
    shapes = (own, *(ClipShape(*parse_shape(text, "--buckets"), own.fps) for text in options.buckets))
    prompts = (recipe.model.negative_prompt if recipe else "",)
    jobs = {
        split: EncodingJob(card, split, options.model, *dtypes, shapes, options.out, prompts)
        for split in options.splits
    }
    codec = next(iter(jobs.values())).codec()
    for shape in shapes:
        codec.layout.check(shape.frames, shape.height, shape.width)
    return {split: encode(job, engine) for split, job in jobs.items()}
