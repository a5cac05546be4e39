"""Work for several processes at once: results in order, few jobs in flight, a killed process replaced."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from anyflow.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_DEATHS = 3
"""Processes of a rendering that may be killed one after another without a clip between."""


def run_jobs(
    function: Callable[[Item], Result], jobs: Iterable[Item], workers: int, jobs_per_process: int | None = None
) -> Iterator[Result]:
    """Results in the order of the jobs, from ``workers`` processes; few jobs are in flight, so memory stays small.

    ``jobs_per_process=1`` gives each job a process of its own, for simulators that cannot be opened twice. A process
    that is killed is replaced, and its jobs are done again.

    Raises:
        UserError: no worker, or processes that are killed again and again.
    """
    if workers < 1:
        raise UserError(f"workers {workers}: give at least 1")
    context = multiprocessing.get_context("spawn")
    remaining, waiting, deaths = iter(jobs), list[Item](), 0
    while deaths < MAX_DEATHS:
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=_end_with_parent, max_tasks_per_child=jobs_per_process
        ) as pool:
            waiting += islice(remaining, 2 * workers - len(waiting))
            try:
                pending: list[Future[Result]] = [pool.submit(function, job) for job in waiting]
                while pending:
                    result = pending.pop(0).result()
                    waiting.pop(0)
                    deaths = 0
                    for job in islice(remaining, 1):
                        waiting.append(job)
                        pending.append(pool.submit(function, job))
                    yield result
                return
            except BrokenProcessPool:
                deaths += 1
    raise UserError(
        f"a process that renders was killed {MAX_DEATHS} times in a row, by a lack of memory or from outside: "
        "give fewer --workers, or close other programs"
    )


def _end_with_parent() -> None:
    """End this worker when the process that started it is killed: nobody else would ever tell it to."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def batches(count: int, size: int) -> list[range]:
    """The numbers 0..count-1 in runs of ``size``."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
