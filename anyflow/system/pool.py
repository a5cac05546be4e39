"""Work for several processes of this machine; a killed process is replaced."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from anyflow.errors import UserError
from anyflow.system.engines import Done, Results, Staff, Work, WorkerLost, in_order, map_by, values

Item = TypeVar("Item")
Result = TypeVar("Result")

FEWER = "give fewer --workers, or close other programs"


@dataclass(frozen=True)
class LocalEngine:
    """Processes of this machine.

    Attributes:
        processes: so many; 0: the work is done in this one.
        gpus: they have GPUs, one each.
    """

    processes: int
    gpus: bool = False

    def __post_init__(self) -> None:
        if self.processes < 0:
            raise UserError(f"workers {self.processes}: give at least 0")

    @property
    def is_here(self) -> bool:
        """Whether this process does the work itself."""
        return self.processes == 0

    def workers(self, gpu: bool = False) -> int:
        """Tasks that are done at a time."""
        return max(self.processes, 1)

    def has_gpus(self) -> bool:
        """Whether they have GPUs."""
        return self.gpus

    def map_unordered(self, work: Work, tasks: Iterable[Any]) -> Results:
        """The end of every task, as they come; few tasks are in flight, so memory stays small."""
        return map_by(self.staff(work), tasks) if self.processes else _here(work, tasks)

    def staff(self, work: Work, most: int = sys.maxsize) -> Staff:
        """Workers for several lists of tasks."""
        return _Processes(work, min(self.workers(), most), self.gpus and work.gpu)


def run_jobs(
    function: Callable[[Item], Result],
    jobs: Sequence[Item],
    workers: int,
    fresh: bool = False,
) -> Iterator[Result]:
    """Results in the order of the jobs, from ``workers`` processes.

    ``fresh`` gives each job a process of its own, for simulators that cannot be opened twice.

    Raises:
        UserError: no worker, or a job whose process is killed again and again.
    """
    if workers < 1:
        raise UserError(f"workers {workers}: give at least 1")
    done = LocalEngine(workers).map_unordered(Work(function, fresh=fresh), jobs)
    yield from in_order(values(done, "number {}".format, FEWER))


def batches(count: int, size: int) -> list[range]:
    """The numbers 0..count-1 in runs of ``size``."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class Hand:
    """Does tasks of some work in its own process, with what the setup made."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._state: list[Any] = []

    def do(self, task: Any) -> Any:
        """What comes of a task."""
        if self.work.setup is None:
            return self.work.function(task)
        if not self._state:
            self._state.append(self.work.setup())
        return self.work.function(self._state[0], task)


def _here(work: Work, tasks: Iterable[Any]) -> Results:
    hand = Hand(work)
    for number, task in enumerate(tasks):
        try:
            done = Done(number, hand.do(task))
        except Exception as error:
            done = Done(number, error=error)
        yield done


class _Processes:
    """A staff of processes: one executor for each, so that it is known whose task a killed one had."""

    def __init__(self, work: Work, count: int, gpus: bool) -> None:
        self._work, self._gpus = work, gpus
        self._idle = list(reversed(range(count)))
        self._executors: dict[int, ProcessPoolExecutor] = {}
        self._busy: dict[Future[Any], int] = {}
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)

    def start(self, task: Any) -> Hashable | None:
        if not self._idle:
            return None
        place = self._idle.pop()
        try:
            future = (self._executors.get(place) or self._new(place)).submit(_do, task)
        except BrokenProcessPool:  # killed while it had nothing to do
            future = self._new(place).submit(_do, task)
        self._busy[future] = place
        return future

    def finished(self) -> list[tuple[Hashable, Any, Exception | None]]:
        ended: list[tuple[Hashable, Any, Exception | None]] = []
        for future in wait(self._busy, return_when=FIRST_COMPLETED).done:
            place = self._busy.pop(future)
            self._idle.append(place)
            error = future.exception()
            is_lost = isinstance(error, BrokenProcessPool)
            if self._work.fresh or is_lost:
                self._executors.pop(place).shutdown(wait=False)
            if error is None:
                ended.append((future, future.result(), None))
            else:
                ended.append((future, None, WorkerLost() if is_lost or not isinstance(error, Exception) else error))
        return ended

    def close(self) -> None:
        self._writer.close()  # all of them end
        for executor in self._executors.values():
            executor.shutdown(cancel_futures=True)
        self._reader.close()

    def _new(self, place: int) -> ProcessPoolExecutor:
        self._executors[place] = ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._work, self._reader, _gpu(place) if self._gpus else None),
        )
        return self._executors[place]


_hand: Hand | None = None


def _begin(work: Work, ends: Connection, gpu: str | None) -> None:
    """A worker's first act. It ends with the process that started it, and when that closes the pipe."""
    global _hand
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu

    def leave() -> None:
        try:
            ends.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    _hand = Hand(work)


def _do(task: Any) -> Any:
    assert _hand is not None
    return _hand.do(task)


def _gpu(place: int) -> str:
    """The GPU of a worker, of those that this process may use."""
    own = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return own[place % len(own)] if own else str(place)
