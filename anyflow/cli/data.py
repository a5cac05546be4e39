"""``anyflow data``: render, import, show, check and encode footage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anyflow.cli.common import Card, Json, Model, print_json
from anyflow.cli.data_controls import controls, told_control, told_coverage
from anyflow.cli.data_encode import encode
from anyflow.cli.data_import import import_footage
from anyflow.cli.options import with_options
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model
from anyflow.simulators.options import RenderOptions
from anyflow.system.files import require_place

app = typer.Typer(help="Render, import, show, check and encode footage.", rich_markup_mode=None, no_args_is_help=True)


@app.command("make")
@with_options
def make(
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="driving, driving-open, robotics or games.")],
    options: RenderOptions,
    out: Annotated[Path | None, typer.Option(help="A new folder; without it data/shards/DOMAIN.")] = None,
    as_json: Json = False,
) -> None:
    """Render a domain's clips with its simulator into shards and a card (needs: pip install -e '.[sim]').

    \b
    Examples:
      anyflow data make driving --clips 2000
      anyflow data make driving-open --clips 3000
      anyflow data make games --clips 500 --seed 7 --out data/shards/games-7
      anyflow data make driving --clips 360 --look country --out data/shards/driving-country
    """
    from anyflow.simulators.make import make_dataset
    from anyflow.system.console import progress_line

    require_place(out or Path("data/shards"), "--out" if out else "the folder for shards,")
    with progress_line("rendering") as on_progress:
        card = make_dataset(domain, options, out, on_progress)
    if as_json:
        print_json({"card": card, "clips": options.clips, "heldout": options.heldout, "seed": options.seed})
    else:
        typer.echo(f"{card}   (see it by: anyflow data show {card.parent}; train on it by: data.card={card})")


app.command("import")(import_footage)
app.command("encode")(encode)
app.command("controls")(controls)


@app.command("show")
def show(
    card: Card,
    split: Annotated[str, typer.Option(help="Split of the contact sheet.")] = "train",
    count: Annotated[int, typer.Option(help="Clips on the contact sheet; 0: no sheet.", min=0)] = 12,
    sheet: Annotated[Path | None, typer.Option(help="Its file; without it runs/sheets/CARD-SPLIT.png.")] = None,
    as_json: Json = False,
) -> None:
    """Show a data set: its card, counts, captions, labels, and a picture of its first clips.

    \b
    Examples:
      anyflow data show driving
      anyflow data show games --split heldout --count 6 --sheet games.png
      anyflow data show data/shards/driving --json
    """
    from anyflow.data.contact_sheet import contact_sheet
    from anyflow.data.describe import describe_card

    facts = describe_card(card)
    if split not in facts["splits"]:
        raise UserError(f"--split {split!r} is not in the card: it has {', '.join(facts['splits'])}")
    path = sheet or Path("runs/sheets") / f"{facts['name']}-{split}.png"
    if count:
        require_place(path.parent, "--sheet in")
    picture = contact_sheet(card, split, count, path) if count else None
    if as_json:
        print_json({**facts, "sheet": picture})
        return
    for line in _lines(facts):
        typer.echo(line)
    if picture is not None:
        typer.echo(f"\ncontact sheet: {picture}")


def _lines(facts: dict[str, Any]) -> list[str]:
    """What ``show`` prints of :func:`anyflow.data.describe.describe_card`."""
    clip = facts["clip"]
    lines = [
        f"{facts['name']} ({facts['domain']}): {facts['description']}",
        f"  clips      {clip['frames']} frames of {clip['width']}x{clip['height']} at {clip['fps']:g} frames a second"
        if clip["frames"] and clip["fps"]
        else "  clips      of any length and size: the card does not say",
        f"  licence    {facts['licence']}",
    ]
    lines += [f"  {name:<10} {told_control(control)}" for name, control in facts["controls"].items()]
    replaced = " (the card's stands for all of them)" if facts["replace_captions"] else ""
    for split, part in facts["splits"].items():
        captions = part["captions"]
        hours = "" if part["hours"] is None else f", {part['hours']:.2g} h"
        size = f"{part['shards']} shards, {part['bytes'] / 1e6:.1f} MB{hours}"
        shapes = ", ".join(f"{shape} {share:.1%}" for shape, share in part["shapes"].items()) or "not noted"
        lines += [
            f"\n{split}: {part['clips']} clips in {size}",
            f"  shapes     {shapes}",
            f"  captions   {captions['distinct']} distinct, {captions['missing']} missing{replaced}, "
            f"{captions['mean_words']} words on average, vocabulary {captions['vocabulary']}",
            f"             often: {', '.join(captions['top_words'])}",
        ]
        if part.get("read", part["clips"]) < part["clips"]:
            lines.append(f"             of the first {part['read']} clips; the others were not read")
        lines += [f"  {line}" for line in part.get("left_out", ())]
        for label, values in part["attributes"].items():
            told = ", ".join(f"{value} {n}" for value, n in values.items()) if isinstance(values, dict) else values
            lines.append(f"  {label:<10} {told}")
        for name, control in part["controls"].items():
            lines += told_coverage(name, control)
    return lines


@app.command("check")
def check(
    card: Card,
    fast: Annotated[bool, typer.Option("--fast", help="Hashes and descriptions only; decode nothing.")] = False,
    workers: Annotated[int, typer.Option(help="Processes; 0: this one.", min=0)] = 2,
    as_json: Json = False,
) -> None:
    """Read a whole data set and report every problem: shards against their index, clips against the card, every frame.

    \b
    Examples:
      anyflow data check driving
      anyflow data check data/shards/driving/card.yaml --fast --json
    """
    from anyflow.data.check import check_card
    from anyflow.system.console import progress_line

    with progress_line("checking") as on_progress:
        problems = check_card(card, decode=not fast, workers=workers, on_progress=on_progress)
    if as_json:
        print_json({"card": card, "problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
    if problems:
        raise UserError(f"{card} has {len(problems)} problems: repair them, or make or fetch the shards again")
    if not as_json:
        typer.echo(f"{card} is whole")


@app.command("probe")
def probe(
    card: Card,
    model: Model = "data/models/tiny",
    as_json: Json = False,
) -> None:
    """Train the probe that judges generated clips of a data set by its own labels (once), and report how good it is.

    \b
    Examples:
      anyflow data probe driving
      anyflow data probe games-full --json
    """
    check_model(model)
    from anyflow.data.find import find_card

    find_card(card, "")
    from anyflow.evaluation.models import native_shape
    from anyflow.evaluation.probe import probe_of
    from anyflow.system.console import progress_line

    shape = native_shape(model)
    with progress_line("training the probe") as on_progress:
        made = probe_of(card, shape, on_progress=on_progress)
    if as_json:
        print_json({"card": card, "domain": made.domain, "accuracy": made.accuracy, "labels": made.labels})
    else:
        typer.echo("\n".join(made.notes()))
