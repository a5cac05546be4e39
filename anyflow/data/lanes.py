"""Tars as they come: WebDataset's own pipeline behind our dealing of tars to ranks and workers, with a place in it.

Nothing is read beforehand. All epochs' tars, each epoch shuffled by the seed, are one endless sequence that is dealt in
turn to the lanes: a lane is one worker of one rank, and batch ``n`` of a rank is made by its worker ``n % workers``.
Every (epoch, tar) is read by one lane, so each clip is seen once an epoch; a lane begins its next epoch when its tars
of this one are read, and no rank waits for another, nor has fewer batches.

A lane's place is its epoch, the clips that it took from the shuffle buffer, and how many clips each tar had that it
read to the end. Which clips a buffer gives depends on their number alone: so a resumed lane finds by the library's own
shuffle, run on numbers, what it gave already and what lies in the buffer, and opens only the tars of the latter.
"""

from __future__ import annotations

import os
import random
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import count, islice, repeat
from lzma import LZMAError
from typing import Any

import numpy as np
import torch

from anyflow.data import remote
from anyflow.data.batches import Batch, BatchDataset, stacked, values_of
from anyflow.data.controls import Control
from anyflow.data.decode import Choice, ClipShape, DecodeError, decode_clip
from anyflow.data.members import Members
from anyflow.data.order import ORDER_VERSION, OrderIdentity, digest, raw_bits, sample_seed
from anyflow.data.places import open_at
from anyflow.data.reader import Split, checked_metadata
from anyflow.data.safety import is_safe_name
from anyflow.data.shards import load_index
from anyflow.data.skips import MAX_TRIES, Skip, none_usable
from anyflow.data.tar_headers import OUTSIDE, written
from anyflow.data.tar_index import NO_EXTENSION, TWICE, WHOLE_TAR
from anyflow.data.tars import USUAL, load_set
from anyflow.errors import UserError, first_line

BAD_TAR = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, zlib.error, LZMAError)
"""What reading a damaged tar raises; a server that does not answer raises a UserError, and ends the run."""


@dataclass(frozen=True)
class StreamedTar:
    """One tar to be streamed: its name and address, what its members hold, what stands in for a missing caption."""

    name: str
    address: str
    members: Members
    caption: str | None


def tars_of(splits: Sequence[Split]) -> tuple[StreamedTar, ...]:
    """The tars of some data sets, somebody else's or our own shards; no tar is opened.

    Raises:
        UserError: a split is a part of a single tar.
    """
    found: list[StreamedTar] = []
    for split in splits:
        tarset = load_set(split.folder)
        if tarset is None:
            url = remote.url_of(split.folder)
            names = [shard.name for shard in load_index(split.folder).shards]
            places = [remote.join(url, name) if url else str(split.folder / name) for name in names]
            members = USUAL
        else:
            names, places, members = list(tarset.names()), list(tarset.tars), tarset.members
            if tarset.part:
                raise UserError(
                    f"data.streaming=true: {split.name} is a single tar, and the clips to hold out are found by an "
                    "index: leave data.streaming out, or name further tars in a card's splits"
                )
        found += [StreamedTar(n, p, members, split.caption) for n, p in zip(names, places, strict=True)]
    return tuple(found)


def check_lanes(tars: int, ranks: int, workers: int) -> None:
    """Refuse fewer tars than there are workers of all ranks.

    Raises:
        UserError: there are fewer.
    """
    if tars < ranks * workers:
        raise UserError(
            f"data.streaming=true gives each worker tars of its own, and {ranks} ranks with {workers} workers are more "
            f"than {tars} tars: lower data.num_workers, or leave data.streaming out"
        )


@dataclass(frozen=True)
class LaneState:
    """A lane's place.

    Attributes:
        epoch: its own.
        taken: clips taken from the shuffle buffer in it, bad ones too.
        counts: clips of each of its tars that was read to the end in it, in order.
        whole: clips of its epoch before; 0 in the first.
    """

    epoch: int = 0
    taken: int = 0
    counts: tuple[int, ...] = ()
    whole: int = 0

    def text(self) -> str:
        """As a batch and a checkpoint carry it."""
        return " ".join(map(str, (self.epoch, self.taken, self.whole, *self.counts)))

    @classmethod
    def parse(cls, text: str) -> LaneState:
        """The inverse of :meth:`text`."""
        epoch, taken, whole, *counts = map(int, text.split())
        return cls(epoch, taken, tuple(counts), whole)


@dataclass(frozen=True)
class LaneOrder:
    """Which tars a lane reads in an epoch; as an :class:`anyflow.data.order.Order` to the stream, as far as it goes.

    Args:
        tars: all of them. seed: the run's data seed. global_batch: clips of an update over all ranks.
        ranks, workers: of each rank. buffer: clips that a lane shuffles together.

    Raises:
        UserError: there are fewer tars than lanes.
    """

    tars: tuple[StreamedTar, ...]
    seed: int
    global_batch: int
    ranks: int
    workers: int
    buffer: int
    batches_per_epoch: int = 1

    def __post_init__(self) -> None:
        check_lanes(len(self.tars), self.ranks, self.workers)

    @cached_property
    def identity(self) -> OrderIdentity:
        """The order's inputs, for the checkpoint."""
        content = digest("\n".join(tar.name for tar in self.tars))
        lanes = f"{self.ranks} x {self.workers}"
        return OrderIdentity(
            ORDER_VERSION, self.seed, self.global_batch, len(self.tars), 0, content, self.buffer, lanes=lanes
        )

    def epoch_and_batch(self, index: int) -> tuple[int, int]:
        """(0, batch): each lane has epochs of its own."""
        return 0, index

    def of_lane(self, epoch: int, lane: int) -> list[StreamedTar]:
        """The tars that a lane reads in an epoch, in order."""
        keys = raw_bits(len(self.tars), (self.seed, epoch))
        order = np.argsort(keys, kind="stable")
        first = (lane - epoch * len(self.tars)) % (self.ranks * self.workers)  # dealing goes on where an epoch ended
        return [self.tars[number] for number in order[first :: self.ranks * self.workers]]

    def randomness(self, epoch: int, lane: int) -> random.Random:
        """What a lane's shuffle buffer draws from in an epoch."""
        return random.Random(int(raw_bits(1, (self.seed, epoch, lane, self.buffer))[0]))

    def shuffled(self, source: Iterator[Any], epoch: int, lane: int) -> Iterator[Any]:
        """The library's shuffle buffer over a source."""
        from webdataset import filters

        initial = max(1, self.buffer // 10)
        return filters.shuffle(self.buffer, initial=initial, rng=self.randomness(epoch, lane))(source)


@dataclass
class Lane:
    """The endless clips of one worker of one rank, from a place on.

    What it finds at fault before a clip reaches the buffer is added to ``skipped``; members that nobody asks for to
    ``unused``.
    """

    order: LaneOrder
    number: int
    state: LaneState
    next_index: int = -1
    skipped: list[Skip] = field(default_factory=list)
    unused: set[str] = field(default_factory=set)
    process: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self._samples = self._endless()

    def take(self) -> tuple[int, StreamedTar, Mapping[str, Any]]:
        """The next clip: (epoch, its tar, its members), as WebDataset groups them.

        Raises:
            UserError: a whole epoch of the lane has no clip, or a server does not answer.
        """
        return next(self._samples)

    def _endless(self) -> Iterator[tuple[int, StreamedTar, Mapping[str, Any]]]:
        from webdataset import DataPipeline, SimpleShardList

        while True:
            start = self.state
            epoch, counts = start.epoch, list(start.counts)
            tars = self.order.of_lane(epoch, self.number)
            gone = self._gone(start, len(tars))

            shards = SimpleShardList([tar.address for tar in tars])
            feed = partial(self._feed, tars, gone, counts)
            shuffle = partial(self.order.shuffled, epoch=epoch, lane=self.number)
            picks = iter(DataPipeline(shards, feed, shuffle))
            for _ in islice(picks, start.taken):
                pass  # given before: only numbers went through the buffer
            taken = start.taken
            for taken, found in enumerate(picks, start=start.taken + 1):
                self.state = LaneState(epoch, taken, tuple(counts), start.whole)
                yield epoch, *found
            if not taken:
                named = ", ".join(tar.name for tar in tars[:3])
                raise UserError(
                    f"data.streaming=true: no clip in {len(tars)} tars of a worker ({named}): {self._why()}"
                )
            self.state = LaneState(epoch + 1, whole=taken)

    def _why(self) -> str:
        reasons = "; ".join(map(str, self.skipped[:3]))
        return reasons or "a card's members name what holds video and caption"

    def _gone(self, state: LaneState, tars: int) -> set[int]:
        """The places in the lane's epoch of the clips that it gave before."""
        finite = len(state.counts) == tars
        source: Iterator[int] = iter(range(sum(state.counts))) if finite else count()
        return set(islice(self.order.shuffled(source, state.epoch, self.number), state.taken))

    def _feed(self, tars: list[StreamedTar], gone: set[int], counts: list[int], shards: Iterator[Any]) -> Iterator[Any]:
        """The clips of the lane's tars; None for those that it gave before. ``counts`` is added to."""
        before = tuple(counts)
        place = 0
        for number, (tar, _) in enumerate(zip(tars, shards, strict=True)):
            known = before[number] if number < len(before) else None
            if known is not None and all(one in gone for one in range(place, place + known)):
                yield from repeat(None, known)
                place += known
                continue
            first = place
            for sample in islice(self._read(tar), known):
                yield None if place in gone else (tar, sample)
                place += 1
            if known is None:
                counts.append(place - first)
            elif place < first + known:
                self.skipped.append(Skip(tar.name, WHOLE_TAR, f"it had {known} clips before and has {place - first}"))
                yield from ((None if one in gone else (tar, {})) for one in range(place, first + known))
                place = first + known

    def _read(self, tar: StreamedTar) -> Iterator[dict[str, Any]]:
        """The samples of a tar with a video, by the library's own iterators; what is at fault is noted."""
        from webdataset.handlers import reraise_exception
        from webdataset.tariterators import group_by_keys, tar_file_iterator

        seen: set[str] = set()
        wanted: dict[str, bool] = {}
        twice: set[str] = set()
        group: tuple[str, set[str]] = ("", set())

        def is_wanted(name: str) -> bool:
            nonlocal group
            if not is_safe_name(name):
                self.skipped.append(Skip(tar.name, name, OUTSIDE))
                return False
            key, extension = tar.members.split(name) or ("", NO_EXTENSION)
            if key != group[0]:
                group = key, set()
            if key and extension in group[1]:
                twice.add(key)
            group[1].add(extension)
            if extension not in wanted:
                wanted[extension] = tar.members.wants(extension)
                self.unused |= set() if wanted[extension] else {extension}
            return wanted[extension]

        try:
            with closing(open_at(tar.address, ahead=True)) as file:
                options = {"skip_meta": None, "select_files": is_wanted, "rename_files": written}
                members = tar_file_iterator(file, handler=reraise_exception, **options)
                named = ({**member, "__url__": tar.name} for member in members)
                keys = lambda name: tar.members.split(name) or (None, None)  # noqa: E731
                for sample in group_by_keys(named, keys=keys, handler=lambda _: True):  # raised for what is twice
                    key = sample["__key__"]
                    if key not in seen and key not in twice:
                        yield sample
                    else:
                        reason = "its key occurs again: its members must stand together in a tar that is streamed"
                        self.skipped.append(Skip(tar.name, key, reason if key in seen else TWICE))
                    seen.add(key)
        except BAD_TAR as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            self.skipped.append(Skip(tar.name, WHOLE_TAR, f"it cannot be read to its end ({reason[:120]})"))


class TarDataset(BatchDataset):
    """As :class:`anyflow.data.stream.ClipDataset`, of tars that are streamed: a rank's batches, asked for in turn.

    Args:
        order: who reads which tar.
        shape: what a decoded clip looks like.
        rank, world_size: which of the ranks this is.
        passes: batches whose gradients make one update: a lane's place is one in clips, so another run may have others.
        controls: those to give with each clip.
    """

    order: LaneOrder
    free = "data.batch_size"

    def __init__(
        self,
        order: LaneOrder,
        shape: ClipShape,
        rank: int = 0,
        world_size: int = 1,
        passes: int = 1,
        controls: Mapping[str, Control] | None = None,
    ) -> None:
        self.order, self.shape, self.rank, self.world_size = order, shape, rank, world_size
        self.controls = controls
        self.passes, self.batch = passes, order.global_batch // passes
        self.starts: dict[int, LaneState] = {}
        """Each worker's place at the stream's position."""
        self._lanes: dict[int, Lane] = {}

    def adopt(self, saved: OrderIdentity, clips: int | None = None) -> None:
        """As :meth:`BatchDataset.adopt`, for the same ranks and workers: others are refused as such."""
        if saved.lanes == self.order.identity.lanes:
            super().adopt(saved, clips)

    def told(self) -> str:
        return f"{len(self.order.tars)} tars, streamed by {self.order.ranks} x {self.order.workers} workers"

    def lane(self, worker: int) -> int:
        """The number of a worker's lane among those of all ranks."""
        return self.rank * self.order.workers + worker

    def __getitem__(self, index: int) -> Batch:
        worker = index % self.order.workers
        lane = self._lanes.get(worker)
        if lane is None or lane.next_index != index or lane.process != os.getpid():
            start = self.starts.get(worker, LaneState())
            lane = self._lanes[worker] = Lane(self.order, self.lane(worker), start)
        lane.next_index = index + self.order.workers
        shape = self.shape
        size = self.batch // self.world_size
        pixels = np.empty((size, shape.frames, shape.height, shape.width, 3), dtype=np.uint8)
        try:
            metadata = [self._fill(lane, row) for row in pixels]
        except UserError as error:
            return {"error": str(error), "position": index}
        skipped, lane.skipped = lane.skipped, []
        unused, lane.unused = lane.unused, set()
        return {
            "frames": torch.from_numpy(pixels),
            "caption": [entry["caption"] for entry in metadata],
            "key": [entry["key"] for entry in metadata],
            "attributes": [entry["attributes"] for entry in metadata],
            "position": index,
            "place": self.place(index),
            "skipped": [asdict(skip) for skip in skipped],
            "lane": lane.state.text(),
            "unused": sorted(unused),
            **stacked(metadata),
        }

    def _fill(self, lane: Lane, out: np.ndarray) -> dict[str, Any]:
        """Write the lane's next good clip into ``out``; return its description with its key."""
        bad: list[Skip] = []
        while len(bad) < MAX_TRIES:
            epoch, tar, sample = lane.take()
            name = str(sample.get("__key__", WHOLE_TAR))
            key = f"{tar.name.removesuffix('.tar')}/{name}"
            parts = {part for part in sample if not part.startswith("__")}
            try:
                video = tar.members.video_of(parts)
                metadata = checked_metadata(tar.members.describe(parts, sample.__getitem__), tar.caption)
                seed, choice = sample_seed(self.order.seed, epoch, key), Choice()
                decode_clip(sample[video], self.shape, seed, out, choice)
                return {**metadata, "key": key, **values_of(metadata, self.controls, choice)}
            except DecodeError as error:
                bad.append(Skip(tar.name, name, str(error)))
                lane.skipped.append(bad[-1])
        raise none_usable(bad)
