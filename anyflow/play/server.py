"""The page's server: one stream of chunks to the page, and the page's wishes back, by plain HTTP on 127.0.0.1.

Starlette and uvicorn come with MLflow. No package for websockets does, and none is needed: the chunks are lines of JSON
in one answer that does not end, and each change at the keyboard is a small request.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from anyflow.errors import UserError, first_line
from anyflow.play.guard import Guard
from anyflow.play.levers import Lever
from anyflow.play.options import STEPS
from anyflow.play.player import Made, Player, jpeg
from anyflow.play.session import Session, read_wish

FILES = {"": "page.html", "page.css": "page.css", "page.js": "page.js"}
"""The page: path -> file."""
TAKEN = "Another page steers this model already: close that one, then this one takes over."
GONE = "The stream to this page has ended: reload it."
LARGEST_WISH = 2**16
"""Bytes of a request."""
LOOK_UP_SECONDS = 0.25
"""How often a stream that waits looks whether the command ends."""


@dataclass(frozen=True)
class Facts:
    """What the page shows.

    Attributes:
        model: name.
        levers: of its controls.
        fps: of its footage.
        size: width and height of its frames.
        steps: to begin with.
        notes: sentences that are to be said.
    """

    model: str
    levers: list[Lever]
    fps: float
    size: tuple[int, int]
    steps: int
    notes: list[str]


class Site:
    """The page, its stream and its wishes.

    Args:
        facts: what the page shows.
        player: makes the chunks.
        is_over: whether the command ends.
    """

    def __init__(self, facts: Facts, player: Player, is_over: Callable[[], bool]) -> None:
        self._facts, self._player, self._is_over = facts, player, is_over
        self._session: Session | None = None
        self._seat = 0
        self._heard = asyncio.Event()
        self.worker = ThreadPoolExecutor(1, "player")
        """The one thread that the player works in: torch keeps a team of threads for each that asks it."""

    def app(self, port: int, token: str) -> Guard:
        """The application, guarded."""
        files = [Route(f"/{token}/{path}", self._file) for path in FILES]
        own = [Route(f"/{token}/stream", self._stream), Route(f"/{token}/wish", self._wish, methods=["POST"])]
        return Guard(Starlette(routes=[*files, *own]), port, token)

    async def _file(self, request: Request) -> Response:
        return FileResponse(Path(__file__).with_name("page") / FILES[request.url.path.rpartition("/")[2]])

    async def _wish(self, request: Request) -> Response:
        """What the page asks for, whole."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_WISH:
                return PlainTextResponse("the request is too large", status_code=413)
        session = self._session
        try:
            asked = json.loads(body)
            wish = read_wish(asked, self._facts.levers, len(self._player.starts))
            if session is None or asked.get("seat") != self._seat:
                return PlainTextResponse(TAKEN if session else GONE, status_code=409)
        except (ValueError, RecursionError, UserError) as error:
            return PlainTextResponse(first_line(error), status_code=400)
        session.hear(wish, time.monotonic())
        self._heard.set()
        return Response(status_code=204)

    async def _stream(self, request: Request) -> Response:
        """The chunks of the one page that steers."""
        if self._session is not None:
            return PlainTextResponse(TAKEN, status_code=409)
        self._session = Session(self._facts.fps, self._facts.steps)
        self._seat += 1
        return _Stream(self._lines(self._session), self._leave)

    def _leave(self) -> None:
        """The page is gone: its film is finished behind the chunk in work, and the next page may steer."""
        self._session = None
        self.worker.submit(self._record, False)

    async def _lines(self, session: Session) -> AsyncIterator[str]:
        work = asyncio.get_running_loop().run_in_executor
        yield _line("facts", seat=self._seat, all_steps=STEPS, starts=self._starts(), **asdict(self._facts))
        while not self._player.is_ready and not self._is_over():
            await asyncio.sleep(0.05)
        while not self._is_over():
            wanted = session.take_film()
            if wanted is not None:
                yield _line("film", **await work(self.worker, self._record, wanted))
            delay = session.due(time.monotonic())
            if delay == 0:
                wish, task = session.wish, session.take(time.monotonic())
                made = await work(self.worker, self._player.make, task)
                session.note(made)
                if made.trouble:
                    yield _line("film", said=made.trouble, is_recording=False)
                yield _chunk(session, made, wish=wish.number, run=wish.run, steps=wish.steps, start=task.start)
            else:
                await self._listen(LOOK_UP_SECONDS if delay is None else min(delay, LOOK_UP_SECONDS))
        yield _line("over")

    async def _listen(self, seconds: float) -> None:
        """Wait for a wish, and no longer."""
        self._heard.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), seconds)

    def _record(self, wanted: bool) -> dict[str, Any]:
        """Begin or end the film."""
        said = self._player.record(wanted)
        if said:
            print(said, file=sys.stderr)
        return {"said": said, "is_recording": self._player.is_recording}

    def _starts(self) -> list[dict[str, Any]]:
        return [
            {
                "label": start.label,
                "domain": start.domain,
                "jpeg": None if start.pixels is None else _text(jpeg(start.pixels[0, 0])),
            }
            for start in self._player.starts
        ]


class _Stream(StreamingResponse):
    """Lines of JSON; whatever ends them, ``on_end`` is called."""

    def __init__(self, lines: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _chunk(session: Session, made: Made, **asked: int | None) -> str:
    pace = session.pace
    frames = [_text(frame) for frame in made.frames]
    speed = {"rate": round(pace.rate, 2), "is_behind": pace.is_behind, "seconds": session.on_show}
    return _line("chunk", number=session.made, frames=frames, values=made.values, **speed, **asked)


def _line(kind: str, **facts: Any) -> str:
    return json.dumps({"kind": kind, **facts}) + "\n"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
