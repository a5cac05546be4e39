"""``anyflow data controls``: what a data set's controls hold, by its clips; and how ``data show`` tells them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from anyflow.cli.common import Card, Json, print_json

BARS = " ▁▂▃▄▅▆▇█"
FEW = 0.05
"""A share of entries worth a remark: 2 % lie beyond a card's range by what the range is."""


def controls(card: Card, as_json: Json = False) -> None:
    """Read widths and ranges of a data set's controls from its clips, and write them into its card.

    What the card tells already stays, but for the ranges. The rest is guessed from the clips and told: correct it in
    the card.

    \b
    Examples:
      anyflow data controls data/shards/driving/card.yaml
      anyflow data controls my-drives --json
    """
    from anyflow.data.card import load_card, plain_controls
    from anyflow.data.card_controls import write_controls
    from anyflow.data.control_ranges import measured_controls

    loaded = load_card(card)
    found, notes = measured_controls(loaded)
    write_controls(loaded, found)
    if as_json:
        print_json({"card": loaded.path, "controls": plain_controls(found), "notes": notes})
        return
    for name, control in plain_controls(found).items():
        typer.echo(f"{name:<10} {told_control(control)}")
    for note in notes:
        typer.echo(note)
    typer.echo(f"written to {loaded.path}" if found else "no clip has controls")


def told_control(control: str | Mapping[str, Any]) -> str:
    """A control of a card, in a line."""
    if isinstance(control, str):
        return f"{control} (in words alone: no condition)"
    from anyflow.data.controls import Control

    return f"{control['holds']} ({Control(**control).told()})"


def told_coverage(name: str, control: Mapping[str, Any]) -> Iterator[str]:
    """Which values the numbers of a control take, a line and a bar each."""
    misfits = f", {control['misfits']} of them unfit" if control["misfits"] else ""
    yield f"  {name:<10} in {control['clips']} of {control['read']} clips read{misfits}"
    for number in control["numbers"]:
        most = max(*number["counts"], 1)
        bar = "".join(BARS[-(-8 * count // most)] for count in number["counts"])
        label = f"{number['name']}{f' ({unit})' if (unit := number['unit']) else ''}"
        remarks = [
            *([f"{number['beyond']:.0%} beyond"] * (number["beyond"] >= FEW)),
            *([f"{number['unknown']:.0%} not known"] * (number["unknown"] >= FEW)),
            *(["never changes"] * number["still"]),
        ]
        line = f"             {label:<24} {number['from']:>10.4g} |{bar}| {number['to']:.4g}"
        yield line + f"   ({', '.join(remarks)})" * bool(remarks)
