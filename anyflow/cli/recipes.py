"""``anyflow recipes``: what ships, what a recipe resolves to, and whether all of them hold."""

from __future__ import annotations

from typing import Annotated

import typer

from anyflow.cli.common import Json, print_json
from anyflow.errors import UserError
from anyflow.recipe import describe, list_recipes, load_recipe, to_dict

app = typer.Typer(help="List, show and check recipes.", rich_markup_mode=None, invoke_without_command=True)

Model = Annotated[str | None, typer.Option("--model", help="A file of recipes/models, by name or path.")]
Hardware = Annotated[str | None, typer.Option("--hardware", help="A file of recipes/hardware, by name or path.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides by dotted key.")]


@app.callback()
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        show_list()


@app.command("list")
def show_list(as_json: Json = False) -> None:
    """List the stage, model and hardware files.

    \b
    Examples:
      anyflow recipes
      anyflow recipes list --json
    """
    found = list_recipes()
    if not found:
        raise UserError(
            "there are no recipes here: go to the project's folder, or install it from there (pip install -e .)"
        )
    if as_json:
        print_json(found)
        return
    titles = {folder: {"models": "--model", "hardware": "--hardware"}.get(folder, f"{folder}/") for folder in found}
    width = max(map(len, titles.values())) + 2
    for folder, names in found.items():
        typer.echo(f"{titles[folder]:<{width}}{', '.join(names)}")


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="stage/name, a YAML file, or a run's folder.")],
    overrides: Overrides = None,
    model: Model = None,
    hardware: Hardware = None,
    as_json: Json = False,
) -> None:
    """Show a recipe as it will run: every field, its value, where it was set, and what it means.

    \b
    Examples:
      anyflow recipes show finetune/driving
      anyflow recipes show finetune/driving optimizer.lr=1e-4 --model anyflow-wan2.1-t2v-1.3b --hardware 8gpu
      anyflow recipes show forward/wan2.1-t2v-14b --json
    """
    resolved = load_recipe(recipe, model=model, hardware=hardware, overrides=overrides or ())
    if as_json:
        print_json({"recipe": to_dict(resolved), "fields": [vars(row) for row in describe(resolved)]})
        return
    group = ""
    for row in describe(resolved):
        if row.key.partition(".")[0] != group:
            group = row.key.partition(".")[0]
            typer.secho(f"\n{group}", bold=True)
        typer.echo(f"  {row.key:<34} {row.value!s:<48} {row.source}\n      {row.meaning}")


@app.command("check")
def check(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="One recipe; without it every shipped one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check recipes: keys, types, ranges and the rules between fields, with each recipe's own defaults.

    \b
    Examples:
      anyflow recipes check
      anyflow recipes check my/recipe.yaml
    """
    stages = {folder: names for folder, names in list_recipes().items() if folder not in ("models", "hardware")}
    names = [recipe] if recipe else [f"{folder}/{name}" for folder, files in stages.items() for name in files]
    faults: dict[str, str | None] = {}
    for name in names:
        try:
            load_recipe(name)
            faults[name] = None
        except UserError as error:
            faults[name] = str(error)
    if as_json:
        print_json(faults)
    else:
        for name, fault in faults.items():
            typer.echo(f"{'wrong' if fault else 'ok':<6} {name}" + (f": {fault}" if fault else ""))
    bad = sum(fault is not None for fault in faults.values())
    if bad:
        raise UserError(f"{bad} of {len(faults)} recipes are wrong: see above")
