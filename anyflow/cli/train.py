"""``anyflow train``: run a recipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import Json, print_json
from anyflow.cli.recipes import Hardware, Model, Overrides
from anyflow.memory.need import memory_here, plan, warn_in_background
from anyflow.recipe import Recipe, check_files, load_recipe, to_dict
from anyflow.system.files import require_place
from anyflow.system.ranks import end_with_watcher, needs_watcher, watch

if TYPE_CHECKING:
    from anyflow.tracking.runs import RunFolder


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="stage/name of recipes/, a YAML file, or a run's folder.")
    ],
    overrides: Overrides = None,
    model: Model = None,
    hardware: Hardware = None,
    resume: Annotated[
        str | None, typer.Option(help="auto: go on with the newest unfinished run of this recipe; or a run's folder.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Let a resumed run go on with a recipe other than its own.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, take one batch, print shapes and sizes; train nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder; without it a new one under run.out.")] = None,
    as_json: Json = False,
) -> None:
    """Train: a codec, a teacher, an any-step model, or an any-step model on your own clips.

    \b
    Examples:
      anyflow train finetune/driving
      anyflow train finetune/driving stage.steps=400 optimizer.lr=5e-4 --resume auto
      anyflow train finetune/robotics --model anyflow-wan2.1-t2v-1.3b --hardware 8gpu --dry-run
      anyflow train runs/finetune-driving-tiny-001 --resume runs/finetune-driving-tiny-001
    \b
    Exit codes: 0 done; 2 a mistake in recipe, arguments or files; 75 stopped by SIGTERM and saved (start it again with
    --resume auto); 130 stopped by Ctrl-C and saved.
    """
    resolved = load_recipe(recipe, model=model, hardware=hardware, overrides=overrides or ())
    check_files(resolved)
    _check_cards(resolved)
    if resume in (None, "auto"):
        require_place(out or Path(resolved.run.out), "--out" if out else "run.out")
    if "RANK" not in os.environ and not dry_run:
        warn_in_background(resolved)
    if needs_watcher(resolved.world_size) and not dry_run:
        raise typer.Exit(watch(resolved.hardware.devices, resolved.hardware.num_nodes))
    end_with_watcher()
    how = {"resume": resume, "accept_changes": accept_changes, "dry_run": dry_run, "out": out}
    code = _train_json(resolved, how) if as_json else _train(resolved, how)
    raise typer.Exit(code)


def _check_cards(recipe: Recipe) -> None:
    """That cards and shards are there and the cards make sense, before weights are loaded."""
    from anyflow.data.card import load_card

    for card in recipe.data.card:
        cache = load_card(card).path.parent / "cache"
        if recipe.data.precompute and not any(cache.glob("*/cache.json")):
            remedy = "set data.precompute=false, or copy the card, with full paths in its splits, to another disk"
            require_place(cache, "what data.precompute=true encodes lies beside the card, in", remedy)


def _train(recipe: Recipe, how: dict[str, Any], on_open: Callable[[RunFolder], None] | None = None) -> int:
    from anyflow.backbone.parallelize import accelerator_here
    from anyflow.training.launch import train as launch

    code = launch(recipe, **how, on_open=on_open)
    if how["dry_run"] and accelerator_here(recipe.hardware.accelerator) == "gpu":
        print("\n".join(plan(recipe, gpu_memory=memory_here() or 80.0).lines()))
    return code


def _train_json(recipe: Recipe, how: dict[str, Any]) -> int:
    """The same with everything for people on stderr, and one document about the run on stdout."""
    opened: list[RunFolder] = []
    with contextlib.redirect_stdout(sys.stderr):
        code = _train(recipe, how, opened.append)
    found = {"run": opened[0].path, **opened[0].status} if opened else {}
    print_json({"exit_code": code, **found, "recipe": to_dict(recipe)})
    return code
