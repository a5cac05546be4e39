"""The controls that a network is conditioned on, as the cards of a run tell them together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyflow.data.controls import Control, with_domain
from anyflow.data.reader import find_split
from anyflow.errors import UserError

ALIKE = ("width", "kind", "at", "skipped", "numbers", "unit")
"""What cards must agree in; names and units only where both tell them."""


def wanted_controls(
    cards: Sequence[str | Path], names: Sequence[str], split: str = "train", where: str = "controls"
) -> dict[str, Control]:
    """Some controls by name, of cards that are read as one data set.

    A card may lack one: its clips then have NaN. The range covers those of all cards that tell one.

    Args:
        cards: names, paths, addresses, folders of shards. names: of the controls, in the order of their columns;
            ``DOMAIN.NAME`` is that of one domain's cards and clips alone.
        split: one that all cards have. where: the option or field that names the controls, for the message.

    Raises:
        UserError: no card has a control, one tells it in words alone, or two tell different things.
    """
    splits = {str(card): find_split(card, split, index=False, require_shards=False) for card in cards}
    told = {card: with_domain(found.domain, found.controls) for card, found in splits.items()}
    found: dict[str, Control] = {}
    for name in dict.fromkeys(names):
        of = {card: controls[name] for card, controls in told.items() if name in controls}
        if not of:
            known = ", ".join(sorted({known for split in splits.values() for known in split.controls}))
            raise UserError(f"{where}: {name!r} is no control of {_listed(told)}: {_choose(known)}")
        typed = []
        for card, control in of.items():
            if isinstance(control, str):
                remedy = f"anyflow data controls {card} reads its width and range from the shards"
                raise UserError(f"{where}: the card {card!r} tells of {name!r} in words alone: {remedy}")
            typed.append((card, control))
        found[name] = _together(name, typed, where)
    return found


def _listed(cards: Collection[str]) -> str:
    return f"the card{'s' if len(cards) > 1 else ''} {' and '.join(map(repr, cards))}"


def _choose(known: str) -> str:
    return f"choose of {known}" if known else "there are none; anyflow data controls finds those that clips have"


def _together(name: str, told: Sequence[tuple[str, Control]], where: str) -> Control:
    """One control of all cards.

    Raises:
        UserError: two of them differ.
    """
    (first, whole), *others = told
    for card, control in others:
        for what in ALIKE:
            one, other = getattr(whole, what), getattr(control, what)
            if one != other and one != () and other != ():
                one, other = (list(v) if isinstance(v, tuple) else v for v in (one, other))
                raise UserError(
                    f"{where}: {name!r} has {what} {one} in the card {first!r}, and {other} in {card!r}: name another "
                    f"control, name each by its domain (DOMAIN.{name}), or leave one of the cards out"
                )
        whole = replace(whole, unit=whole.unit or control.unit, numbers=whole.numbers or control.numbers)
        if control.period:
            whole = replace(whole, period=tuple(map(max, whole.period or control.period, control.period)))
        if whole.low and control.low:
            low, high = tuple(map(min, whole.low, control.low)), tuple(map(max, whole.high, control.high))
            whole = replace(whole, low=low, high=high)
        elif control.low:
            whole = replace(whole, low=control.low, high=control.high)
    return whole


def learnt_controls(facts: Mapping[str, Any], cards: Sequence[str | Path], split: str) -> dict[str, Control]:
    """The controls that a network was trained with, for clips of some cards; a card may lack them.

    Args:
        facts: name -> its fields, as a network's configuration has them (:meth:`Control.to_dict`).
        cards: names, paths, addresses, folders of shards. split: one that all cards have.

    Raises:
        UserError: a card has a control of that name that is another one.
    """
    known = {name: described(own) for name, own in facts.items()}
    for card in cards:
        found = find_split(card, split, index=False)
        for name, told in with_domain(found.domain, found.controls).items():
            own = known.get(name)
            if own is not None and isinstance(told, Control) and own.told() != told.told():
                raise UserError(
                    f"the card {str(card)!r} has {name!r} with {told.told()}; the network learnt it with {own.told()}: "
                    "leave the card out, or take another network"
                )
    return known


def described(facts: Mapping[str, Any]) -> Control:
    """A control as a network's configuration describes it."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    return Control(**values)
