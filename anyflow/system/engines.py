"""Who does much work: the processes of this machine, or those of a Ray cluster. Tasks are handed out one by one.

An idle worker gets the next task, so nothing is dealt out beforehand and nobody waits for the slowest. A worker that is
lost (killed, out of memory, its machine gone) is replaced, and another one does its task again. So a task must write
whole files or none, and the same ones whoever does it.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anyflow.errors import UserError

MAX_LOSSES = 3
"""Workers that one task may cost before it is given up."""


@dataclass(frozen=True)
class Work:
    """What workers do; they may be on other machines, so all of it can be pickled.

    Attributes:
        function: of a task; of ``setup``'s result and a task, where there is a setup.
        setup: makes what a worker keeps for all its tasks, such as a network; called once in each.
        gpu: a worker has a GPU of its own, and sees no other, where there are any.
        fresh: each task has a new process, for simulators that cannot be opened twice.
        sees: files and folders that every worker reads.
        writes: a folder that every worker writes in.
    """

    function: Callable[..., Any]
    setup: Callable[[], Any] | None = None
    gpu: bool = False
    fresh: bool = False
    sees: tuple[Path, ...] = ()
    writes: Path | None = None


@dataclass(frozen=True)
class Done:
    """The end of a task.

    Attributes:
        number: of the task.
        value: what came of it.
        error: why nothing did: what the function raised, or :class:`WorkerLost`.
    """

    number: int
    value: Any = None
    error: Exception | None = None


Results = Generator[Done, None, None]
"""The end of each task, as they come; closing it ends the workers."""


class WorkerLost(Exception):
    """The worker that had a task is gone."""


class Engine(Protocol):
    """Does work."""

    @property
    def is_here(self) -> bool:
        """Whether this process does the work itself."""
        ...

    def workers(self, gpu: bool = False) -> int:
        """Tasks that are done at a time, now."""
        ...

    def has_gpus(self) -> bool:
        """Whether its workers have GPUs."""
        ...

    def map_unordered(self, work: Work, tasks: Sequence[Any]) -> Results:
        """The end of every task, as they come.

        Raises:
            UserError: no worker can be had.
        """
        ...

    def staff(self, work: Work, most: int) -> Staff:
        """Workers for several lists of tasks, ``most`` of them at the most; who asks for them closes them."""
        ...


class Staff(Protocol):
    """The workers of an engine; each does one task at a time."""

    def start(self, task: Any) -> Hashable | None:
        """Give an idle worker a task; None if nobody is idle."""
        ...

    def finished(self) -> list[tuple[Hashable, Any, Exception | None]]:
        """(what ``start`` gave, value, error) of tasks that have ended; waits a while for one."""
        ...

    def close(self) -> None:
        """End all workers, whatever they do."""
        ...


def map_by(staff: Staff, tasks: Iterable[Any]) -> Results:
    """The end of every task, as they come, by workers that are closed then."""
    with closing(staff):
        yield from hand_out(staff, tasks)


def hand_out(staff: Staff, tasks: Iterable[Any]) -> Results:
    """The end of every task, as they come; a task whose worker was lost is done again."""
    again: deque[tuple[int, Any]] = deque()
    fresh, pending, losses = enumerate(tasks), dict[Hashable, tuple[int, Any]](), Counter[int]()
    while True:
        while (item := again.popleft() if again else next(fresh, None)) is not None:
            handle = staff.start(item[1])
            if handle is None:
                again.appendleft(item)
                break
            pending[handle] = item
        if not pending and not again:
            return
        for handle, value, error in staff.finished():
            number, task = pending.pop(handle)
            losses[number] += isinstance(error, WorkerLost)
            if not isinstance(error, WorkerLost) or losses[number] == MAX_LOSSES:
                yield Done(number, value, error)
                continue
            print("a worker is gone, killed or with its machine: its task is done again", file=sys.stderr)
            again.append((number, task))


def in_order(results: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """Numbered values in the order of their numbers, from 0 on; those that come early wait."""
    early: dict[int, Any] = {}
    following = 0
    for number, value in results:
        early[number] = value
        while following in early:
            yield early.pop(following)
            following += 1


def values(done: Results, name: Callable[[int], str], remedy: str) -> Generator[tuple[int, Any], None, None]:
    """(number of the task, value) of what went well; tasks that kill their workers are told when all others are done.

    Args:
        done: as it comes.
        name: what a task is called, by its number.
        remedy: what the user is to do about tasks that were given up.

    Raises:
        UserError: tasks were given up.
        Exception: whatever a task raised, at once.
    """
    lost: list[int] = []
    with closing(done):
        for end in done:
            if isinstance(end.error, WorkerLost):
                lost.append(end.number)
            elif end.error is not None:
                raise end.error
            else:
                yield end.number, end.value
    if lost:
        named = ", ".join(map(name, sorted(lost)[:3])) + (", ..." if len(lost) > 3 else "")
        raise UserError(
            f"{named}: the process that worked on it was killed {MAX_LOSSES} times, by a lack of memory or from "
            f"outside: {remedy}"
        )
