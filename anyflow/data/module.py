"""The DataModule: one card and split to training batches, resumable to the batch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.accelerators import CUDAAccelerator
from torch.utils.data import DataLoader

from anyflow.data.batches import Batch, BatchDataset, ClipDataset
from anyflow.data.buckets import BucketDataset, make_buckets, sort_clips, sort_latents, tell_buckets
from anyflow.data.cache import LatentShape, load_cache
from anyflow.data.controls import Control
from anyflow.data.decode import ClipShape
from anyflow.data.lanes import LaneOrder, TarDataset, tars_of
from anyflow.data.mixture import order_of
from anyflow.data.reader import ShardReader, check_length, find_split
from anyflow.data.skips import Skip
from anyflow.data.stream import ClipStream
from anyflow.data.tar_stream import TarStream, left_out_within
from anyflow.errors import UserError
from anyflow.system.data_ranks import data_rank


class VideoDataModule(pl.LightningDataModule):
    """Clips of a data set as batches of footage, or of cached latents.

    Args:
        card: name or path of a dataset card, or a folder of shards; or several of them, read as one data set.
        split: "train" or "heldout".
        batch_size: clips in a batch of one rank; the global batch is this times the ranks (over ``context``).
        frames, height, width: shape of a clip; longer footage is cut, larger is scaled and cropped, never stretched.
        fps: frames a second after resampling in time; None takes the footage's own frames.
        steps: batches that the whole run asks for: the stream's declared length.
        passes: batches whose gradients make one update.
        context: neighbouring ranks that are given the same clips, of which they share the tokens.
        seed: seed of the order and of the cuts.
        num_workers: processes that decode; 0 decodes in the training process. The batches are the same for any number.
        error_budget: largest share of unusable clips; they are replaced and recorded up to it, beyond it the run stops.
        weights: each card's share of the clips that are seen; empty reads the cards as one, clip by clip.
        buckets: further shapes (frames, height, width): a clip comes in the one that fits it best, a batch is of one,
            and has as many clips as fit into the tokens of ``batch_size`` clips of the run's own shape.
        streaming: read the cards' tars as they come, without an index (:mod:`anyflow.data.lanes`).
        shuffle_buffer: clips that each worker shuffles together then.
        prefetch: batches that each worker prepares ahead.
        cache: folders of latents made by :class:`anyflow.data.encode.Encoding`; they replace the cards' footage.
        codec_hash: fingerprint of the autoencoder that the caches must carry, if it is given.
        token_side: pixels of a side that a token covers, for what is said of the buckets.
        controls: those to give with each clip (:func:`anyflow.data.wanted.wanted_controls`); none by default.

    Batches: ``{"frames": uint8 [B, F, H, W, 3] | "latents": float32 [B, F, C, H, W], "caption": list[str],
    "key": list[str], "attributes": list[dict], "position": int, "place": [clips of its update before it, all of them],
    "skipped": list[dict]}``, and with controls ``"controls": float32 [B, F of pixels, sum of widths]``.
    """

    def __init__(
        self,
        card: str | Path | Sequence[str | Path],
        *,
        split: str = "train",
        batch_size: int = 1,
        frames: int = 17,
        height: int = 64,
        width: int = 96,
        fps: float | None = None,
        steps: int = 1000,
        passes: int = 1,
        context: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        error_budget: float = 0.01,
        weights: Sequence[float] = (),
        buckets: Sequence[tuple[int, int, int]] = (),
        streaming: bool = False,
        shuffle_buffer: int = 100,
        prefetch: int = 2,
        cache: str | Path | Sequence[str | Path] | None = None,
        codec_hash: str | None = None,
        token_side: int = 16,
        controls: Mapping[str, Control] | None = None,
    ) -> None:
        super().__init__()
        self.cards = _as_list(card)
        self.split = split
        self.batch_size = batch_size
        self.shape = ClipShape(frames, height, width, fps)
        self.steps, self.passes, self.seed = steps, passes, seed
        self.context = context
        self.num_workers, self.prefetch = num_workers, prefetch
        self.error_budget = error_budget
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.weights = tuple(weights)
        self.shapes = [self.shape, *(ClipShape(*size, fps) for size in buckets)]
        self.caches = [Path(folder) for folder in _as_list(cache or [])]
        self.codec_hash, self.controls, self.token_side = codec_hash, controls, token_side
        self.stream: ClipStream | None = None
        self.shares: list[str] = []
        """The buckets in words, once set up; none if there is but one shape."""
        self._pending: Mapping[str, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and make the order; called once, before the checkpoint's state arrives.

        Raises:
            UserError: a card, a shard or enough clips are missing.
        """
        if self.stream is not None:
            return
        ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        rank, world_size = data_rank(*ranks, self.context)
        if self.streaming:
            streamed = self._open_tars(rank, world_size)
            self.stream = TarStream(streamed, self.steps, self.error_budget)
        else:
            dataset, skipped = self._open(rank, world_size)
            dataset.passes = self.passes
            self.stream = ClipStream(dataset, self.steps, self.error_budget, skipped)
            if skipped:  # encoded under another budget, perhaps
                self.stream.check_budget()
        if self._pending is not None:
            self.stream.load_state_dict(self._pending)
        if self.trainer:
            # First in the list, so that a checkpoint written at the end of a batch has the position behind it.
            self.trainer.callbacks.insert(0, _StreamPosition(self))  # type: ignore[attr-defined]

    def _open_tars(self, rank: int, world_size: int) -> TarDataset:
        """The batches of this rank from tars as they come.

        Raises:
            UserError: a card is missing, or there are fewer tars than workers.
        """
        tars = tars_of([find_split(card, self.split, index=False) for card in self.cards])
        update, workers = self.batch_size * world_size * self.passes, max(1, self.num_workers)
        order = LaneOrder(tars, self.seed, update, world_size, workers, self.shuffle_buffer)
        return TarDataset(order, self.shape, rank, world_size, self.passes, self.controls)

    def _open(self, rank: int, world_size: int) -> tuple[BatchDataset, list[Skip]]:
        """The batches of this rank, and the clips that encoding left out.

        Raises:
            UserError: as :meth:`setup`.
        """
        latent_shapes, skipped = self._check_caches() if self.caches else (None, [])
        need_shapes = len(self.shapes) > 1
        splits = [] if self.caches else [find_split(card, self.split, shapes=need_shapes) for card in self.cards]
        skipped += [skip for split in splits for skip in left_out_within(split.folder, self.error_budget)]
        reader = ShardReader(self.caches or [s.folder for s in splits], [s.caption for s in splits] or None)
        base_batch = self.batch_size * world_size
        if len(self.shapes) == 1:
            for split in splits:
                check_length(split, self.shape)
            shards = reader.identities()
            update = base_batch * self.passes  # ordered as one, so that its clips are the same however it is split
            whole = update if update <= sum(shard.samples for shard in shards) else base_batch
            order = order_of(shards, reader.counts, self.weights, self.seed, whole)
            latent_shape = latent_shapes[0] if latent_shapes else None
            dataset = ClipDataset(reader, order, self.shape, rank, world_size, latent_shape, self.controls)
            dataset.batch = base_batch
            return dataset, skipped
        kept = sort_latents(reader, latent_shapes) if latent_shapes else sort_clips(reader, splits, self.shapes)
        buckets = make_buckets(reader, kept, self.shapes, self.batch_size, world_size, self.weights, latent_shapes)
        self.shares = tell_buckets(buckets, sum(len(shard.samples) for _, shard in reader.shards), self.token_side)
        return BucketDataset(buckets, self.seed, base_batch, rank, world_size, self.controls), skipped

    def _check_caches(self) -> tuple[list[LatentShape], list[Skip]]:
        """Return the latents' shapes (() for one that no clip has) and the clips that encoding left out.

        Raises:
            UserError: a cache is of another autoencoder, or of other shapes of clips.
        """
        caches = [load_cache(folder, self.codec_hash) for folder in self.caches]
        for folder, cache in zip(self.caches, caches, strict=True):
            if list(cache.shapes) != self.shapes:
                raise UserError(f"the cache {str(folder)!r} holds {cache.shapes}, not {self.shapes}: encode again.")
        shapes = [next(filter(None, found), ()) for found in zip(*(c.latent_shapes for c in caches), strict=True)]
        return shapes, [skip for cache in caches for skip in cache.skipped]  # type: ignore[return-value]

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches from the stream's position on."""
        if self.stream is None:
            self.setup()
        assert self.stream is not None
        pin = self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator)
        return self.stream.loader(self.num_workers, self.prefetch, pin)

    def state_dict(self) -> dict[str, Any]:
        """The stream's place and its skipped clips."""
        return self.stream.state_dict() if self.stream is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved place, now or as soon as the stream is set up.

        Raises:
            UserError: the data, the seed or the global batch is not the saved one.
        """
        if not state_dict:
            return
        if self.stream is None:
            self._pending = state_dict
        else:
            self.stream.load_state_dict(state_dict)


class _StreamPosition(pl.Callback):
    """Moves the stream's position when a batch was trained on; Lightning gives data modules no such hook."""

    def __init__(self, data: VideoDataModule) -> None:
        self.data = data

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for line in self.data.shares:
                print(f"bucket {line}", file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.data.stream is not None
        self.data.stream.advance(batch)


def _as_list(value: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [value] if isinstance(value, str | Path) else list(value)
