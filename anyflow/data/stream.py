"""The stream: global batch number in, decoded batch of this rank out; exact, resumable, tolerant of a few bad clips.

A batch is a pure function of (plan, number, rank, world size): workers only decide who computes it, never what is in
it. The stream's state is its position and the clips skipped so far; it holds for any number of ranks and workers.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.plan import Plan, PlanIdentity, PlannedShard, describe_difference, sample_seed
from anyflow.data.shards import Sample, Shard, load_index
from anyflow.errors import UserError

Batch = dict[str, Any]

TAR_BLOCK = 512
TAR_NAME_LENGTH = 100
OPEN_FILES = 64
BUDGET_FLOOR = 1000
"""The budget is counted against at least this many clips: one bad clip among the first ten does not make 10 %."""
SYNC_EVERY = 64
"""Batches between two exchanges of skipped clips among ranks, so that all of them stop at the same batch."""
MAX_TRIES = 64
NAMED_OFFENDERS = 5


class ShardReader:
    """Random access to the samples of several shard folders by tar offset: one ``pread`` a member, never a scan.

    Args:
        folders: folders with an ``index.json``.

    Raises:
        UserError: an index or a shard is missing, or a shard is longer than its index says.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.shards: list[tuple[Path, Shard]] = []
        for folder in folders:
            self.shards += [(folder / shard.name, shard) for shard in load_index(folder).shards]
        for path, shard in self.shards:
            if not path.is_file():
                raise UserError(f"shard {str(path)!r} is missing: fetch or write it again")
            if path.stat().st_size > shard.bytes:
                raise UserError(f"shard {str(path)!r} is longer than its index says: write the shards again")
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def planned(self) -> tuple[PlannedShard, ...]:
        """The plan's view of the shards."""
        return tuple(PlannedShard(shard.name, shard.sha256, len(shard.samples)) for _, shard in self.shards)

    def sample(self, shard: int, number: int) -> Sample:
        """The index's entry of a sample."""
        return self.shards[shard][1].samples[number]

    def read(self, shard: int, sample: Sample, extension: str) -> bytes:
        """Read one member.

        Raises:
            DecodeError: the member is absent, cut off, or another one than the index says.
        """
        if extension not in sample.parts:
            raise DecodeError(f"no {extension} member")
        offset, size = sample.parts[extension]
        name = f"{sample.key}.{extension}".encode()[:TAR_NAME_LENGTH]
        try:
            data = os.pread(self._descriptor(shard), TAR_BLOCK + size, offset - TAR_BLOCK)
        except OSError as error:
            raise DecodeError(f"the shard cannot be read ({error.strerror})") from error
        if len(data) < TAR_BLOCK + size:
            raise DecodeError("the shard is truncated")
        if data[:TAR_NAME_LENGTH].rstrip(b"\0") != name:
            raise DecodeError("the shard does not match its index")
        return data[TAR_BLOCK:]

    def _descriptor(self, shard: int) -> int:
        """An open file, the least recently used one closed when there are too many. Shared offsets are never used."""
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if len(self._descriptors) >= OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = os.open(self.shards[shard][0], os.O_RDONLY)
        return self._descriptors[shard]

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()


@dataclass(frozen=True)
class Skip:
    """A clip that could not be used, and why."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.key} ({self.reason})"


class ClipDataset(Dataset[Batch]):
    """Map-style data set over global batch numbers: item ``n`` is this rank's part of global batch ``n``.

    Args:
        reader: the shards.
        plan: the order.
        shape: what a decoded clip looks like; ignored for latents.
        rank, world_size: which part of each batch.
        latent_shape: (F, C, H, W) if the shards hold latents instead of footage.

    An item is ``{"frames": uint8 [B, F, H, W, 3] | "latents": float32 [B, F, C, H, W], "caption", "key",
    "attributes", "position", "skipped"}``. A failure is returned as ``{"error": sentence}``: an exception that crosses
    from a worker to the main process would arrive as a traceback.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: Plan,
        shape: ClipShape,
        rank: int = 0,
        world_size: int = 1,
        latent_shape: tuple[int, int, int, int] | None = None,
    ) -> None:
        self.reader, self.plan, self.shape = reader, plan, shape
        self.rank, self.world_size = rank, world_size
        self.latent_shape = latent_shape

    def __getitem__(self, index: int) -> Batch:
        epoch, positions = self.plan.batch_positions(index, self.rank, self.world_size)
        pixels = self._allocate(len(positions))
        skipped: list[Skip] = []
        try:
            metadata = [self._fill(epoch, position, pixels[row], skipped) for row, position in enumerate(positions)]
        except UserError as error:
            return {"error": str(error), "position": index, "skipped": [asdict(skip) for skip in skipped]}
        return {
            "latents" if self.latent_shape else "frames": torch.from_numpy(pixels),
            "caption": [entry["caption"] for entry in metadata],
            "key": [entry["key"] for entry in metadata],
            "attributes": [entry.get("attributes") or {} for entry in metadata],
            "position": index,
            "skipped": [asdict(skip) for skip in skipped],
        }

    def _allocate(self, count: int) -> np.ndarray:
        if self.latent_shape:
            return np.empty((count, *self.latent_shape), dtype=np.float32)
        return np.empty((count, self.shape.frames, self.shape.height, self.shape.width, 3), dtype=np.uint8)

    def _fill(self, epoch: int, position: int, out: np.ndarray, skipped: list[Skip]) -> dict[str, Any]:
        """Write the clip at ``position``, or the first good one of its replacements, into ``out``."""
        for candidate in (position, *self.plan.replacements(position)[: MAX_TRIES - 1]):
            shard, number = self.plan.sample_at(epoch, candidate)
            sample = self.reader.sample(shard, number)
            try:
                return self.load(epoch, shard, sample, out)
            except DecodeError as error:
                skipped.append(Skip(self.reader.shards[shard][1].name, sample.key, str(error)))
        raise UserError(f"{MAX_TRIES} clips in a row cannot be used: {_name_offenders(skipped)}; repair the shards.")

    def load(self, epoch: int, shard: int, sample: Sample, out: np.ndarray) -> dict[str, Any]:
        """Read one sample into ``out``; return its description with its key.

        Raises:
            DecodeError: with the reason why the clip cannot be used.
        """
        metadata = parse_metadata(self.reader.read(shard, sample, "json"))
        if self.latent_shape:
            _load_latents(self.reader.read(shard, sample, "safetensors"), out)
        else:
            seed = sample_seed(self.plan.seed, epoch, sample.key)
            decode_clip(self.reader.read(shard, sample, "mp4"), self.shape, seed, out)
        return {**metadata, "key": sample.key}


def parse_metadata(data: bytes) -> dict[str, Any]:
    """A sample's json member.

    Raises:
        DecodeError: it is not a JSON object, or has no caption.
    """
    try:
        metadata = json.loads(data)
    except ValueError as error:
        raise DecodeError("its json member is malformed") from error
    caption = metadata.get("caption") if isinstance(metadata, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise DecodeError("no caption")
    return metadata


def _load_latents(data: bytes, out: np.ndarray) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        latents = load(data)["latents"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise DecodeError("its latents cannot be read") from error
    if latents.shape != out.shape:
        raise DecodeError(f"latents of shape {list(latents.shape)} where {list(out.shape)} is needed")
    out[:] = latents


class ClipStream:
    """The endless stream's position, its skipped clips, and the budget for them.

    Args:
        dataset: the batches.
        steps: the declared length: batches that the run asks for in all.
        error_budget: largest share of bad clips that is tolerated.
    """

    def __init__(self, dataset: ClipDataset, steps: int, error_budget: float = 0.01) -> None:
        self.dataset, self.steps, self.error_budget = dataset, steps, error_budget
        self.position = 0
        self.skipped: dict[tuple[str, str], Skip] = {}

    def advance(self, batch: Batch) -> None:
        """Say that ``batch`` was trained on: the position moves behind it, its skipped clips enter the record.

        All ranks must call this for the same batches.
        """
        self.position = batch["position"] + 1
        self._record(batch["skipped"])
        if self.dataset.world_size > 1 and self.position % SYNC_EVERY == 0:
            self._gather()
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
        plan = self.dataset.plan
        read = ((self.position if position is None else position) + 1) * plan.global_batch
        allowed = self.error_budget * min(max(read, BUDGET_FLOOR), plan.num_samples)
        if len(self.skipped) > allowed:
            raise UserError(
                f"{len(self.skipped)} of {plan.num_samples} clips cannot be used, more than error_budget "
                f"{self.error_budget:g} allows: {_name_offenders(list(self.skipped.values()))}; "
                "repair the shards or raise error_budget."
            )

    def state_dict(self) -> dict[str, Any]:
        """{epoch, batch, plan_hash, plan, skipped}: the place in the stream, for any number of ranks and workers.

        With several ranks all of them must call this together, as they do for a checkpoint.
        """
        self._gather()
        plan = self.dataset.plan
        epoch, batch = plan.epoch_and_batch(self.position)
        return {
            "epoch": epoch,
            "batch": batch,
            "plan_hash": plan.identity.hash,
            "plan": asdict(plan.identity),
            "skipped": [asdict(skip) for skip in self.skipped.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            UserError: the plan is another one; names the difference.
        """
        plan = self.dataset.plan
        if state["plan_hash"] != plan.identity.hash:
            difference = describe_difference(PlanIdentity(**state["plan"]), plan.identity)
            raise UserError(f"The checkpoint's place in the data does not fit: {difference} changed; set it back.")
        self.position = state["epoch"] * plan.batches_per_epoch + state["batch"]
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
        )

    def _record(self, skipped: Sequence[Mapping[str, str]]) -> None:
        for entry in skipped:
            skip = Skip(**entry)
            self.skipped.setdefault((skip.shard, skip.key), skip)

    def _gather(self) -> None:
        """Share the skipped clips among ranks; every rank then has the same record in the same order."""
        if self.dataset.world_size == 1 or not torch.distributed.is_initialized():
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, [asdict(skip) for skip in self.skipped.values()])
        self.skipped = {}
        for part in parts:
            self._record(part)


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
        return map(self.stream.check, super().__iter__())


def _name_offenders(skipped: Sequence[Skip]) -> str:
    named = "; ".join(str(skip) for skip in skipped[:NAMED_OFFENDERS])
    rest = len(skipped) - NAMED_OFFENDERS
    return named + (f"; and {rest} more" if rest > 0 else "")
