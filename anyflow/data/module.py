"""The DataModule: one card and split to training batches, resumable to the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from anyflow.data.decode import ClipShape
from anyflow.data.plan import Plan
from anyflow.data.shards import INDEX_NAME
from anyflow.data.stream import Batch, ClipDataset, ClipStream, ShardReader
from anyflow.errors import UserError


class VideoDataModule(pl.LightningDataModule):
    """Clips of a data set as batches of footage, or of cached latents.

    Args:
        card: name or path of a dataset card, or a folder of shards; or several of them, read as one data set.
        split: "train" or "heldout".
        batch_size: clips in a batch of one rank; the global batch is this times the number of ranks.
        frames, height, width: shape of a clip; longer footage is cut, larger is scaled and cropped, never stretched.
        fps: frames a second after resampling in time; None takes the footage's own frames.
        steps: batches that the whole run asks for: the stream's declared length.
        seed: seed of the order and of the cuts.
        num_workers: processes that decode; 0 decodes in the training process. The batches are the same for any number.
        error_budget: largest share of unusable clips; they are replaced and recorded up to it, beyond it the run stops.
        prefetch: batches that each worker prepares ahead.
        cache: folder of latents made by :func:`anyflow.data.cache.encode_dataset`; replaces the card's footage.
        codec_hash: fingerprint that the cache must carry, if it is given.

    Batches: ``{"frames": uint8 [B, F, H, W, 3] | "latents": float32 [B, F, C, H, W], "caption": list[str],
    "key": list[str], "attributes": list[dict], "position": int, "skipped": list[dict]}``.
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
        seed: int = 0,
        num_workers: int = 0,
        error_budget: float = 0.01,
        prefetch: int = 2,
        cache: str | Path | None = None,
        codec_hash: str | None = None,
    ) -> None:
        super().__init__()
        self.cards = [card] if isinstance(card, str | Path) else list(card)
        self.split = split
        self.batch_size = batch_size
        self.shape = ClipShape(frames, height, width, fps)
        self.steps, self.seed = steps, seed
        self.num_workers, self.prefetch = num_workers, prefetch
        self.error_budget = error_budget
        self.cache = Path(cache) if cache is not None else None
        self.codec_hash = codec_hash
        self.stream: ClipStream | None = None
        self._pending: Mapping[str, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and make the plan; called once, before the checkpoint's state arrives.

        Raises:
            UserError: a card, a shard or enough clips are missing.
        """
        if self.stream is not None:
            return
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        latent_shape = None
        folders = [folder for card in self.cards for folder in split_folders(card, self.split)]
        if self.cache is not None:
            from anyflow.data.cache import load_cache

            folders, latent_shape = [self.cache], load_cache(self.cache, self.codec_hash).latent_shape
        reader = ShardReader(folders)
        plan = Plan(reader.planned(), self.seed, self.batch_size * world_size)
        dataset = ClipDataset(reader, plan, self.shape, rank, world_size, latent_shape)
        self.stream = ClipStream(dataset, self.steps, self.error_budget)
        if self._pending is not None:
            self.stream.load_state_dict(self._pending)
        if self.trainer:
            # First in the list, so that a checkpoint written at the end of a batch has the position behind it.
            self.trainer.callbacks.insert(0, _StreamPosition(self))  # type: ignore[attr-defined]

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches from the stream's position on."""
        if self.stream is None:
            self.setup()
        assert self.stream is not None
        pin = self.trainer is not None and self.trainer.accelerator.__class__.__name__ == "CUDAAccelerator"
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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.data.stream is not None
        self.data.stream.advance(batch)


def split_folders(card: str | Path, split: str) -> list[Path]:
    """The shard folders of a card's split; a folder of shards, or of splits, stands for itself.

    Raises:
        UserError: there is no such card or split.
    """
    folder = Path(card)
    if (folder / INDEX_NAME).is_file():
        return [folder]
    if (folder / split / INDEX_NAME).is_file():
        return [folder / split]
    from anyflow.data.card import load_card

    found = load_card(card)
    if split not in found.splits:
        raise UserError(f"card {str(card)!r} has no split {split!r}: choose one of {', '.join(sorted(found.splits))}.")
    named = found.splits[split]
    return [Path(named)] if isinstance(named, str | Path) else [Path(folder) for folder in named]
