"""``anyflow compare``: runs or arms side by side, and what differs between them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import Json, print_json
from anyflow.errors import UserError
from anyflow.system.addresses import LOCAL_DATABASE

if TYPE_CHECKING:
    from anyflow.evaluation.statistics import Estimate
    from anyflow.tracking.comparison import Side


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="A B [C]", help="Run folders, arms, evaluations, or MLflow run ids.")
    ],
    uri: Annotated[str, typer.Option(help="MLflow's database or server, for run ids.")] = LOCAL_DATABASE,
    as_json: Json = False,
) -> None:
    """Compare two or three runs: first what differs in recipe, data and commit, then the figures.

    \b
    Examples:
      anyflow compare runs/finetune-driving-tiny-open-001 runs/finetune-driving-tiny-open-002
      anyflow compare runs/experiments/retention/plain runs/experiments/retention/default
      anyflow compare experiments/results/causal/measured/base-text experiments/results/causal/measured/tuned-text
    \b
    An arm of an experiment stands for all of its seeds. A star marks the better one where the intervals are apart;
    without an interval nothing is marked.
    """
    if not 2 <= len(runs) <= 3:
        raise UserError(f"name two or three runs, not {len(runs)}")
    from anyflow.tracking.comparison import SEEN_GIVEN, differences, figure_rows, is_given_unlike, read_side, unlike

    sides = [read_side(text, uri) for text in runs]
    apart, rows = differences(sides), figure_rows(sides)
    if as_json:
        figures = [
            {"data": key[0], "metric": key[1], "steps": key[2], "better": better}
            | {"values": [asdict(value) if value else None for value in values]}
            for key, values, better in rows
        ]
        print_json({"sides": [side.name for side in sides], "differences": dict(apart), "figures": figures})
        return
    _show(sides, apart, rows)
    if settings := unlike(sides):
        typer.echo(f"no star: they were measured with other {' and '.join(settings)}, so the figures do not compare")
        return
    typer.echo("* better, the intervals being apart; [95 % interval] where there is one")
    if is_given_unlike(sides):
        typer.echo(f"no star at {', '.join(SEEN_GIVEN)}: not all were given the same frames, which they are read with")


def _show(sides: list[Side], apart: list[tuple[str, list[str]]], rows: list[Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if _is_terminal() else 200)
    told = Table("what differs", *(side.name for side in sides), box=box.SIMPLE_HEAD)
    for key, values in apart:
        told.add_row(key, *values)
    without = [side.name for side in sides if not side.recipe]
    if without and len(without) < len(sides):
        typer.echo(f"recipes are not compared: none is known of {', '.join(without)}")
    known = all(side.recipe or side.stands_on for side in sides)
    console.print(told if apart else f"recipe, data and commit are {'the same' if known else 'not known'}")
    table = Table("figure", "steps", box=box.SIMPLE_HEAD)
    for side in sides:
        table.add_column(side.name, justify="right")
    for (data, metric, steps), values, better in rows:
        cells = [_written(value) + (" *" if index == better else "  ") for index, value in enumerate(values)]
        table.add_row(f"{data} {metric}".strip(), str(steps), *cells)
    console.print(table if rows else "none of them was measured")


def _is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()


def _written(value: Estimate | None) -> str:
    if value is None:
        return "-"
    interval = f" [{value.low:.3g}, {value.high:.3g}]" if value.low is not None else ""
    return f"{value.mean:.4g}{interval}"
