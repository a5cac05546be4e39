"""``anyflow data import``: footage in somebody's format to shards and a card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import Json, print_json
from anyflow.cli.options import with_options
from anyflow.data.importing.options import ImportOptions
from anyflow.system.files import require_place

if TYPE_CHECKING:
    from anyflow.data.importing.finish import ImportReport
    from anyflow.data.importing.run import Progress

QUIET_SECONDS = 30.0
"""Between two lines of progress where output is not a terminal."""
NAMED = 20
"""Unusable recordings that are listed, at most."""


@with_options
def import_footage(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The data set's folder.")],
    to: Annotated[Path, typer.Option(help="The new data set's folder.")],
    options: ImportOptions,
    as_json: Json = False,
) -> None:
    """Cut footage into clips with captions and controls: shards, a card and a held-out split. Broken off, it goes on.

    Unusable recordings are skipped and named; more than --error-budget of them stop the import.

    \b
    Examples:
      anyflow data import ~/lerobot/aloha --to data/shards/aloha --frames 81 --fps 15 --size 832x480
      anyflow data import /mnt/comma2k19 --to my-drives --default-caption domain --stride 10
      anyflow data import my-videos --to my-data --domain games --caption "{title}. {caption}" --licence "own footage"
    """
    from anyflow.data.importing.run import import_dataset
    from anyflow.system.console import progress_line

    require_place(to, "--to")
    with progress_line("importing", plain_every=QUIET_SECONDS) as on_progress:

        def shown(done: Progress) -> None:
            on_progress(done.recordings, done.of, f"{done.clips} clips, {done.clips_per_second:.1f} clips/s")

        report = import_dataset(source, to, options, shown)
    if as_json:
        print_json({"card": report.card, **report.to_dict()})
        return
    for line in _lines(report):
        typer.echo(line)


def _lines(report: ImportReport) -> list[str]:
    facts: dict[str, Any] = report.to_dict()
    clips = ", ".join(f"{count} {split}" for split, count in facts["clips"].items())
    lines = [f"{report.format}: {report.recordings} recordings, {clips} clips"]
    if report.views:
        lines.append(f"in one picture: {report.views}")
    if facts["dropped"]:
        lines.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in facts["dropped"].items()))
    lines += [f"unusable: {name} ({reason})" for name, reason in report.unusable[:NAMED]]
    if len(report.unusable) > NAMED:
        lines.append(f"and {len(report.unusable) - NAMED} more, all in {report.card.parent / 'import.json'}")
    lines += [f"no clip of {name} ({reason})" for name, reason in report.without[:NAMED]]
    if len(report.without) > NAMED:
        lines.append(f"and of {len(report.without) - NAMED} more, all in {report.card.parent / 'import.json'}")
    lines += [f"note: {note}" for note in report.notes]
    lines.append(
        f"{report.card}   (see it by: anyflow data show {report.card.parent}; train by: data.card={report.card})"
    )
    return lines
