"""Weights spread over ranks under Lightning, and their checkpoints: every rank writes its own part, as safetensors.

A checkpoint is the folder ``step_*``. One process keeps everything in ``state.ckpt``; sharded runs keep plain values
there and put every tensor beside it, through torch's distributed checkpoint in its safetensors form, so that nothing is
ever unpickled. Either kind is resumed by any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from anyflow.backbone.parallelize import WAIT, gloo_group, part_of
from anyflow.stages.base import check_complete
from anyflow.tracking.checkpoints import SHARDS, readable, write_sums
from anyflow.training.callbacks.background import Writer
from anyflow.training.callbacks.checkpoints import save_state

_WEIGHT, _OPTIMIZER = "weights.", "optimizer."


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 for a stage whose networks :func:`anyflow.backbone.parallelize.parallelize` has spread already."""

    def __init__(self, ranks: int, writer: Writer | None = None) -> None:
        super().__init__(data_parallel_size=ranks, tensor_parallel_size=1, timeout=WAIT)
        self.writer = writer or Writer()
        self._apart: Any = None  # ranks that write meet in a group of their own: training's collectives go on

    def model_to_device(self) -> None:
        """Tell the stage where it computes. Weights lie where they were put, in host memory if they are offloaded."""
        assert self.lightning_module is not None
        self.lightning_module._device = self.root_device

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's part of every weight."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """This rank's part of an optimiser's state, by names instead of numbers."""
        inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        names = self._names()
        groups = [
            {**group, "params": [names[id(weight)] for weight in group["params"]]} for group in inner.param_groups
        ]
        return {"state": {names[id(weight)]: state for weight, state in inner.state.items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write plain values to ``filepath`` and the tensors beside it."""
        path = Path(filepath)
        tensors = {_WEIGHT + name: tensor for name, tensor in checkpoint.pop("state_dict").items()}
        for number, state in enumerate(checkpoint["optimizer_states"]):
            for name, fields in state.pop("state").items():
                tensors |= {f"{_OPTIMIZER}{number}.{name}.{field}": value for field, value in fields.items()}
        storage = HuggingFaceStorageWriter(str(path.parent), save_distributed=True)
        if self.writer.is_behind:
            self._apart = self._apart or gloo_group()
            written = dcp.async_save(tensors, storage_writer=storage, process_group=self._apart)
            self.writer.later(_as_exception()(written.result))  # type: ignore[union-attr]
            self.writer.later(lambda: write_sums(path.parent, self.global_rank, self.world_size))
            self.writer.later(lambda: dist.barrier(group=self._apart))  # before the first rank gives it its name
        else:
            with _as_exception():
                dcp.save(tensors, storage_writer=storage)
            write_sums(path.parent, self.global_rank, self.world_size)  # Lightning has the ranks meet after it
        if self.is_global_zero:
            plain = self.writer.stage({**checkpoint, SHARDS: self.world_size})
            self.writer.later(lambda: save_state(plain, path))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Put a checkpoint of either kind into the stage and its optimisers; returns the plain values."""
        path = Path(checkpoint_path)
        with readable(path):
            plain = _own(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        if is_sharded_checkpoint(path):
            self._load_parts(path, plain)
        else:
            self._load_whole(plain)
        return plain

    def _load_parts(self, path: Path, plain: dict[str, Any]) -> None:
        module: Any = self.lightning_module
        with readable(path), _as_exception():
            stored = _stored(path)
        check_complete(module, (key.removeprefix(_WEIGHT) for key in stored))
        tensors = {_WEIGHT + name: tensor for name, tensor in module.state_dict().items() if _WEIGHT + name in stored}
        weights = dict(module.named_parameters())
        states: list[dict[str, Any]] = []
        for number, saved in enumerate(plain["optimizer_states"]):
            state: dict[int, dict[str, Tensor]] = {}
            for index, name, key, field in _optimizer_entries(stored, saved, number):
                state.setdefault(index, {})[field] = tensors[key] = _like(weights[name], stored[key])
            states.append({"state": state, "param_groups": _numbered(saved["param_groups"])})
        with readable(path), _as_exception():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path.parent)))
        for optimizer, loaded in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(loaded)

    def _load_whole(self, plain: dict[str, Any]) -> None:
        module: Any = self.lightning_module
        saved = plain.pop("state_dict")
        check_complete(module, saved)
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if name in saved:
                    tensor.copy_(part_of(saved[name], tensor))
        for optimizer, state in zip(self.optimizers, plain["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            parts = {
                index: {
                    field: part_of(value, weights[index]) if value.shape == weights[index].shape else value
                    for field, value in fields.items()
                }
                for index, fields in state["state"].items()
            }
            optimizer.load_state_dict({"state": parts, "param_groups": state["param_groups"]})

    def _names(self) -> dict[int, str]:
        assert self.lightning_module is not None
        return {id(weight): name for name, weight in self.lightning_module.named_parameters()}


class AnyCheckpoint(TorchCheckpointIO):
    """Reads either kind of checkpoint, for runs whose weights are whole; ``writer`` writes."""

    def __init__(self, writer: Writer | None = None) -> None:
        super().__init__()
        self.writer = writer or Writer()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the whole state, now or behind."""
        # at its place: Lightning writes through the system's folder for temporary files, which may be small, and where
        # what was killed would stay
        staged = self.writer.stage(checkpoint)
        self.writer.later(lambda: save_state(staged, Path(path)))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole state, as one process saves it."""
        return read_checkpoint(Path(path))


@contextmanager
def _as_exception() -> Iterator[None]:
    """Make an exception of what torch's distributed checkpoints raise: it is none, and nobody would catch it."""
    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"a checkpoint's part of rank {rank}: {first}") from first


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a checkpoint's tensors lie beside its ``state.ckpt``."""
    return any(path.parent.glob("*.safetensors"))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole of a checkpoint (its ``state.ckpt``), put together in host memory if it is sharded."""
    with readable(path), _as_exception():
        plain = _own(torch.load(path, map_location="cpu", weights_only=True))
        if not is_sharded_checkpoint(path):
            return plain
        stored = _stored(path)
        tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in stored.items()}
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path.parent)), no_dist=True)
    plain["state_dict"] = {
        key.removeprefix(_WEIGHT): tensor for key, tensor in tensors.items() if key.startswith(_WEIGHT)
    }
    for number, saved in enumerate(plain["optimizer_states"]):
        state: dict[int, dict[str, Tensor]] = {}
        for index, _, key, field in _optimizer_entries(stored, saved, number):
            state.setdefault(index, {})[field] = tensors[key]
        plain["optimizer_states"][number] = {"state": state, "param_groups": _numbered(saved["param_groups"])}
    return plain


def _own(plain: Any) -> dict[str, Any]:
    """What was read, if a run of ours has written it."""
    if not isinstance(plain, dict) or "anyflow" not in plain:
        raise ValueError("no run of anyflow has written it")
    return plain


def _stored(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds: sizes and precisions by key, from the files' headers."""
    return dict(HuggingFaceStorageReader(str(path.parent)).read_metadata().state_dict_metadata)


def _optimizer_entries(
    stored: dict[str, Any], saved: dict[str, Any], number: int
) -> Iterator[tuple[int, str, str, str]]:
    """``(index, weight's name, key, field)`` of every stored tensor of an optimiser."""
    names = [name for group in saved["param_groups"] for name in group["params"]]
    index = {name: place for place, name in enumerate(names)}
    prefix = f"{_OPTIMIZER}{number}."
    for key in stored:
        if key.startswith(prefix):
            name, _, field = key.removeprefix(prefix).rpartition(".")
            yield index[name], name, key, field


def _numbered(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups whose weights are numbers again, as ``Optimizer.load_state_dict`` takes them."""
    counted, first = [], 0
    for group in groups:
        counted.append({**group, "params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    return counted


def _like(weight: Tensor, entry: Any) -> Tensor:
    """Room for a stored tensor: spread as the weight that it belongs to, if it has its shape."""
    if entry.size == weight.shape:
        return torch.empty_like(weight, dtype=entry.properties.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype)
