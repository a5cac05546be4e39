"""``anyflow plan``: the memory that a recipe needs, before hardware is rented."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from anyflow.cli.common import Json, print_json
from anyflow.cli.recipes import Hardware, Model, Overrides
from anyflow.errors import UserError
from anyflow.recipe import Recipe, list_recipes, load_recipe
from anyflow.system.imports import quick_imports
from anyflow.system.tables import markdown_table

if TYPE_CHECKING:
    from anyflow.memory.need import Need


def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]", help="stage/name, a YAML file, or a run's folder; without it all that ask for GPUs."
        ),
    ] = None,
    overrides: Overrides = None,
    model: Model = None,
    hardware: Hardware = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs, instead of the recipe's; nodes have 8.", min=1)] = None,
    gpu_memory: Annotated[float, typer.Option(help="GB of one GPU.", min=1)] = 80.0,
    as_json: Json = False,
) -> None:
    """Plan: simulate a run's memory, phase by phase, on GPUs that need not be here, and find what makes it fit.

    \b
    Examples:
      anyflow plan
      anyflow plan forward/wan2.1-t2v-14b
      anyflow plan finetune/driving --model anyflow-wan2.1-t2v-14b --hardware 8gpu --gpu-memory 80
      anyflow plan forward/wan2.1-t2v-14b model.lora.enabled=false --gpus 16 --json
    """
    from rich.console import Console

    from anyflow.system.console import quiet_libraries

    with quick_imports():
        from anyflow.memory.need import plan as work_out

        quiet_libraries()
    if recipe is None:
        if overrides or model or hardware or gpus:
            raise UserError("without a RECIPE the shipped ones are planned as they are: name one to change it")
        _plan_all(gpu_memory, as_json)
        return
    resolved = load_recipe(recipe, model=model, hardware=hardware, overrides=overrides or ())
    with Console(stderr=True).status("simulating the recipe") as shown:  # silent where there is no terminal

        def on_try(change: str) -> None:
            shown.update(f"simulating it with {change}")

        need = work_out(resolved, gpus=gpus, gpu_memory=gpu_memory, on_try=on_try)
    if as_json:
        print_json(need.to_json())
        return
    for line in need.lines():
        typer.echo(line)


def gpu_recipes() -> dict[str, Recipe]:
    """The shipped recipes that ask for GPUs, by what one types; fine-tuning once for each model, driving for all."""
    found = {}
    for folder, names in list_recipes().items():
        if folder in ("models", "hardware"):
            continue
        for name in names if folder != "finetune" else ():
            found[f"{folder}/{name}"] = load_recipe(f"{folder}/{name}")
    for model in list_recipes()["models"]:
        if model.startswith("anyflow-"):
            found[f"finetune/driving --model {model}"] = load_recipe("finetune/driving", model=model)
    return {name: recipe for name, recipe in found.items() if recipe.hardware.accelerator == "gpu"}


def table_row(name: str, need: Need) -> list[str]:
    """The recipe, GPUs, GiB of step, sampling, autoencoder, most; its phase; a checkpoint; seconds and GPU hours."""
    from anyflow.memory.phases import DECODING, ENCODING, GIB, SAMPLING, STEP

    totals = need.totals
    sampling = max((totals[phase] for phase in SAMPLING.values() if phase in totals), default=0.0)
    codec = max((totals[phase] for phase in (ENCODING, *DECODING.values()) if phase in totals), default=0.0)
    sizes = [f"{size / GIB:.0f}" for size in (totals[STEP], sampling, codec, need.needed)]
    seconds = f"{need.seconds['H100']:.0f}" if need.seconds else "?"
    hours = f"{need.seconds['H100'] * need.steps * need.gpus / 3600:.0f}" if need.seconds else "?"
    return [f"`{name}`", str(need.gpus), *sizes, need.peak, f"{need.checkpoint / GIB:.0f}", seconds, hours]


def _plan_all(gpu_memory: float, as_json: bool) -> None:
    from anyflow.memory.need import GB, GIB
    from anyflow.memory.need import plan as work_out
    from anyflow.system.console import progress_line

    recipes, needs = gpu_recipes(), {}
    with progress_line("simulating") as on_progress:
        for done, (name, recipe) in enumerate(recipes.items(), start=1):
            needs[name] = work_out(recipe, gpu_memory=gpu_memory, remedies=False)
            on_progress(done, len(recipes), name)
    if as_json:
        print_json({name: need.to_json() for name, need in needs.items()})
        return
    most = f"of {gpu_memory * GB / GIB:.1f} GiB, at most"
    headings = [
        "recipe",
        "GPUs",
        "step",
        "sampling",
        "autoencoder",
        most,
        "in",
        "a checkpoint",
        "s a step",
        "GPU hours",
    ]
    rows = [table_row(name, need) for name, need in needs.items()]
    typer.echo("\n".join(markdown_table(headings, rows, "lrrrrrlrrr")))
