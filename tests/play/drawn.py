"""A world that is drawn: a bright dot goes to the right with the heading, and up with the speed. It knows no weights.

The server, the session and the page are the real ones; so what a key does can be read from a picture at once.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import uvicorn
from torch import Tensor

from anyflow.play import rollout
from anyflow.play.hands import Wheel
from anyflow.play.levers import levers_of
from anyflow.play.player import Player
from anyflow.play.server import Facts, Site
from anyflow.play.starts import Start
from anyflow.system.addresses import listen_here

DRIVING = {
    "actions": {
        "holds": "per frame: speed in m/s and heading in radians (negative is to the left) of the green car",
        "width": 2,
        "unit": ["m/s", "rad"],
        "numbers": ["speed", "heading"],
        "low": [6.0, -0.5],
        "high": [14.0, 0.5],
    }
}
TOKEN = "the-token"
HEIGHT, WIDTH = 64, 96


class DrawnRollout:
    """What :class:`anyflow.play.rollout.Rollout` is asked for."""

    made: ClassVar[list[int]] = []
    """The steps of each chunk that was asked for."""
    seconds = 0.0
    """That a chunk takes."""

    def __init__(self, model: Any, caption: str, start: Tensor | None = None, seed: int = 0) -> None:
        self.next_frames, self.ground = 1, 0 if start is None else int(start.float().mean())

    def chunk(self, controls: Tensor, num_steps: int) -> Tensor:
        time.sleep(self.seconds)
        self.made.append(num_steps)
        assert len(controls) == self.next_frames
        self.next_frames = 8
        known = [[number for number in row if not np.isnan(number)] or [10.0, 0.0] for row in controls.tolist()]
        return torch.from_numpy(np.stack([draw(self.ground, *row) for row in known]))


def draw(ground: int, speed: float, heading: float) -> np.ndarray:
    """A dot whose place tells the controls, on a ground that tells the start."""
    picture = np.full((HEIGHT, WIDTH, 3), ground, dtype=np.uint8)
    x, y = round(WIDTH * (0.5 + 0.8 * heading)), round(HEIGHT * (0.9 - 0.8 * (speed - 6) / 8))
    picture[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = 255
    return picture


def replace_rollouts(set_attribute: Callable[[Any, str, Any], Any]) -> None:
    """Draw instead of sampling, in this process."""
    set_attribute(rollout, "Rollout", DrawnRollout)
    set_attribute(DrawnRollout, "made", [])


def make_player(folder: Path, controls: Any = None, domains: Sequence[str] = ("", "", "")) -> tuple[Player, Facts]:
    """A player of the drawn world, and what its page says; a start for each domain."""
    levers = levers_of(controls or DRIVING)
    frames = [np.full((1, 1, HEIGHT, WIDTH, 3), 60 * number, dtype=np.uint8) for number in range(len(domains))]
    starts = [Start(f"clip {n}", "a road", *of) for n, of in enumerate(zip(frames, domains, strict=True))]
    player = Player(starts, Wheel(levers, 8.0), 8.0, folder / "film")
    return player, Facts("drawn", levers, 8.0, (WIDTH, HEIGHT), 2, [])


class Served:
    """A page in words: it reads the stream, and says what it wishes."""

    def __init__(self, port: int, player: Player) -> None:
        self.port, self.player = port, player
        self.address = f"http://127.0.0.1:{port}/{TOKEN}/"
        self.number = 0

    def open(self) -> Any:
        """The stream; its first line, the facts, was read."""
        stream = urllib.request.urlopen(self.address + "stream", timeout=30)
        self.facts = json.loads(stream.readline())
        return stream

    def tell(self, **wish: Any) -> int:
        """The status of the answer."""
        self.number += 1
        usual = {"keys": [], "sticks": [0, 0], "sliders": {}, "steps": 2, "paused": False, "shown": 0, "run": 0}
        body = {**usual, "start": 0, "film": 0, "seat": self.facts["seat"], "number": self.number, **wish}
        request = urllib.request.Request(self.address + "wish", json.dumps(body).encode())
        return urllib.request.urlopen(request, timeout=30).status


@contextmanager
def serving(folder: Path, load: bool = True, **world: Any) -> Iterator[Served]:
    """The drawn world, served from a thread; ``world`` is :func:`make_player`'s."""
    player, facts = make_player(folder, **world)
    if load:
        player._model, player.is_ready = object(), True  # type: ignore[assignment]
    with listen_here(0) as listening:
        port = listening.getsockname()[1]
        over = threading.Event()
        site = Site(facts, player, over.is_set)
        app = site.app(port, TOKEN)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield Served(port, player)
        finally:
            over.set()
            server.should_exit = True
            thread.join(30)
            site.worker.shutdown()
            assert not thread.is_alive()
