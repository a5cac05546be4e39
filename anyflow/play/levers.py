"""Which key, stick or slider moves which number of a model's controls, read from their names, units and ranges.

Two continuous numbers are moved by keys: one by up and down, one by left and right. One that means "no action" at
zero goes back there when it is let go (a wheel, a gripper's motion); a speed stays. A number of a multi-hot control is
a key that is held. All further numbers are sliders, and so are states: where a thing is follows from what is done.

A model of several domains has controls of each (``driving.actions``, ``games.actions``). They share the keys, since a
video is of one domain: of the other domains' numbers nothing is known in it, as in the clips that it was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from anyflow.data.controls import Control
from anyflow.data.wanted import described
from anyflow.errors import UserError

Kind = Literal["axis", "key", "slider"]

TURN = re.compile(r"steer|turn|head|yaw|angle|curv|left|right|^d?x$", re.IGNORECASE)
"""Names of numbers that go with left and right."""
SPEED = re.compile(r"speed|veloc|\b(m/s|km/h|mph)\b", re.IGNORECASE)
"""Names and units of numbers that stay when they are let go."""
STATE = re.compile(r"traject|posit|pose|state|observ", re.IGNORECASE)
"""Names of controls that say where a thing is."""
TO_THE_LEFT = re.compile(r"turn_?left|counter-?clockwise|(?<!is )(?<!negative )to the left", re.IGNORECASE)
"""Of a number, or in its unit or description: more of it goes to the left."""

UP, DOWN, LEFT, RIGHT = ("ArrowUp", "KeyW"), ("ArrowDown", "KeyS"), ("ArrowLeft", "KeyA"), ("ArrowRight", "KeyD")
KEYS = {
    r"forward|up|walk": UP,
    r"back|backward|down": DOWN,
    r"left": LEFT,
    r"right": RIGHT,
    r"jump": ("Space",),
    r"sneak|crouch": ("KeyC",),
    r"sprint|run": ("ShiftLeft",),
    r"attack|fire|shoot": ("KeyF",),
    r"use": ("KeyE",),
}
"""What a key does -> the keys of a keyboard that do it, by their place on a plain one (``KeyboardEvent.code``)."""
SPARE = [*(f"Digit{number % 10}" for number in range(1, 11)), *(f"Key{letter}" for letter in "QETYUIOGHJKLZXVBNMCF")]
"""Keys for the rest, in this order; P and R are the page's own."""


@dataclass(frozen=True)
class Lever:
    """How one number of the controls is moved.

    Attributes:
        label: what the number is called.
        unit: of it; empty if it is not known.
        low, high: of the training data, 1 % and 99 %: it never leaves them.
        kind: "axis": keys or a stick move it; "key": it is 1 while a key is held; "slider".
        rest: where it goes when it is let go; None: it stays.
        begin: where it begins.
        is_action: whether it leads to a frame, so that nothing is known of it at the first one.
        more, less: keys that move it up and down; of a "key" ``more`` alone.
        stick: the gamepad's axis (0 to the right, 1 up) of an "axis".
        sign: -1 where the stick's direction is less of the number.
        is_state: whether it says where a thing is.
        domain: of the videos that have it; empty: all have.
    """

    label: str
    unit: str
    low: float
    high: float
    kind: Kind
    rest: float | None
    begin: float
    is_action: bool
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()
    stick: int | None = None
    sign: int = 1
    is_state: bool = False
    domain: str = ""


def levers_of(controls: Mapping[str, Mapping[str, Any]], domains: Collection[str] = ()) -> list[Lever]:
    """A lever for each number, in the network's order.

    Args:
        controls: name -> description, as a network's configuration has them.
        domains: of the videos; a control whose name begins with one of them and a dot is that one's alone.

    Raises:
        UserError: there is nothing to steer by, but states.
    """
    wanted = {name: described(facts) for name, facts in controls.items()}
    plain = [
        replace(lever, domain=domain_of(name, wanted, domains))
        for name, control in wanted.items()
        for lever in _plain(name, control)
    ]
    if all(lever.is_state for lever in plain):
        raise UserError(
            f"--model is told {' and '.join(wanted)} alone, which say where things are, not what is done: keys cannot "
            "steer by that; train one with model.control.names=[actions]"
        )
    common = _with_keys([lever for lever in plain if not lever.domain])
    found = {"": iter(common)}
    for domain in dict.fromkeys(lever.domain for lever in plain if lever.domain):
        own = _with_keys([*common, *(lever for lever in plain if lever.domain == domain)])
        found[domain] = iter(own[len(common) :])
    return [next(found[lever.domain]) for lever in plain]


def domain_of(name: str, names: Collection[str], domains: Collection[str]) -> str:
    """The domain that a control's name begins with: one of ``domains``, or one of several that have such a control."""
    domain, _, control = name.partition(".")
    is_one = domain in domains or any(other != name and other.partition(".")[2] == control for other in names)
    return domain if control and is_one else ""


def _plain(name: str, control: Control) -> Iterator[Lever]:
    """The numbers of one control, as sliders and keys without a key."""
    is_key, is_state = control.kind == "multi-hot", is_place(name, control)
    for number in range(control.width):
        label = control.called(number) if control.numbers else name if control.width == 1 else f"{name} {number}"
        unit = control.unit[number] if control.unit else ""
        low, high = (0.0, 1.0) if is_key or not control.low else (control.low[number], control.high[number])
        holds = is_key or is_state or SPEED.search(f"{label} {unit}") or not low <= 0 <= high
        rest = None if holds else 0.0
        left = TO_THE_LEFT.search(f"{label} {unit}") or (control.width == 1 and TO_THE_LEFT.search(control.holds))
        yield Lever(
            *(label, unit, low, high, "key" if is_key else "slider", rest),
            begin=0.0 if is_key else (low + high) / 2 if rest is None else rest,
            is_action=control.at == "transition",
            sign=-1 if left else 1,
            is_state=is_state,
        )


def is_place(name: str, control: Control) -> bool:
    """Whether a control says where a thing is, and not what is done."""
    return control.at == "frame" and (
        bool(STATE.search(name)) or (bool(control.unit) and all("pixel" in unit for unit in control.unit))
    )


def _sticks(levers: Sequence[Lever]) -> list[int]:
    """Axes of the first two: up and down (1), then left and right (0), unless their names say that it is the other way.

    A single number that turns goes left and right.
    """
    turns = [bool(TURN.search(lever.label)) for lever in levers]
    return [0, 1][: len(levers)] if turns[:1] == [True] and turns[1:] != [True] else [1, 0][: len(levers)]


def _on_axis(lever: Lever, stick: int, arrows_alone: bool) -> Lever:
    if stick == 1:  # pictures count their rows downwards
        lever = replace(lever, sign=-1 if "pixel" in lever.unit else 1)
    more, less = (RIGHT, LEFT) if stick == 0 else (UP, DOWN)
    if lever.sign < 0:
        more, less = less, more
    count = 1 if arrows_alone else 2
    return replace(lever, kind="axis", stick=stick, more=more[:count], less=less[:count])


def _with_keys(levers: Sequence[Lever]) -> list[Lever]:
    """Give up to two numbers a stick and keys, and each key lever the key that its name asks for, else a free one."""
    found = list(levers)
    if not any(lever.kind == "axis" for lever in found):
        moved = [place for place, lever in enumerate(found) if lever.kind == "slider" and not lever.is_state][:2]
        has_keys = any(lever.kind == "key" for lever in found)
        for place, stick in zip(moved, _sticks([found[place] for place in moved]), strict=True):
            found[place] = _on_axis(found[place], stick, arrows_alone=has_keys)
    taken = {code for lever in found for code in lever.more + lever.less}
    for by_name in (True, False):
        for place, lever in enumerate(found):
            if lever.kind == "key" and not lever.more:
                wanted = _asked(lever.label) if by_name else SPARE
                free = tuple(code for code in wanted if code not in taken)
                found[place] = replace(lever, more=free if by_name else free[:1])
                taken.update(found[place].more)
    return found


def _asked(label: str) -> Sequence[str]:
    """The keys that a name asks for."""
    last = re.split(r"[._ ]", label.lower())[-1]
    if re.fullmatch(r"\d", last):
        return [f"Digit{last}"]
    return next((keys for names, keys in KEYS.items() if re.fullmatch(names, last)), ())
