"""``anyflow doctor``: what this machine does with the project, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anyflow.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError
from anyflow.system.files import require_place
from anyflow.system.signals import Terminated, sigterm_raises


def doctor(
    only: Annotated[
        str,
        typer.Option(
            help="Which, with commas: machine, attention, step, vae, devices, compile, resume, derivative, ranks."
        ),
    ] = "",
    minutes: Annotated[float, typer.Option(help="Time for all; what does not fit any more is left out.", min=0.1)] = 7,
    out: Annotated[Path | None, typer.Option(help="A file (.jsonl) to write the lines to as well.")] = None,
) -> None:
    """Doctor: examine this machine, its first GPU or its CPU, and print a line of JSON an item.

    The machine; attention by every backend; a training step's time and memory, beside what anyflow plan says; the
    autoencoder; the device of every phase of a training. Then what torch.compile makes of the stages, whether a killed
    run resumes bitwise, what bfloat16 leaves of the finite difference, how GPUs are connected. It downloads nothing.

    \b
    Examples:
      anyflow doctor
      anyflow doctor --only attention,vae
      anyflow doctor --minutes 15 --out doctor.jsonl
    \b
    Exit codes: 0 all that ran is well; 1 something is wrong: the last line says what, and what to do.
    """
    from anyflow.doctor.items import items_named
    from anyflow.doctor.running import examine
    from anyflow.doctor.telling import Written, for_people, verdict

    items = [] if only.strip() == "machine" else items_named(only)
    if out is not None:
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise UserError(f"--out {out} cannot be written: name a file in a folder that exists")
        require_place(out.absolute().parent, "--out in")
    written = Written(out)
    try:
        with sigterm_raises(Terminated):  # what it has started is ended with it
            for line in examine(items, minutes):
                typer.echo(written.add(line))
                typer.echo("\n".join(for_people(line)), err=True)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Terminated:
        raise typer.Exit(EXIT_PREEMPTED) from None
    last = verdict(written.lines)
    typer.echo(written.add(last))
    typer.echo(last["verdict"], err=True)
    raise typer.Exit(0 if last["ok"] else 1)
