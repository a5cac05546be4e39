"""What the person at the page asks for, as far as the next chunk needs to know. Pure: times come in, nothing waits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyflow.errors import UserError
from anyflow.play.hands import Hands
from anyflow.play.levers import Lever
from anyflow.play.options import STEPS
from anyflow.play.pace import Pace
from anyflow.play.player import Made, Task

MOST_KEYS = 32
"""That are held at once: nobody has more fingers."""


@dataclass(frozen=True)
class Wish:
    """All that the page asks for at a time; the newest one counts.

    Attributes:
        number: wishes count up; one that arrives late is forgotten.
        keys: those held.
        sticks: the gamepad's.
        sliders: number's place -> its value.
        steps: of the sampler.
        is_paused: whether no further chunk is to be made.
        shown: the number of the chunk that the page has begun to show.
        run: counts up with each new beginning.
        start: the frame that the run begins from.
        film: counts the presses of the button: odd while a film is to be written.
    """

    number: int = 0
    keys: frozenset[str] = frozenset()
    sticks: tuple[float, float] = (0.0, 0.0)
    sliders: Mapping[int, float] = field(default_factory=dict)
    steps: int = 2
    is_paused: bool = False
    shown: int = 0
    run: int = 0
    start: int = 0
    film: int = 0


def read_wish(body: Any, levers: Sequence[Lever], starts: int) -> Wish:
    """A wish as the page writes it, in JSON.

    Raises:
        UserError: it is malformed, or asks for what there is not.
    """
    try:
        sticks = [float(value) for value in body["sticks"]]
        sliders = {int(place): float(value) for place, value in body["sliders"].items()}
        keys = frozenset(str(key)[:32] for key in body["keys"][:MOST_KEYS])
        counts = [int(body[name]) for name in ("number", "steps", "shown", "run", "start", "film")]
        is_paused = bool(body["paused"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError("the page's request is malformed: reload the page") from error
    number, steps, shown, run, start, film = counts
    is_sane = len(sticks) == 2 and all(map(math.isfinite, [*sticks, *sliders.values()])) and steps in STEPS
    if not is_sane or not 0 <= start < starts or not all(0 <= place < len(levers) for place in sliders):
        raise UserError("the page asks for what there is not: reload it")
    right, up = (max(-1.0, min(1.0, stick)) for stick in sticks)
    return Wish(number, keys, (right, up), sliders, steps, is_paused, shown, run, start, film)


class Session:
    """The time at the keyboard of one person.

    Keys count as they are when a chunk is begun, and each counts in one chunk at least, however short it was pressed.
    No more than one chunk is ever ahead of what is seen.

    Args:
        fps: of the footage.
        steps: of the sampler, to begin with.
    """

    def __init__(self, fps: float, steps: int) -> None:
        self.wish = Wish(steps=steps)
        self.pace = Pace(fps)
        self.made = 0
        """Number of the newest chunk."""
        self._run: int | None = None
        self._film = 0
        self._pressed: dict[str, float] = {}  # key -> when it was pressed, or the last chunk begun
        self._taps: dict[str, float] = {}  # key -> for how long it was held since then, if it was let go
        self._shown_at = 0.0
        self._on_show = 0.0
        self._next_frames = 1

    def hear(self, wish: Wish, now: float) -> bool:
        """Take a wish, unless a newer one has come already; whether it was taken."""
        if wish.number <= self.wish.number:
            return False
        for key in self.wish.keys - wish.keys:
            self._taps[key] = self._taps.get(key, 0.0) + now - self._pressed.pop(key, now)
        for key in wish.keys - self.wish.keys:
            self._pressed[key] = now
        if wish.shown == self.made and self.wish.shown != self.made:
            self._shown_at = now
        if wish.steps != self.wish.steps:
            self.pace.forget()
        self.wish = wish
        return True

    def due(self, now: float) -> float | None:
        """Seconds until the next chunk has to be begun; None: not before the page says something."""
        if self.wish.run != self._run:
            return 0.0
        if self.wish.is_paused or self.wish.shown != self.made:
            return None
        return self.pace.wait(self._shown_at, self._on_show, now, self._next_frames)

    def take(self, now: float) -> Task:
        """What the next chunk, which is begun now, is made of."""
        wish, is_new = self.wish, self.wish.run != self._run
        held = dict.fromkeys(wish.keys, math.inf)
        taps = {} if is_new else {key: max(seconds, 1e-9) for key, seconds in self._taps.items()}
        self._taps, self._pressed = {}, dict.fromkeys(wish.keys, now)
        self._run = wish.run
        return Task(Hands({**taps, **held}, wish.sticks, wish.sliders), wish.steps, wish.start if is_new else None)

    def take_film(self) -> bool | None:
        """Whether a film is to be begun (True) or ended (False); None: nothing is new. A press counts once."""
        if self.wish.film == self._film:
            return None
        self._film = self.wish.film
        return self._film % 2 == 1

    def note(self, made: Made) -> None:
        """A chunk was made."""
        self.made += 1
        frames = len(made.frames)
        if not made.is_given:
            self.pace.note(frames, made.seconds)
        self._on_show = frames / self.pace.fps if made.is_given else self.pace.on_show(frames)
        self._next_frames = made.next_frames

    @property
    def on_show(self) -> float:
        """Seconds for which the newest chunk is to be shown."""
        return self._on_show
