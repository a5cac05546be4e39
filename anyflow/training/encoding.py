"""Encoding by an engine's workers, each with a codec of its own: this process, one a GPU, or those of a cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anyflow.backbone.codec import Codec, codec_dtypes
from anyflow.data.decode import ClipShape
from anyflow.data.encode import Encoding, estimate
from anyflow.data.encode_parts import CachePart, EncodingCost, TimedTexts
from anyflow.data.skips import Skip, enforce_budget
from anyflow.errors import UserError
from anyflow.recipe import Recipe
from anyflow.system.console import progress_line
from anyflow.system.engines import Engine, Work, values

AGAIN = "free memory on its machine, and start the same command again to go on"


@dataclass(frozen=True)
class EncodingJob:
    """An encoding that any process can take part in.

    Attributes:
        card, split: the footage.
        model: whose codec encodes.
        dtype, text_dtype: precision of its autoencoder and text encoder.
        shapes: of the clips.
        out: where the cache is made; beside the card by default.
        prompts: further prompts to embed.
        error_budget: largest share of unusable clips that is tolerated.
    """

    card: str
    split: str
    model: str
    dtype: torch.dtype
    text_dtype: torch.dtype
    shapes: tuple[ClipShape, ...]
    out: Path | None = None
    prompts: tuple[str, ...] = ()
    error_budget: float = 0.01

    @classmethod
    def of(cls, recipe: Recipe, card: str) -> EncodingJob:
        """How a card's training split is encoded for a recipe."""
        data, model = recipe.data, recipe.model
        shapes = tuple(ClipShape(*shape, data.fps or None) for shape in data.shapes)
        dtypes = codec_dtypes(recipe.hardware.precision)
        prompts, budget = (model.negative_prompt,), data.error_budget
        return cls(
            card, data.split, model.codec or model.weights, *dtypes, shapes, prompts=prompts, error_budget=budget
        )

    def codec(self, device: str = "cpu", stored: bool = True) -> Codec:
        """The model's codec; ``stored`` leaves it in its files.

        Raises:
            UserError: the model has none.
        """
        return Codec.from_folder(self.model, dtype=self.dtype, text_dtype=self.text_dtype, device=device, stored=stored)

    def encoding(self, codec: Codec) -> Encoding:
        """The encoding itself; nothing is done yet.

        Raises:
            UserError: the footage is missing or too short.
        """
        options: dict[str, Any] = {"prompts": self.prompts, "error_budget": self.error_budget}
        return Encoding(self.card, self.split, codec, self.shapes, self.out, **options)


def encode(job: EncodingJob, engine: Engine, *, waits: bool = False) -> Path:
    """The folder of the cache; encode what is missing of it; ``waits`` for another process that does so already.

    Raises:
        UserError: too many clips are bad, the cache cannot be written, workers cannot do it, or others are at it.
    """
    codec = job.codec()
    encoding = job.encoding(codec)
    if encoding.is_whole():
        return encoding.folder
    with encoding.held(waits) as is_open:
        if is_open:
            encoding.begin()
            _run(job, encoding, engine)
            encoding.finish()
    return encoding.folder


def _run(job: EncodingJob, encoding: Encoding, engine: Engine) -> None:
    parts = encoding.open_jobs()
    total = len(encoding.places)
    clips = {number: len(part.items) for number, part in enumerate(parts, start=1) if part.kind == "latents"}
    done = before = total - sum(clips.values())
    skipped: list[Skip] = []
    with progress_line(f"encoding {encoding.title}") as show:
        work = Work(
            partial(_do, (lambda done, _: show(before + done, total)) if engine.is_here else None),
            partial(_begin, job, encoding.folder.name),
            gpu=True,
            sees=tuple(path for path in (encoding.reader.shards[0][0].parent, Path(job.model)) if path.is_dir()),
            writes=encoding.partial,
        )
        ends = engine.map_unordered(work, [encoding.timed_texts, *parts] if parts else [])
        with closing(values(ends, lambda number: parts[number - 1].name, AGAIN)) as results:
            for number, value in results:
                if isinstance(value, EncodingCost):
                    print(f"{encoding.title}: {value.told(engine.workers(gpu=True))}", file=sys.stderr, flush=True)
                    continue
                skipped += value
                done += clips.get(number, 0)
                enforce_budget(skipped, done, total, encoding.error_budget, encoding.report)
                if number in clips and not engine.is_here:
                    show(done, total)


def _begin(job: EncodingJob, name: str) -> Encoding:
    """What a worker keeps: the encoding, with a codec on its device.

    Raises:
        UserError: footage or model are not the same here.
    """
    codec = job.codec("cuda" if torch.cuda.is_available() else "cpu", stored=False)
    encoding = job.encoding(codec)
    if encoding.folder.name != name:
        found = f"{encoding.folder.name}, not {name}"
        raise UserError(f"a worker finds other footage or another model ({found}): give all machines the same files")
    return encoding


def _do(
    progress: Callable[[int, int], None] | None, encoding: Encoding, task: CachePart | TimedTexts
) -> EncodingCost | list[Skip]:
    """A worker's task: how long it takes, or a shard.

    By one thread, so that sums have one order and the bytes are the same wherever they are made; several workers of a
    CPU would also fight for its cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return estimate(encoding, task) if isinstance(task, TimedTexts) else encoding.run(task, progress)
    finally:
        torch.set_num_threads(threads)


def devices_here() -> tuple[str, int]:
    """(accelerator, devices): all GPUs, or the CPU once."""
    return ("gpu", torch.cuda.device_count()) if torch.cuda.is_available() else ("cpu", 1)
