"""Batches by number: a pure function of (order, number, rank, world size), whoever computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from anyflow.data.cached_choice import chosen_of
from anyflow.data.controls import Control, control_values, with_domain
from anyflow.data.decode import Choice, ClipShape, DecodeError, decode_clip
from anyflow.data.mixture import MixedOrder
from anyflow.data.order import Order, OrderIdentity, sample_seed
from anyflow.data.reader import ShardReader, load_latents
from anyflow.data.shards import Sample
from anyflow.data.skips import MAX_TRIES, Skip, none_usable
from anyflow.errors import UserError

Batch = dict[str, Any]


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
    free = "data.batch_size and ranks"
    """What a run that goes on may change, as long as its updates have as many clips."""

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

    def adopt(self, saved: OrderIdentity, clips: int | None = None) -> None:
        """Take the order's batches from a checkpoint whose updates have as many clips, however they are split here.

        Raises:
            UserError: they have another number.
        """
        check_clips(clips, self.batch * self.passes, self.free)
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
        shape: what a decoded clip looks like, also before it was encoded.
        rank, world_size: which part of each batch.
        latent_shape: (F, C, H, W) if the shards hold latents instead of footage.
        controls: those to give with each clip; none by default.

    An item is ``{"frames": uint8 [B, F, H, W, 3] | "latents": float32 [B, F, C, H, W], "caption", "key",
    "attributes", "position", "place", "skipped"}``, and with controls ``"controls": float32 [B, F, W]`` of the frames
    of pixels, as :func:`anyflow.data.controls.control_values` has them. A failure is returned as
    ``{"error": sentence}``: an exception that crosses from a worker to the main process would arrive as a traceback.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order | MixedOrder,
        shape: ClipShape,
        rank: int = 0,
        world_size: int = 1,
        latent_shape: tuple[int, int, int, int] | None = None,
        controls: Mapping[str, Control] | None = None,
    ) -> None:
        self.reader, self.order, self.shape, self.controls = reader, order, shape, controls
        self.batch = order.global_batch
        self.rank, self.world_size = rank, world_size
        self.latent_shape = latent_shape

    def __getitem__(self, index: int) -> Batch:
        own = range(self.batch * index + self.rank, self.batch * (index + 1), self.world_size)
        places = [self._place_of(clip) for clip in own]
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
            **stacked(metadata),
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
        """Read one sample into ``out``; return its description with its key, and the controls as "control_values".

        Raises:
            DecodeError: with the reason why the clip cannot be used.
        """
        metadata = self.reader.describe(shard, sample)
        choice = Choice()
        if self.latent_shape:
            load_latents(self.reader.read(shard, sample, "safetensors"), out)
            if self.controls:
                choice.numbers = chosen_of(metadata, self.shape)
        else:
            seed = sample_seed(self.order.seed, epoch, sample.key)
            decode_clip(self.reader.video(shard, sample), self.shape, seed, out, choice)
        return {**metadata, "key": sample.key, **values_of(metadata, self.controls, choice)}


def values_of(metadata: Mapping[str, Any], controls: Mapping[str, Control] | None, choice: Choice) -> dict[str, Any]:
    """{"control_values": float32 [F, W]} of a clip by its description; empty if no controls are asked for.

    Raises:
        DecodeError: a control is not what it is said to be.
    """
    if not controls:
        return {}
    own = metadata.get("controls")
    if isinstance(own, Mapping):
        own = with_domain(str(metadata.get("domain") or ""), own)
    return {"control_values": control_values(own, controls, choice.numbers, choice.frames)}


def stacked(metadata: Sequence[Mapping[str, Any]]) -> Batch:
    """{"controls": float32 [B, F, W]} of a batch's clips; empty if none are asked for."""
    found = [entry["control_values"] for entry in metadata if "control_values" in entry]
    return {"controls": torch.from_numpy(np.stack(found))} if found else {}


def check_clips(was: int | None, now: int, free: str = BatchDataset.free) -> None:
    """Refuse another number of clips an update than a checkpoint's, if that is known; ``free`` may be changed.

    Raises:
        UserError: it is another.
    """
    if was not in (None, now):
        raise UserError(
            f"The checkpoint's place in the data does not fit: global batch (was {was}, is {now}) changed; set "
            f"data.global_batch={was}, and {free} as you like."
        )
