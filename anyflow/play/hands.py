"""From what hands do to what a model is told: keys held, a stick's place and sliders become numbers, frame by frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

from anyflow.play.levers import Lever

REACH_SECONDS = 0.4
"""From rest to an end of the range, and back, of a number that goes back."""
SWEEP_SECONDS = 2.0
"""From one end of the range to the other, of a number that stays."""


@dataclass(frozen=True)
class Hands:
    """What is done while a chunk is shown.

    Attributes:
        keys: key -> the seconds that it counts from the chunk's beginning: infinite while it is held; of one that was
            let go before the chunk began, as long as it was held.
        sticks: a gamepad's, to the right and up, from -1 to 1.
        sliders: number's place -> its value.
    """

    keys: Mapping[str, float] = field(default_factory=dict)
    sticks: tuple[float, float] = (0.0, 0.0)
    sliders: Mapping[int, float] = field(default_factory=dict)


class Wheel:
    """The numbers of a model's controls, moved smoothly within their ranges.

    Args:
        levers: one a number.
        fps: frames a second.
    """

    def __init__(self, levers: Sequence[Lever], fps: float) -> None:
        self.levers, self._fps = levers, fps
        self.begin()

    def begin(self, domain: str = "") -> None:
        """Back to where every number begins, for the first frame of a video of a domain."""
        self.values = [lever.begin for lever in self.levers]
        self._is_first, self._domain = True, domain

    def move(self, hands: Hands, frames: int) -> NDArray[np.float32]:
        """The numbers of the next frames, float32 ``[frames, W]``; NaN where none is known: of actions that would lead
        to a video's first frame, and of other domains."""
        rows = np.empty((frames, len(self.levers)), dtype=np.float32)
        for frame in range(frames):
            now = frame / self._fps
            for place, lever in enumerate(self.levers):
                self.values[place] = self._moved(place, lever, hands, now)
                is_known = lever.domain in ("", self._domain) and not (self._is_first and lever.is_action)
                rows[frame, place] = self.values[place] if is_known else np.nan
            self._is_first = False
        return rows

    def _moved(self, place: int, lever: Lever, hands: Hands, now: float) -> float:
        value = self.values[place]
        if lever.kind == "key":
            return float(_is_held(lever.more, hands, now))
        if lever.kind == "slider":
            value = hands.sliders.get(place, value)
        elif lever.rest is None:
            step = (lever.high - lever.low) / SWEEP_SECONDS / self._fps
            value += _push(lever, hands, now) * step
        else:
            push, rest = _push(lever, hands, now), lever.rest
            aim = rest + push * ((lever.high - rest) if push > 0 else (rest - lever.low))
            step = max(lever.high - rest, rest - lever.low) / REACH_SECONDS / self._fps
            value += float(np.clip(aim - value, -step, step))
        return float(np.clip(value, lever.low, lever.high))


def _is_held(codes: Sequence[str], hands: Hands, now: float) -> bool:
    return any(hands.keys.get(code, -inf) > now for code in codes)


def _push(lever: Lever, hands: Hands, now: float) -> float:
    """How far a number is pushed to its high end (1) or its low one (-1): by keys, else by the stick."""
    by_keys = _is_held(lever.more, hands, now) - _is_held(lever.less, hands, now)
    by_stick = 0.0 if lever.stick is None else lever.sign * hands.sticks[lever.stick]
    return float(np.clip(by_keys or by_stick, -1, 1))
