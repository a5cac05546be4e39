"""Encoding on one device or on many: the shards of a cache, shared among ranks through Lightning's predict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import lightning
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.utils.data import DataLoader

from anyflow.backbone.codec import Codec
from anyflow.backbone.parallelize import from_rank_zero, join_ranks, rank_and_size, wait_for_all
from anyflow.data.encode import CachePart, Encoding
from anyflow.system.console import progress_line


class JobRunner(lightning.LightningModule):
    """A prediction is a shard, written to its place; a batch is its number among ``jobs``."""

    def __init__(
        self, encoding: Encoding, jobs: Sequence[CachePart], progress: Callable[[int, int], None] | None
    ) -> None:
        super().__init__()
        self.encoding, self.jobs, self.progress = encoding, jobs, progress

    def predict_step(self, batch: int, batch_index: int) -> bool:
        """Write one shard; True, for Lightning warns of nothing."""
        self.encoding.run(self.jobs[batch], self.progress)
        return True


def encode_on_ranks(encoding: Encoding, codec: Codec, accelerator: str, devices: int) -> None:
    """Encode what is missing, each rank its share of the shards; called on every rank.

    Args:
        encoding: what of.
        codec: it comes to this rank's device, and leaves it again if it is stored.
        accelerator, devices: this machine's, one a rank.

    Raises:
        UserError: too many clips are bad, the cache cannot be written, or another process encodes the same.
    """
    device = join_ranks(accelerator)
    rank = rank_and_size()[0]
    if from_rank_zero(encoding.is_whole() if rank == 0 else None):
        return
    with encoding.held(waits=False) if rank == 0 else nullcontext():
        _encode_missing(encoding, codec, accelerator, devices, device)


def _encode_missing(encoding: Encoding, codec: Codec, accelerator: str, devices: int, device: torch.device) -> None:
    rank, ranks = rank_and_size()
    with codec.lent(device):
        if rank == 0:
            encoding.begin()
            print(f"{encoding.title}: {encoding.estimate().told(ranks)}", file=sys.stderr, flush=True)
        jobs = from_rank_zero(encoding.open_jobs() if rank == 0 else None)
        before = len(encoding.places) - sum(len(job.items) for job in jobs if job.kind == "latents")
        with progress_line(f"encoding {encoding.title}") as show:

            def progress(done: int, total: int) -> None:
                show(min(before + done * ranks, total), total)

            trainer = lightning.Trainer(
                accelerator=accelerator,
                devices=devices,
                strategy="ddp" if ranks > 1 else "auto",
                plugins=[TorchElasticEnvironment()] if ranks > 1 else None,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                inference_mode=False,  # the codec is used as in training
            )
            runner = JobRunner(encoding, jobs, progress if rank == 0 else None)
            own: DataLoader[int] = DataLoader(range(rank, len(jobs), ranks), batch_size=None)  # type: ignore[arg-type]
            trainer.predict(runner, own, return_predictions=False)
    wait_for_all()
    if rank == 0:
        encoding.finish()
    wait_for_all()


def devices_here() -> tuple[str, int]:
    """(accelerator, devices): all GPUs, or the CPU once."""
    return ("gpu", torch.cuda.device_count()) if torch.cuda.is_available() else ("cpu", 1)
