"""``anyflow data import``: footage in somebody's format to shards and a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anyflow.cli.common import Json, print_json
from anyflow.cli.options import with_options
from anyflow.data.importing.options import ImportOptions
from anyflow.system.engine_options import EngineOptions, engine_of
from anyflow.system.files import require_place

if TYPE_CHECKING:
    from anyflow.data.importing.finish import ImportReport
    from anyflow.data.importing.run import Progress

QUIET_SECONDS = 30.0
"""Between two lines of progress where output is not a terminal."""
NAMED = 20
"""Unusable recordings that are listed, at most."""
NAMED_UNREAD = 5
"""Names that are listed of each reason not to read something."""


@with_options
def import_footage(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The data set's folder.")],
    to: Annotated[Path, typer.Option(help="The new data set's folder.")],
    options: ImportOptions,
    engine: EngineOptions,
    as_json: Json = False,
) -> None:
    """Cut footage into clips with captions and controls: shards, a card and a held-out split. Broken off, it goes on.

    Unusable recordings are skipped and named; more than --error-budget of them stop the import.

    \b
    Examples:
      anyflow data import ~/lerobot/aloha --to data/shards/aloha --frames 81 --fps 15 --size 832x480
      anyflow data import /mnt/comma2k19 --to my-drives --default-caption domain --stride 10
      anyflow data import /shared/bdd100k --to /shared/drives --default-caption domain --engine ray
      anyflow data import my-videos --to my-data --domain games --caption "{title}. {caption}" --licence "own footage"
    """
    from anyflow.data.importing.run import import_dataset
    from anyflow.system.console import progress_line

    require_place(to, "--to")
    with progress_line("importing", plain_every=QUIET_SECONDS) as on_progress:

        def shown(done: Progress) -> None:
            on_progress(done.recordings, done.of, f"{done.clips} clips, {done.clips_per_second:.1f} clips/s")

        report = import_dataset(source, to, options, shown, engine_of(engine, options.workers))
    if as_json:
        print_json({"card": report.card, **report.to_dict()})
        return
    for line in _lines(report):
        typer.echo(line)


def _lines(report: ImportReport) -> list[str]:
    clips = ", ".join(f"{count} {split}" for split, count in report.clips.items())
    left_out = f", {sum(report.left_out.values())} left out ({_counted(report.left_out)})" if report.left_out else ""
    lines = [f"{report.format}: {report.found} recordings found, {report.taken} taken{left_out}: {clips} clips"]
    lines += [f"in one picture: {report.views}"] if report.views else []
    if report.dropped:
        lines.append(f"left out of the recordings: {_counted(report.dropped)}")
    if report.files:
        found, footage, descriptions, left_out = report.files.values()
        kinds = f"{footage} with footage, {descriptions} beside it, {sum(left_out.values())} left out"
        lines.append(f"files: {found} found, {kinds}")
    reasons: dict[str, list[str]] = {}
    for name, reason in report.unread:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        known = {**report.left_out, **report.files.get("left_out", {})}
        count = max(len(names), known.get(reason, 0))
        more = ", ..." if count > NAMED_UNREAD else ""
        lines.append(f"not read: {count} x {reason}: {', '.join(names[:NAMED_UNREAD])}{more}")
    for what, named in (("unusable:", report.unusable), ("no clip of", report.without)):
        lines += [f"{what} {name} ({reason})" for name, reason in named[:NAMED]]
        if len(named) > NAMED:
            lines.append(f"and {len(named) - NAMED} more, all in {report.card.parent / 'import.json'}")
    lines += [f"note: {note}" for note in report.notes[:NAMED]]
    if len(report.notes) > NAMED:
        lines.append(f"and {len(report.notes) - NAMED} more notes, all in {report.card.parent / 'import.json'}")
    lines.append(
        f"{report.card}   (see it by: anyflow data show {report.card.parent}; train by: data.card={report.card})"
    )
    return lines


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
