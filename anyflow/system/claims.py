"""Numbered names for results: of several processes that start together, each is given one of its own."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from anyflow.system.locks import NoLocks, locked

CLAIMED = "ANYFLOW_CLAIMED"
"""What a process has claimed, for the ranks that it starts: all of them mean its number."""

_claims: dict[Path, ExitStack] = {}


def claim_numbered(first: Path, is_used: Callable[[Path], bool]) -> Path:
    """The first of ``NAME``, ``NAME-2``, ``NAME-3`` ... that is free and no other process was given; nothing is made.

    The claim ends with this process, or by :func:`give_up_claim`. On a disk without locks there is none.

    Args:
        first: the path without a number.
        is_used: whether something is there already.
    """
    if "RANK" in os.environ and os.environ.get(CLAIMED):
        return Path(os.environ[CLAIMED])
    is_first = os.environ.get("RANK", "0") == "0"  # the others write nothing
    for number in count(1):
        path = first if number == 1 else first.with_name(f"{first.name}-{number}")
        if not is_used(path) and (not is_first or _claim(path)):
            if not is_used(path):
                os.environ[CLAIMED] = str(path)
                return path
            give_up_claim(path)
    raise AssertionError("numbers do not end")


def give_up_claim(path: Path) -> None:
    """End the claim on a path, if this process has one."""
    if (stack := _claims.pop(path, None)) is not None:
        stack.close()
        if os.environ.get(CLAIMED) == str(path):
            del os.environ[CLAIMED]


@atexit.register
def _give_up_all() -> None:
    for path in list(_claims):
        give_up_claim(path)


def _claim(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    stack = ExitStack()
    try:
        stack.enter_context(locked(path.with_name(f".{path.name}.claim"), 0, passing=True))
    except BlockingIOError:
        return False
    except NoLocks:
        stack.close()
    _claims[path] = stack
    return True
