"""From a model's name to a page that is served: what can be refused is refused before weights are loaded."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from anyflow.backbone.controls import ControlSettings
from anyflow.backbone.files import read_json, resolve_folder, says_causal
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model, native_shape
from anyflow.evaluation.options import WayOptions
from anyflow.play.hands import Wheel
from anyflow.play.levers import Lever, levers_of
from anyflow.play.options import PlayOptions
from anyflow.play.player import Player
from anyflow.play.server import Facts, Site
from anyflow.play.starts import Start, starts_of
from anyflow.system.signals import sigterm_raises

if TYPE_CHECKING:
    from anyflow.data.decode import ClipShape


@dataclass(frozen=True)
class Playable:
    """A model that can be steered, its weights still in their files.

    Attributes:
        name: folder or hub id.
        controls: that it is told, as its configuration describes them.
        shape: of its clips; fps is that of its footage.
    """

    name: str
    controls: Mapping[str, Any]
    shape: ClipShape


def playable(model: str) -> Playable:
    """Look at a model without loading it.

    Raises:
        UserError: it is none, is not causal, is told no controls, or states alone.
    """
    check_model(model)
    config = read_json(resolve_folder(model) / "transformer" / "config.json")
    if not says_causal(config):
        raise UserError(
            f"--model {model} makes all frames at once: give a causal model, such as one that recipes/models/"
            "tiny-causal.yaml starts from"
        )
    told = ControlSettings.of(config)
    if told is None:
        raise UserError(
            f"--model {model} is told no controls: train one that is, by make finetune RECIPE=driving-control"
        )
    levers_of(told.controls)
    return Playable(model, told.controls, native_shape(model))


def player_of(model: Playable, asked: PlayOptions) -> tuple[Player, Facts]:
    """What plays a model, not loaded yet, and what the page says of it.

    Raises:
        UserError: the frame to start from cannot be read.
    """
    starts, note = starts_of(model.name, model.shape, asked.image, asked.data, asked.prompt)
    levers = levers_of(model.controls, {start.domain for start in starts})
    fps = asked.fps or model.shape.fps or 8.0
    states = [lever.label for lever in levers if lever.is_state]
    notes = [note] if note else []
    if states:
        notes.append(f"{', '.join(states)}: where things are, not what is done. Keys cannot steer by that.")
    name = Path(model.name).resolve().name
    starts = in_domain(starts, levers)
    player = Player(starts, Wheel(levers, fps), fps, asked.out / name, asked.seed)
    return player, Facts(name, levers, fps, (model.shape.width, model.shape.height), asked.steps, notes)


def in_domain(starts: Sequence[Start], levers: Sequence[Lever]) -> list[Start]:
    """The starts that can be steered; one of no domain is taken for the first that the model is told controls of.

    Raises:
        UserError: there is none.
    """
    known = list(dict.fromkeys(lever.domain for lever in levers))
    if "" in known:
        return list(starts)
    found = [start if start.domain else replace(start, domain=known[0]) for start in starts]
    found = [start for start in found if start.domain in known]
    if not found:
        raise UserError(
            f"--data is of the domain {starts[0].domain}, and the model is told controls of {' and '.join(known)} "
            "alone: name a card of one of them"
        )
    return found


def serve(model: Playable, asked: PlayOptions, listening: socket.socket) -> None:
    """Serve the page until Ctrl-C or SIGTERM comes; the model is loaded meanwhile.

    Raises:
        UserError: the model cannot be loaded.
    """
    player, facts = player_of(model, asked)
    port, token = listening.getsockname()[1], secrets.token_urlsafe(24)
    site = Site(facts, player, is_over=lambda: server.should_exit)
    config = uvicorn.Config(
        site.app(port, token),
        log_level="error",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
    )
    server = uvicorn.Server(config)

    def end_if_failed(loading: Future[None]) -> None:
        server.should_exit = server.should_exit or loading.exception() is not None

    loading = site.worker.submit(_load, player, model)
    loading.add_done_callback(end_if_failed)
    address = f"http://127.0.0.1:{port}/{token}/"
    print(address, flush=True)
    print("on this machine alone; Ctrl-C ends it", file=sys.stderr)
    if not asked.no_browser and has_screen():
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    try:
        with sigterm_raises(KeyboardInterrupt):
            server.run([listening])
    except KeyboardInterrupt:
        pass
    if not loading.done():
        os._exit(0)  # nothing is open; compiled libraries in the midst of their imports would abort
    site.worker.shutdown()  # the film is finished
    loading.result()


def _load(player: Player, model: Playable) -> None:
    from anyflow.evaluation.loaded import LoadedModel

    player.load(LoadedModel.of(model.name, WayOptions(), model.shape))


def has_screen() -> bool:
    """Whether a browser's window would be seen: else a text browser would take the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
