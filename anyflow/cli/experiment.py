"""``anyflow experiment``: run what is missing of an experiment, and write its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import Json, parse_names, parse_numbers, print_json

if TYPE_CHECKING:
    from anyflow.experiment.pieces import Piece
    from anyflow.experiment.schema import Experiment
    from anyflow.experiment.tasks import Task


def experiment(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A file of experiments/, or a path.")] = None,
    only: Annotated[str, typer.Option(help="Arms, and what they start from: for example forward,plain.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds: for example 0,1.")] = "",
    jobs: Annotated[
        int,
        typer.Option(
            help="Trainings and curves at once; the GPUs are dealt out in turn, the processors shared.", min=1
        ),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what is done and what is missing; run nothing.")
    ] = False,
    afresh: Annotated[
        bool, typer.Option("--afresh", help="Train and measure here what the committed results have, too.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the report of what there is; run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run an experiment: what is missing of its arms and seeds, then the report that answers its question.

    \b
    Examples:
      anyflow experiment
      anyflow experiment retention --dry-run
      anyflow experiment any-step --only flow-map --seeds 0
      anyflow experiment retention --jobs 8
      anyflow experiment any-step --report
      anyflow experiment any-step --afresh
    \b
    Start it again after an interruption: finished pieces stay, a training that was cut goes on. Exit codes as of
    anyflow train; 1: a piece failed, and the others were done.
    """
    from anyflow.experiment.load import load_experiment

    if name is None:
        _list(as_json)
        return
    found = load_experiment(name)
    from anyflow.experiment.pieces import pieces_of
    from anyflow.experiment.tasks import select, tasks_of

    every = pieces_of(found)
    numbers = parse_numbers(seeds, "--seeds", example="0,1") if seeds else ()
    chosen = select(found, every, parse_names(only), numbers)
    listed = tasks_of(found, chosen, afresh=afresh)
    if not report and not all(task.is_done for task in listed):  # a report of committed curves needs no clips
        from anyflow.experiment.ready import check_ready

        check_ready(found, chosen)
    if dry_run:
        print_json(_jobs_document(found, listed)) if as_json else _show_jobs(found, listed)
        return
    failed = {} if report else _run(found, chosen, jobs, afresh)
    _report(found, every, tasks_of(found, every, afresh=afresh), as_json, failed)
    if failed:
        raise typer.Exit(1)


def _list(as_json: bool) -> None:
    from anyflow.experiment.load import list_experiments, load_experiment

    known = {name: load_experiment(name).question for name in list_experiments()}
    if as_json:
        print_json(known)
        return
    for name, question in known.items():
        typer.echo(f"{name:<16}{question}")


def _run(found: Experiment, pieces: list[Piece], at_once: int, afresh: bool) -> dict[str, str]:
    from anyflow.experiment.children import Stopped
    from anyflow.experiment.execute import run_pieces

    try:
        return run_pieces(found, pieces, at_once, afresh=afresh)
    except Stopped as stop:
        typer.echo(f"\nStopped; to go on: anyflow experiment {found.file}", err=True)
        raise typer.Exit(stop.code) from None


def _report(found: Experiment, pieces: list[Piece], jobs: list[Task], as_json: bool, failed: dict[str, str]) -> None:
    from anyflow.experiment.report import write_report
    from anyflow.system.addresses import LOCAL_DATABASE, database_file, how_to_open
    from anyflow.system.console import quiet_libraries

    quiet_libraries()
    missing = sum(not job.is_done for job in jobs)
    folder, answers = write_report(found, pieces, jobs)
    if as_json:
        told = [{"say": a.claim.say, "verdict": a.verdict, "reasons": a.reasons} for a in answers]
        print_json({"experiment": found.name, "missing": missing, "failed": failed, "answers": told, "report": folder})
        return
    typer.echo(found.question)
    for answer in answers:
        typer.echo(f"  {answer.verdict:<14}{answer.claim.say}")
    for name, why in failed.items():
        typer.echo(f"  failed        {name}: {why}")
    if missing:
        typer.echo(f"{missing} trainings and curves are missing: anyflow experiment {found.file}")
    uri = pieces[0].tracking_uri
    in_mlflow = f"   in MLflow: {how_to_open(uri if database_file(uri) else LOCAL_DATABASE)}" if uri else ""
    typer.echo(f"report: {folder / 'report.html'}{in_mlflow}")


def _show_jobs(found: Experiment, jobs: list[Task]) -> None:
    from anyflow.experiment.tasks import left
    from anyflow.system.console import clock

    typer.echo(found.question)
    for job in jobs:
        time = "" if job.is_done else clock(job.seconds) if job.seconds is not None else "?"
        typer.echo(f"  {job.state:<8} {time:>8}  {job.title}{f' ({job.reason})' if job.reason else ''}")
    typer.echo(f"{len(jobs)} trainings and curves, {left(jobs, clock)}")


def _jobs_document(found: Experiment, jobs: list[Task]) -> dict[str, Any]:
    rows = [
        {
            "run": job.piece.run.path,
            "arm": job.piece.arm,
            "seed": job.piece.seed,
            "evaluates": job.card or None,
            "state": job.state,
            "reason": job.reason,
            "seconds": job.seconds,
        }
        for job in jobs
    ]
    return {"experiment": found.name, "question": found.question, "jobs": rows}
