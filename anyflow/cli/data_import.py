"""``anyflow data import``: footage in somebody's format to shards and a card."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import Json, parse_size, print_json
from anyflow.system.files import require_place

if TYPE_CHECKING:
    from anyflow.data.importing.finish import ImportReport
    from anyflow.data.importing.run import Progress

FORMATS = "lerobot, nuscenes, comma2k19, vpt, gf-minecraft, bdd100k, cosmos, huggingface, webdataset or folder"
QUIET_SECONDS = 30.0
NAMED = 20


def import_footage(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The data set's folder.")],
    to: Annotated[Path, typer.Option(help="The new data set's folder.")],
    format: Annotated[str | None, typer.Option(help=f"{FORMATS}; found out by itself.")] = None,
    domain: Annotated[str | None, typer.Option(help="driving, robotics, games, ...; without it the format's.")] = None,
    caption: Annotated[str | None, typer.Option(help='A template over fields: "A robot: {task}, {camera}".')] = None,
    captions: Annotated[Path | None, typer.Option(help="A .csv, .jsonl or .json of recordings and captions.")] = None,
    default_caption: Annotated[
        str | None, typer.Option(help="For recordings without any; 'domain': the domain's own. Else they are refused.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 81,
    fps: Annotated[float | None, typer.Option(help="Frames a second; without it those of the first recording.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; without it that of the first recording.")] = None,
    stride: Annotated[float | None, typer.Option(help="Seconds from clip to clip; without it end to end.")] = None,
    scene_cuts: Annotated[float, typer.Option(help="Change, in levels of 255, that is a scene cut; 0: none.")] = 30.0,
    min_motion: Annotated[float, typer.Option(help="Leave out clips that change less from frame to frame.")] = 0.0,
    clips: Annotated[int, typer.Option(help="Clips of one recording at most; 0: all.", min=0)] = 0,
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Keep clips that show the same.")] = False,
    heldout: Annotated[float, typer.Option(help="Share of episodes, scenes or routes that is held out.")] = 0.05,
    group_by: Annotated[str | None, typer.Option(help="Field that says what is never torn apart.")] = None,
    cameras: Annotated[str, typer.Option(help="Cameras, with commas; without it all.")] = "",
    limit: Annotated[int, typer.Option(help="Recordings at most, for a trial; 0: all.")] = 0,
    licence: Annotated[str, typer.Option(help="Of the footage, for the card.")] = "",
    description: Annotated[str, typer.Option(help="A sentence for the card.")] = "",
    error_budget: Annotated[float, typer.Option(help="Share of recordings that may be unusable.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the choice of what is held out.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.", min=0)] = 2,
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
    from anyflow.data.importing.captions import Captions, read_captions
    from anyflow.data.importing.options import ImportOptions
    from anyflow.data.importing.run import import_dataset

    require_place(to, "--to")
    named = read_captions(captions) if captions is not None else {}
    options = ImportOptions(
        format=format,
        domain=domain,
        licence=licence,
        description=description,
        captions=Captions(caption, named, default_caption),
        frames=frames,
        fps=fps,
        size=parse_size(size),
        stride=stride,
        cut_threshold=scene_cuts,
        min_motion=min_motion,
        most=clips,
        keep_duplicates=keep_duplicates,
        heldout=heldout,
        group_by=group_by,
        cameras=tuple(filter(None, (name.strip() for name in cameras.split(",")))),
        limit=limit,
        error_budget=error_budget,
        seed=seed,
        workers=workers,
    )
    report = import_dataset(source, to, options, _Printer())
    if as_json:
        print_json({"card": report.card, **report.to_dict()})
        return
    for line in _lines(report):
        typer.echo(line)


class _Printer:
    """One line on stderr that counts up on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        terminal, done = sys.stderr.isatty(), progress.recordings == progress.of
        if not (terminal or done or time.monotonic() - self._last > QUIET_SECONDS):
            return
        self._last = time.monotonic()
        left = "" if progress.seconds_left is None or done else f", {_duration(progress.seconds_left)} left"
        line = (
            f"{progress.recordings} of {progress.of} recordings, {progress.clips} clips, "
            f"{progress.clips_per_second:.1f} clips/s{left}"
        )
        print(
            f"\r{line:<78}" if terminal else line,
            end="" if terminal and not done else "\n",
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _lines(report: ImportReport) -> list[str]:
    facts: dict[str, Any] = report.to_dict()
    clips = ", ".join(f"{count} {split}" for split, count in facts["clips"].items())
    lines = [f"{report.format}: {report.recordings} recordings, {clips} clips"]
    if facts["dropped"]:
        lines.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in facts["dropped"].items()))
    lines += [f"unusable: {name} ({reason})" for name, reason in report.unusable[:NAMED]]
    if len(report.unusable) > NAMED:
        lines.append(f"and {len(report.unusable) - NAMED} more, all in {report.card.parent / 'import.json'}")
    lines.append(
        f"{report.card}   (see it by: anyflow data show {report.card.parent}; train by: data.card={report.card})"
    )
    return lines
