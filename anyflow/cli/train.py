"""``anyflow train``: run a recipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anyflow.cli.common import Json, goes_on, print_json
from anyflow.cli.options import with_options
from anyflow.cli.recipes import Hardware, Model, Overrides
from anyflow.memory.need import memory_here, plan, warn_in_background
from anyflow.recipe import Recipe, check_files, load_recipe, to_dict
from anyflow.system.files import require_place
from anyflow.system.imports import quick_imports
from anyflow.system.option import option
from anyflow.system.ranks import end_with_watcher, needs_watcher, watch

if TYPE_CHECKING:
    from anyflow.tracking.runs import RunFolder


@dataclass(frozen=True)
class TrainOptions:
    """How a recipe is run."""

    resume: str | None = option(None, "auto: go on with the newest unfinished run of this recipe; or a run's folder.")
    accept_changes: bool = option(False, "Let a resumed run go on with a recipe other than its own.")
    dry_run: bool = option(False, "Build everything, take one batch, print shapes and sizes; train nothing.")
    out: Path | None = option(None, "The run's folder; without it a new one under run.out.")


@with_options
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="stage/name of recipes/, a YAML file, or a run's folder.")
    ],
    options: TrainOptions,
    overrides: Overrides = None,
    model: Model = None,
    hardware: Hardware = None,
    as_json: Json = False,
) -> None:
    """Train: a codec, a teacher, an any-step model, or an any-step model on your own clips.

    \b
    Examples:
      anyflow train finetune/driving
      anyflow train finetune/driving stage.steps=400 optimizer.lr=5e-4 --resume auto
      anyflow train finetune/robotics --model anyflow-wan2.1-t2v-1.3b --hardware 8gpu --dry-run
      anyflow train runs/finetune-driving-tiny-open-001 --resume runs/finetune-driving-tiny-open-001
    \b
    Exit codes: 0 done; 2 a mistake in recipe, arguments or files; 75 stopped by SIGTERM and saved (start it again with
    --resume auto); 130 stopped by Ctrl-C and saved.
    """
    resolved = load_recipe(recipe, model=model, hardware=hardware, overrides=overrides or ())
    check_files(resolved)
    _check_cards(resolved)
    if options.resume in (None, "auto"):
        require_place(options.out or Path(resolved.run.out), "--out" if options.out else "run.out")
    if "RANK" not in os.environ and not options.dry_run:
        warn_in_background(resolved)
    if needs_watcher(resolved.world_size) and not options.dry_run:
        _encode_ahead(resolved)
        raise typer.Exit(watch(resolved.hardware.devices, resolved.hardware.num_nodes))
    end_with_watcher()
    raise typer.Exit((_train_json if as_json else _train)(resolved, options))


def _encode_ahead(recipe: Recipe) -> None:
    """What ranks would wait for the first of them to encode; the libraries are imported only if that may be."""
    if not recipe.data.precompute:
        return
    with quick_imports():
        from anyflow.training.launch import encode_ahead

    with goes_on("clips that are encoded stay so; start the same command again to go on"):
        encode_ahead(recipe)


def _check_cards(recipe: Recipe) -> None:
    """That cards and shards are there and the cards make sense, before weights are loaded; tars are indexed here."""
    from anyflow.data.card import load_card
    from anyflow.data.find import is_tars
    from anyflow.data.reader import find_split

    splits = []
    for card in recipe.data.card:
        loaded = load_card(card)
        if is_tars(card) and os.environ.get("RANK", "0") == "0":
            print(loaded.description, file=sys.stderr)
        how = {"index": not recipe.data.streaming, "shapes": len(recipe.data.shapes) > 1}
        splits.append(find_split(card, recipe.data.split, **how))
        cache = splits[-1].home / "cache"
        if recipe.data.precompute and not any(cache.glob("*/cache.json")):
            remedy = "set data.precompute=false, or copy the card, with full paths in its splits, to another disk"
            require_place(cache, "what data.precompute=true encodes lies beside the card, in", remedy)
    if recipe.data.streaming:
        from anyflow.data.lanes import check_lanes, tars_of

        check_lanes(len(tars_of(splits)), recipe.data_ranks, max(1, recipe.data.num_workers))


def _train(recipe: Recipe, options: TrainOptions, on_open: Callable[[RunFolder], None] | None = None) -> int:
    with quick_imports():
        from anyflow.backbone.parallelize import accelerator_here
        from anyflow.training.launch import train as launch

    code = launch(recipe, **vars(options), on_open=on_open)
    if options.dry_run and accelerator_here(recipe.hardware.accelerator) == "gpu":
        print("\n".join(plan(recipe, gpu_memory=memory_here() or 80.0).lines()))
    return code


def _train_json(recipe: Recipe, options: TrainOptions) -> int:
    """The same with everything for people on stderr, and one document about the run on stdout."""
    opened: list[RunFolder] = []
    with contextlib.redirect_stdout(sys.stderr):
        code = _train(recipe, options, opened.append)
    found = {"run": opened[0].path, **opened[0].status} if opened else {}
    print_json({"exit_code": code, **found, "recipe": to_dict(recipe)})
    return code
