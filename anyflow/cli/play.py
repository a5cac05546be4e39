"""``anyflow play``: a causal model steered by keyboard, in a browser on this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from anyflow.cli.common import Model
from anyflow.cli.options import with_options
from anyflow.errors import UserError
from anyflow.play.options import PlayOptions
from anyflow.system.addresses import listen_here
from anyflow.system.files import require_place

USUAL = "data/models/tiny-world"


@with_options
def play(options: PlayOptions, model: Model = USUAL) -> None:
    """Steer a causal model by keyboard or gamepad, in a page that this machine alone can open. Ctrl-C ends it.

    The arrows (or WASD) move the model's controls; the page says which key does what, and changes the number of steps.

    \b
    Examples:
      anyflow play
      anyflow play --model runs/finetune-driving-control-tiny-causal-001 --image start.png
      anyflow play --model runs/finetune-games-control-tiny-causal-001 --data games --steps 4
      anyflow play --port 8000 --no-browser
    """
    options.check()
    if model == USUAL and not Path(model).is_dir():
        raise UserError(
            f"{USUAL} is not here: take it from the project's repository, or give --model with a run of "
            "make finetune RECIPE=driving-control"
        )
    require_place(options.out, "--out")
    with listen_here(options.port) as listening:
        from anyflow.play.serve import playable, serve

        serve(playable(model), options, listening)
    raise typer.Exit(0)
