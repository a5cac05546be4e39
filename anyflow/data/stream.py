"""The stream: global batch number in, decoded batch of this rank out; exact, resumable, tolerant of a few bad clips.

A batch is a pure function of (order, number, rank, world size): workers only decide who computes it, never what is in
it. The stream's state is its position and the clips skipped so far; it holds for any number of ranks and workers.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.mixture import MixedOrder
from anyflow.data.order import Order, OrderIdentity, describe_difference, sample_seed
from anyflow.data.reader import ShardReader, load_latents
from anyflow.data.shards import Sample
from anyflow.errors import UserError
from anyflow.system.files import write_atomically

Batch = dict[str, Any]

BUDGET_FLOOR = 1000
"""The budget is counted against at least this many clips: one bad clip among the first ten does not make 10 %."""
SYNC_EVERY = 64
"""Batches between two exchanges of skipped clips among ranks, so that all of them stop at the same batch."""
MAX_TRIES = 64
NAMED_OFFENDERS = 5


@dataclass(frozen=True)
class Skip:
    """A clip that could not be used, and why."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.key} ({self.reason})"


class BatchDataset(Dataset[Batch]):
    """Map-style data set over global batch numbers, in the order that it is given."""

    order: Any
    """An :class:`Order`, or what answers as one."""
    rank: int
    world_size: int
    passes: int = 1
    """Batches whose gradients make one update."""
    first: int = 0
    """A batch that an update begins with."""
    batch: int
    """Clips of a pass over all ranks."""

    def clips_of(self, index: int) -> int:
        """Clips of a pass over all ranks, where passes differ."""
        return self.batch

    def whole_batches(self, index: int) -> int:
        """How many of the order's batches come before a pass that begins an update."""
        return index * self.batch // self.order.global_batch

    def pass_after(self, whole: int) -> int:
        """The pass that comes after so many of the order's batches."""
        return whole * self.order.global_batch // self.batch

    def passes_before(self, index: int) -> int:
        """How many batches of its update come before a batch."""
        return (index - self.first) % self.passes

    def place(self, index: int) -> tuple[int, int]:
        """Where a batch stands in that of its update: the clips before it, and all of them, over all ranks."""
        before = self.passes_before(index)
        sizes = [self.clips_of(number) for number in range(index - before, index - before + self.passes)]
        return sum(sizes[:before]), sum(sizes)

    def adopt(self, saved: OrderIdentity) -> None:
        """Take the order's batches from a checkpoint whose updates have as many clips, however they are split here."""
        if self.batch * self.passes % saved.global_batch == 0:
            self.order = replace(self.order, global_batch=saved.global_batch)

    def told(self) -> str:
        """How much there is, in words."""
        return f"{self.order.num_samples} clips, {self.pass_after(self.order.batches_per_epoch)} batches an epoch"


class ClipDataset(BatchDataset):
    """Map-style data set over global batch numbers: item ``n`` is this rank's part of global batch ``n``.

    Args:
        reader: the shards.
        order: the order.
        shape: what a decoded clip looks like; ignored for latents.
        rank, world_size: which part of each batch.
        latent_shape: (F, C, H, W) if the shards hold latents instead of footage.

    An item is ``{"frames": uint8 [B, F, H, W, 3] | "latents": float32 [B, F, C, H, W], "caption", "key",
    "attributes", "position", "place", "skipped"}``. A failure is returned as ``{"error": sentence}``: an exception that
    crosses from a worker to the main process would arrive as a traceback.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order | MixedOrder,
        shape: ClipShape,
        rank: int = 0,
        world_size: int = 1,
        latent_shape: tuple[int, int, int, int] | None = None,
    ) -> None:
        self.reader, self.order, self.shape = reader, order, shape
        self.batch = order.global_batch
        self.rank, self.world_size = rank, world_size
        self.latent_shape = latent_shape

    def __getitem__(self, index: int) -> Batch:
        places = [self._place_of(clip) for clip in range(self.batch * index, self.batch * (index + 1))]
        places = places[self.rank :: self.world_size]
        pixels = self._allocate(len(places))
        bad: dict[tuple[int, int], Skip] = {}
        try:
            metadata = [self._fill(*place, pixels[row], bad) for row, place in enumerate(places)]
        except UserError as error:
            return {"error": str(error), "position": index}
        return {
            "latents" if self.latent_shape else "frames": torch.from_numpy(pixels),
            "caption": [entry["caption"] for entry in metadata],
            "key": [entry["key"] for entry in metadata],
            "attributes": [entry["attributes"] for entry in metadata],
            "position": index,
            "place": self.place(index),
            "skipped": [asdict(skip) for skip in bad.values()],
        }

    def _place_of(self, clip: int) -> tuple[int, int]:
        """``(epoch, position)`` of a clip, counted through: a pass is a part of one of the order's batches, or several.

        Ranks are dealt the clips in turn, as the stages deal out intervals: a clip meets the same interval and noise
        for any number of ranks, and dear and cheap samples spread evenly over them.
        """
        number, place = divmod(clip, self.order.global_batch)
        epoch, positions = self.order.batch_positions(number)
        return epoch, positions[place]

    def _allocate(self, count: int) -> np.ndarray:
        if self.latent_shape:
            return np.empty((count, *self.latent_shape), dtype=np.float32)
        return np.empty((count, self.shape.frames, self.shape.height, self.shape.width, 3), dtype=np.uint8)

    def _fill(self, epoch: int, position: int, out: np.ndarray, bad: dict[tuple[int, int], Skip]) -> dict[str, Any]:
        """Write the clip at ``position``, or the first good one of its replacements, into ``out``."""
        for candidate in (position, *self.order.replacements(position)[:MAX_TRIES]):
            own_epoch, shard, number = self.order.occurrence(epoch, candidate)
            if (shard, number) in bad:
                continue
            sample = self.reader.sample(shard, number)
            try:
                return self.load(own_epoch, shard, sample, out)
            except DecodeError as error:
                bad[shard, number] = Skip(self.reader.shards[shard][1].name, sample.key, str(error))
        raise none_usable(list(bad.values()))

    def load(self, epoch: int, shard: int, sample: Sample, out: np.ndarray) -> dict[str, Any]:
        """Read one sample into ``out``; return its description with its key.

        Raises:
            DecodeError: with the reason why the clip cannot be used.
        """
        metadata = self.reader.describe(shard, sample)
        if self.latent_shape:
            load_latents(self.reader.read(shard, sample, "safetensors"), out)
        else:
            seed = sample_seed(self.order.seed, epoch, sample.key)
            decode_clip(self.reader.video(shard, sample), self.shape, seed, out)
        return {**metadata, "key": sample.key}


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
        saved, clips = OrderIdentity(**state["plan"]), self.dataset.batch * self.dataset.passes
        if state.get("clips", clips) != clips:  # checkpoints of before do not say
            raise UserError(
                f"The checkpoint's place in the data does not fit: global batch (was {state['clips']}, is {clips}) "
                f"changed; set data.global_batch={state['clips']}, and data.batch_size and ranks as you like."
            )
        self.dataset.adopt(saved)
        order = self.dataset.order
        if state["plan_hash"] != order.identity.hash:
            difference = describe_difference(saved, order.identity)
            raise UserError(f"The checkpoint's place in the data does not fit: {difference} changed; set it back.")
        whole = state["epoch"] * order.batches_per_epoch + state["batch"]
        self.position = self.dataset.first = self.dataset.pass_after(whole)
        self.skipped = {}
        self._record(state["skipped"])

    def loader(self, num_workers: int = 0, prefetch: int = 2, pin_memory: bool = False) -> DataLoader[Batch]:
        """The batches from the position on, in order; ``len`` is the declared length whatever the position."""
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


def enforce_budget(
    skipped: Sequence[Skip], read: int, total: int, error_budget: float, report: Path | None = None
) -> None:
    """Compare the distinct bad clips with the clips read so far.

    Args:
        skipped: the bad clips, each once.
        read: clips read so far.
        total: clips there are.
        error_budget: largest share that is tolerated.
        report: file that names all of them then.

    Raises:
        UserError: the budget is spent; names the first offenders.
    """
    if len(skipped) > error_budget * min(max(read, BUDGET_FLOOR), total):
        if report is not None:
            write_skipped(report, skipped)
        everywhere = f"; all of them in {str(report)!r}" if report is not None else ""
        raise UserError(
            f"{len(skipped)} of {total} clips cannot be used, more than error_budget {error_budget:g} allows: "
            f"{_name_offenders(skipped)}{everywhere}; repair the shards or raise error_budget."
        )


def none_usable(bad: Sequence[Skip]) -> UserError:
    """What to raise where no clip can take the place of bad ones."""
    return UserError(f"{len(bad)} clips in a row cannot be used: {_name_offenders(bad)}; repair the shards.")


def write_skipped(path: Path, skipped: Iterable[Skip]) -> None:
    """Name every clip that could not be used, and why, in a JSON file for people."""
    write_atomically(path, json.dumps([asdict(skip) for skip in skipped], indent=1, ensure_ascii=False).encode())


def _name_offenders(skipped: Sequence[Skip]) -> str:
    named = "; ".join(str(skip) for skip in skipped[:NAMED_OFFENDERS])
    rest = len(skipped) - NAMED_OFFENDERS
    return named + (f"; and {rest} more" if rest > 0 else "")
