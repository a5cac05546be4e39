"""The stream: global batch number in, decoded batch of this rank out; exact, resumable, tolerant of a few bad clips.

A batch is a pure function of (order, number, rank, world size): workers only decide who computes it, never what is in
it. The stream's state is its position and the clips skipped so far; it holds for any number of ranks and workers.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, DistributedSampler

from anyflow.data.batches import Batch, BatchDataset
from anyflow.data.order import OrderIdentity, describe_difference
from anyflow.data.skips import Skip, enforce_budget
from anyflow.errors import UserError

LONGEST_TMPDIR = 107 - len("/pymp-abcdefgh/listener-abcdefgh")
"""A socket's address has at most 107 bytes."""
SYNC_EVERY = 64
"""Batches between two exchanges of skipped clips among ranks, so that all of them stop at the same batch."""


class ClipStream:
    """The endless stream's position, its skipped clips, and the budget for them.

    Args:
        dataset: the batches.
        steps: the declared length: batches that the run asks for in all.
        error_budget: largest share of bad clips that is tolerated.
        skipped: clips that encoding left out, beside those of ``dataset``: it has read all of them.
    """

    def __init__(
        self, dataset: BatchDataset, steps: int, error_budget: float = 0.01, skipped: Sequence[Skip] = ()
    ) -> None:
        self.dataset, self.steps, self.error_budget = dataset, steps, error_budget
        self.position, self.left_out = 0, len(skipped)
        self.skipped = {(skip.shard, skip.key): skip for skip in skipped}

    def advance(self, batch: Batch) -> None:
        """Say that ``batch`` was trained on: the position moves behind it, its skipped clips enter the record.

        All ranks must call this for the same batches.
        """
        self.position = batch["position"] + 1
        self._record(batch["skipped"])
        if self.dataset.world_size > 1 and self.position % SYNC_EVERY == 0:
            self.gather()
            self.check_budget()

    def check(self, batch: Batch) -> Batch:
        """Pass a fetched batch on if it is whole and the budget holds.

        Raises:
            UserError: the batch could not be filled, or too many clips are bad.
        """
        if "error" in batch:
            raise UserError(batch["error"])
        if batch["skipped"] and self.dataset.world_size == 1:
            self._record(batch["skipped"])
            self.check_budget(batch["position"])
        return batch

    def check_budget(self, position: int | None = None) -> None:
        """Compare the distinct bad clips with the distinct clips read so far.

        Raises:
            UserError: the budget is spent; names the first offenders.
        """
        order = self.dataset.order
        total = order.num_samples + self.left_out
        batches = (self.position if position is None else position) + 1
        read = batches * self.dataset.batch
        enforce_budget(list(self.skipped.values()), total if self.left_out else read, total, self.error_budget)

    def state_dict(self) -> dict[str, Any]:
        """{epoch, batch, plan_hash, plan, clips, skipped}: the place in the stream, for any ranks and workers.

        It is where the update under way began, if some of its batches are still to come: a stop loses their gradients.
        With several ranks all of them must call this together, as they do for a checkpoint.
        """
        self.gather()
        order = self.dataset.order
        begun = self.position - self.dataset.passes_before(self.position)
        epoch, batch = order.epoch_and_batch(self.dataset.whole_batches(begun))
        return {
            "epoch": epoch,
            "batch": batch,
            "plan_hash": order.identity.hash,
            "plan": asdict(order.identity),
            "clips": self.dataset.batch * self.dataset.passes,
            "skipped": [asdict(skip) for skip in self.skipped.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            UserError: the order is another one; names the difference.
        """
        saved = OrderIdentity(**state["plan"])
        self.dataset.adopt(saved, state.get("clips"))  # checkpoints of before do not say
        order = self.dataset.order
        if state["plan_hash"] != order.identity.hash:
            difference = describe_difference(saved, order.identity)
            raise UserError(f"The checkpoint's place in the data does not fit: {difference} changed; set it back.")
        whole = state["epoch"] * order.batches_per_epoch + state["batch"]
        self.position = self.dataset.first = self.dataset.pass_after(whole)
        self.skipped = {}
        self._record(state["skipped"])

    def loader(self, num_workers: int = 0, prefetch: int = 2, pin_memory: bool = False) -> DataLoader[Batch]:
        """The batches from the position on, in order; ``len`` is the declared length whatever the position.

        Raises:
            UserError: workers could not send what they read.
        """
        if num_workers:
            check_sockets(tempfile.gettempdir())
        return _Loader(
            self,
            batch_size=None,
            sampler=_FromPosition(self),
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_leave_stopping_to_the_trainer,
        )

    def _record(self, skipped: Sequence[Mapping[str, str]]) -> None:
        for entry in skipped:
            skip = Skip(**entry)
            self.skipped.setdefault((skip.shard, skip.key), skip)

    def gather(self) -> None:
        """Share the skipped clips among ranks, together; every rank then has the same record in the same order."""
        if self.dataset.world_size == 1 or not torch.distributed.is_initialized():
            return
        parts = gathered([asdict(skip) for skip in self.skipped.values()], self.dataset.world_size)
        self.skipped = {}
        for part in parts:
            self._record(part)


def gathered(part: Any, world_size: int) -> list[Any]:
    """What every rank gives, together; by one alone its own."""
    if world_size == 1 or not torch.distributed.is_initialized():
        return [part]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, part)
    return parts


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """Let a signal that reaches the whole process group pass by: the run stops well, and needs its workers for that.

    A terminal's Ctrl-C and a scheduler's SIGTERM come to the workers too. A second SIGTERM is the loader's own, which
    ends a worker that does not end by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def check_sockets(folder: str) -> None:
    """Refuse a folder for temporary files in which workers' sockets would have too long an address.

    They could not be opened there, and the trainer would wait for the first batch for ever.

    Raises:
        UserError: its name is too long.
    """
    if len(os.fsencode(folder)) > LONGEST_TMPDIR:
        raise UserError(
            f"TMPDIR={folder} is too long for the sockets of data workers: set one of at most {LONGEST_TMPDIR} "
            "characters, or data.num_workers=0"
        )


class _FromPosition(DistributedSampler[int]):
    """Batch numbers from the stream's position to its end.

    Lightning prefetches a batch (and so loses it on resume) unless the length is declared, and replaces every sampler
    that is not a ``DistributedSampler``: hence this parent and this length. The data set divides batches among ranks.
    """

    def __init__(self, stream: ClipStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.stream.position, self.stream.steps))

    def __len__(self) -> int:
        return self.stream.steps

    def set_epoch(self, epoch: int) -> None:
        """The stream knows its epoch by itself."""


class _Loader(DataLoader[Batch]):
    """A DataLoader that raises in the main process what went wrong in a worker."""

    def __init__(self, stream: ClipStream, **options: Any) -> None:
        super().__init__(stream.dataset, **options)
        self.stream = stream

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return _checked(self.stream, super().__iter__())


def _checked(stream: ClipStream, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Whole batches; the workers end with the first that is not, for at exit nobody would end them."""
    try:
        yield from map(stream.check, batches)
    finally:
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()
