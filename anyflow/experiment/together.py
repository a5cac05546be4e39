"""Several tasks of an experiment at once, each on a place of its own: a share of the processors, a GPU if there is one.

A training is a process already. A curve is measured in a process that stays with its place: loading the libraries
takes longer than measuring a small model.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from anyflow.errors import EXIT_PREEMPTED, UserError
from anyflow.experiment.children import Children, Stopped
from anyflow.experiment.tasks import Task


class Place:
    """Where one task at a time runs.

    Attributes:
        environment: variables of its processes: which GPU they see, how many threads they take.
        one_at_a_time: held while the tracker is written to; all places share it.
    """

    def __init__(self, environment: dict[str, str], one_at_a_time: threading.Lock) -> None:
        self.environment = environment
        self.one_at_a_time = one_at_a_time
        self._process: ProcessPoolExecutor | None = None

    def with_all_processors(self) -> Place:
        """The same place for a training that has the machine to itself."""
        return Place({**self.environment, "OMP_NUM_THREADS": str(_processors())}, self.one_at_a_time)

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the place's process.

        Raises:
            UserError: The process was killed.
        """
        if self._process is None:
            spawn = multiprocessing.get_context("spawn")
            self._process = ProcessPoolExecutor(1, spawn, initializer=_settle, initargs=(self.environment,))
        try:
            self._process.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._process = None
            raise UserError(
                "a process that measured a curve was killed (by a lack of memory, or from outside): "
                "start the experiment again with fewer --jobs; what is done stays"
            ) from None

    def close(self) -> None:
        """End the place's process."""
        if self._process is not None:
            self._process.shutdown()


def work_together(
    todo: Sequence[Task],
    do: Callable[[Task, Place], None],
    children: Children,
    at_once: int,
    on_done: Callable[[Sequence[Task]], None],
) -> None:
    """Do tasks, each after those that it needs, ``at_once`` of them at a time; ``on_done`` is given what is left.

    Raises:
        Stopped, KeyboardInterrupt: A signal; the trainings have saved and ended.
    """
    waiting, running = list(todo), dict[Future[None], tuple[Task, Place]]()
    free = places(at_once)
    every = tuple(free)
    try:
        with ThreadPoolExecutor(at_once) as threads:
            try:
                while waiting or running:
                    under_way = [task for task, _ in running.values()]
                    ready = [task for task in waiting if _is_ready(task, [*waiting, *under_way])]
                    is_alone = len(ready) == 1 and not running  # and stays so: all others wait for it
                    for task in sorted(ready, key=lambda task: not task.is_training)[
                        : len(free)
                    ]:  # others wait for them
                        place = free.pop(0)
                        waiting.remove(task)
                        where = place.with_all_processors() if is_alone and task.is_training else place
                        running[threads.submit(do, task, where)] = (task, place)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        _, place = running.pop(future)
                        free.append(place)
                        future.result()
                    on_done([*(task for task, _ in running.values()), *waiting])
            except BaseException as reason:
                children.stop(reason if isinstance(reason, KeyboardInterrupt) else Stopped(EXIT_PREEMPTED))
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    finally:
        for place in every:
            place.close()


def places(count: int) -> list[Place]:
    """``count`` places: the GPUs in turn, the processors shared out."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())] if named is None else [n for n in named.split(",") if n]
    threads = str(max(1, _processors() // count))
    lock = threading.Lock()
    return [
        Place(
            {"OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})},
            lock,
        )
        for i in range(count)
    ]


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _is_ready(task: Task, unfinished: Iterable[Task]) -> bool:
    """Whether what a task needs has been trained: the models that it starts from, and of a curve its own."""
    in_training = {other.piece.name for other in unfinished if other.is_training}
    return in_training.isdisjoint(task.piece.needs) and (task.is_training or task.piece.name not in in_training)


def _settle(environment: dict[str, str]) -> None:
    """Begin the life of a place's process."""
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides what an interruption means
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
