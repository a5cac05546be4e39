"""Work for the disk that training need not wait for: done in order, in one thread, on a copy of what was to be written.

Whoever writes asks a writer to :meth:`~Writer.stage` what changes while it writes and gives it the rest as a job. The
plain writer copies nothing and works at once, so writing behind the training's back is no other code, only another
writer.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

Job = Callable[[], Any]


class Writer:
    """Works at once."""

    is_behind = False
    """Whether jobs run while training goes on."""

    def stage(self, content: Any) -> Any:
        """What to write: the content itself, for nothing moves meanwhile."""
        return content

    def later(self, job: Job) -> None:
        """Do a job, after all that were given before."""
        job()

    def wait(self) -> None:
        """Return when all is done; raises what a job raised."""


class BackgroundWriter(Writer):
    """Works in a thread of its own, which a process that ends by itself waits for."""

    is_behind = True

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._jobs: list[Future[Any]] = []

    def stage(self, content: Any) -> Any:
        """A copy in host memory, containers and all."""
        return tree_map(lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, content)

    def later(self, job: Job) -> None:
        self._jobs.append(self._thread.submit(job))

    def wait(self) -> None:
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()
