"""Every operation of a step seen, every storage counted while it is alive: the peak of fake tensors, on fake ranks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """Sums the storages that are alive, whoever made them, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.exchanged = 0
        """Bytes that went into all-to-alls: the part for this rank itself too."""
        self.peaks: list[float] = []
        self._sizes: dict[int, int] = {}
        self._is_working_out_shapes = False

    def next_phase(self) -> None:
        """Note the peak of the phase that ends here."""
        self.peaks.append(self.peak)
        self.peak = self.live

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = local_part(tensor).untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = 0
        self._resized(key, storage.nbytes())
        weakref.finalize(storage, self._freed, key)

    def _resized(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __enter__(self) -> Any:
        original, propagate = self._originals = (
            torch.UntypedStorage.resize_,
            ShardingPropagator._propagate_tensor_meta_non_cached,
        )

        def resize(storage: torch.UntypedStorage, size: int) -> Any:  # how FSDP2 frees what it has gathered
            result = original(storage, size)
            if id(storage) in self._sizes:
                self._resized(id(storage), size)
            return result

        def work_out_shapes(*arguments: Any) -> Any:  # DTensor tries the operation on the whole: no real memory
            self._is_working_out_shapes = True
            try:
                return propagate(*arguments)
            finally:
                self._is_working_out_shapes = False

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        ShardingPropagator._propagate_tensor_meta_non_cached = work_out_shapes  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._originals[0]  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = self._originals[1]  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # it comes again with each rank's own part
        result = function(*arguments, **(options or {}))
        if function is torch.ops.c10d.alltoall_base_.default:
            self.exchanged += arguments[1].numel() * arguments[1].element_size()
        if self._is_working_out_shapes:
            return result
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                self.count(tensor)
        return result


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """A process group of any size in which nothing is sent."""
    if size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_part(tensor: Tensor) -> Tensor:
    """What a rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
