"""``anyflow plan``: the memory that a recipe needs, before hardware is rented."""

from __future__ import annotations

from typing import Annotated

import typer

from anyflow.commands.common import Json, print_json
from anyflow.commands.recipes import Hardware, Model, Overrides
from anyflow.recipe import load_recipe


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="stage/name, a YAML file, or a run's folder.")],
    overrides: Overrides = None,
    model: Model = None,
    hardware: Hardware = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs, instead of the recipe's; nodes have 8.", min=1)] = None,
    gpu_memory: Annotated[float, typer.Option(help="GB of one GPU.", min=1)] = 80.0,
    as_json: Json = False,
) -> None:
    """Plan: simulate a training step's memory on GPUs that need not be here, and find what makes it fit.

    \b
    Examples:
      anyflow plan forward/wan2.1-t2v-14b
      anyflow plan finetune/driving --model anyflow-wan2.1-t2v-14b --hardware 8gpu --gpu-memory 80
      anyflow plan forward/wan2.1-t2v-14b model.lora.enabled=false --gpus 16 --json
    """
    resolved = load_recipe(recipe, model=model, hardware=hardware, overrides=overrides or ())
    from anyflow.console import quiet_libraries
    from anyflow.plan import plan as work_out

    quiet_libraries()
    need = work_out(resolved, gpus=gpus, gpu_memory=gpu_memory)
    if as_json:
        print_json(need.to_json())
        return
    for line in need.lines():
        typer.echo(line)
