"""A pretended GPU: CPU tensors whose storages carry a label, so that device faults show on a machine without a GPU.

Within :func:`pretended` torch says that there is a CUDA device. What is moved to it, or made on it, is computed on the
CPU all the same, but its storage is labelled: ``tensor.device`` says ``cuda:0``, whatever is computed from it is there
too, and the :class:`Findings` take down

- ``mismatches``: operations that mix tensors of the device and of the host, which a GPU refuses;
- ``syncs``: places where the host waits for the device: ``.item()``, ``bool()``, masks as indices, ``.cpu()``;
- ``uploads``: copies from the host to the device;
- ``work``: matrix products and convolutions (in multiplications) by phase, by who does them, on which device and in
  which precision.

``torch.autocast("cuda")`` is autocast of the CPU's: the precision that is computed in is real. Kernels are not, nor is
memory: what a GPU's kernel refuses or how much it holds, this does not see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from findings import Findings
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
GIB = 2**30


class Labels:
    """Which storages are on the device. A label is held with a weak reference: no other storage gets its address."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}
        self._sweep_at = 4096

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return _storage(tensor)._cdata in self._held

    def put(self, tensor: Tensor) -> None:
        """Label a tensor's storage."""
        storage = _storage(tensor)
        if storage._cdata not in self._held:
            self._held[storage._cdata] = StorageWeakRef(storage)
        if len(self._held) > self._sweep_at:
            self._held = {key: ref for key, ref in self._held.items() if not ref.expired()}
            self._sweep_at = max(4096, 2 * len(self._held))


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # within torch.func.jvp
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


class Gpu:
    """The device: its labels, and what was found."""

    def __init__(self) -> None:
        self.labels, self.findings = Labels(), Findings()
        self.forced: list[bool] = []
        self.at_work = False

    @contextmanager
    def putting(self, on_device: bool) -> Iterator[None]:
        """Within the block all that is made is on the device, or on the host."""
        self.forced.append(on_device)
        try:
            yield
        finally:
            self.forced.pop()

    @contextmanager
    def working(self, on_device: bool) -> Iterator[None]:
        """Within the block what an operation makes for itself (forward AD its zeros) is where its arguments are."""
        before, self.at_work = self.at_work, on_device
        try:
            yield
        finally:
            self.at_work = before

    def device_of(self, tensor: Tensor) -> torch.device:
        """What ``tensor.device`` says."""
        real = tensor.device
        return CUDA if real.type == "cpu" and self.labels.holds(tensor) else real


# What Python asks of a tensor: devices, moves, things made on a device ------------------------------------------------


class Functions(TorchFunctionMode):
    """Answers for devices, and moves between them."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self.gpu, func, args, kwargs)
        if kwargs.get("device") is not None:
            return _made(self.gpu, func, args, kwargs)
        with self.gpu.working(any(isinstance(one, Tensor) and self.gpu.labels.holds(one) for one in args)):
            return func(*args, **kwargs)


def _made(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Any:
    """Something made on a named device (``torch.zeros(..., device=...)``)."""
    device = _device(kwargs["device"])
    if device.type not in ("cuda", "cpu"):
        return func(*args, **kwargs)
    if device.type == "cuda":
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            gpu.findings.upload()
        if kwargs.get("generator") is not None:
            gpu.findings.mismatch("a host's generator draws on the device")
    with gpu.putting(device.type == "cuda"):
        made = func(*args, **{**kwargs, "device": HOST})
    if device.type == "cuda" and isinstance(made, Tensor):
        gpu.labels.put(made)
    return made


def _to(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Tensor:
    tensor, *rest = args
    copy = kwargs.pop("copy", False)
    other = kwargs.pop("other", None)
    if rest and isinstance(rest[0], Tensor):
        other = rest.pop(0)
    if other is not None:
        device, dtype, layout = gpu.device_of(other), other.dtype, None
    else:
        device, dtype, _, layout = torch._C._nn._parse_to(*rest, **kwargs)
    if device is not None and device.type not in ("cuda", "cpu"):
        return func(*args, **kwargs)
    options: dict[str, Any] = {"dtype": dtype or tensor.dtype, **({"memory_format": layout} if layout else {})}
    here = gpu.device_of(tensor)
    if device is None or device.type == here.type or here.type not in ("cuda", "cpu"):
        return tensor.to(copy=copy, **options)
    return _moved(gpu, tensor, device.type == "cuda", "to(cpu)", **options)


def _moved(gpu: Gpu, tensor: Tensor, to_device: bool, how: str, **options: Any) -> Tensor:
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Move.apply(tensor, gpu, to_device, how, options)
    return _copied_over(gpu, tensor, to_device, how, **options)


def _copied_over(gpu: Gpu, tensor: Tensor, to_device: bool, how: str, **options: Any) -> Tensor:
    gpu.findings.upload() if to_device else gpu.findings.sync(how)
    with gpu.putting(to_device):
        return tensor.to(copy=True, **options)


class _Move(torch.autograd.Function):
    """A move whose gradient moves back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gpu: Gpu, to_device: bool, how: str, options: Any) -> Tensor:
        ctx.gpu, ctx.to_device, ctx.dtype = gpu, to_device, tensor.dtype
        return _copied_over(gpu, tensor, to_device, how, **options)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        moved = _copied_over(ctx.gpu, gradients[0], not ctx.to_device, "a gradient to the host", dtype=ctx.dtype)
        return moved, None, None, None, None


def _cpu(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Tensor:
    return _moved(gpu, args[0], False, "cpu()") if gpu.labels.holds(args[0]) else args[0]


def _cuda(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Tensor:
    return args[0] if gpu.labels.holds(args[0]) else _moved(gpu, args[0], True, "")


def _new_tensor(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Tensor:
    if kwargs.get("device") is None:
        kwargs["device"] = gpu.device_of(args[0])
    return _made(gpu, func, args, kwargs)


def _listed(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Any:
    if gpu.labels.holds(args[0]):
        gpu.findings.sync("tolist()")
    return func(*args, **kwargs)


def _as_numpy(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Any:
    if gpu.labels.holds(args[0]):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return func(*args, **kwargs)


def _copied(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Tensor:
    copied = func(*args, **kwargs)
    if gpu.labels.holds(args[0]):
        gpu.labels.put(copied)
    return copied


_SPECIAL: dict[Any, Callable[[Gpu, Any, Any, Any], Any]] = {
    torch.Tensor.device.__get__: lambda gpu, func, args, kwargs: gpu.device_of(args[0]),
    torch.Tensor.is_cuda.__get__: lambda gpu, func, args, kwargs: gpu.device_of(args[0]).type == "cuda",
    torch.Tensor.is_cpu.__get__: lambda gpu, func, args, kwargs: gpu.device_of(args[0]).type == "cpu",
    torch.Tensor.get_device: lambda gpu, func, args, kwargs: 0 if gpu.labels.holds(args[0]) else -1,
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.pin_memory: lambda gpu, func, args, kwargs: args[0],
    torch.Tensor.tolist: _listed,
    torch.Tensor.numpy: _as_numpy,
    torch.Tensor.__array__: _as_numpy,
    torch.Tensor.__deepcopy__: _copied,
}


def _device(named: Any) -> torch.device:
    return torch.device("cuda", named) if isinstance(named, int) else torch.device(named)


# What is computed -----------------------------------------------------------------------------------------------------

_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
_EQUAL_EVEN_FOR_NUMBERS = {"cat", "stack"}


class Operations(TorchDispatchMode):
    """Sees every operation: on what device it is, whether the host waits for it, whether devices are mixed."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # a backward pass comes here with the other mode still on
            name = func._schema.name.removeprefix("aten::")
            tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor) and one.device == HOST]
            places = [self.gpu.labels.holds(one) for one in tensors]
            is_there = self.gpu.forced[-1] if self.gpu.forced else any(places) if places else self.gpu.at_work
            if any(places) and not self.gpu.forced:
                self._check(name, func, args, kwargs, tensors, places)
            before = {one.untyped_storage()._cdata for one in tensors}
            result = func(*args, **kwargs)
            made = [one for one in tree_iter(result) if isinstance(one, Tensor) and one.device == HOST]
            for one in made if is_there else ():
                if one.untyped_storage()._cdata not in before:
                    self.gpu.labels.put(one)
            if name in _PRODUCTS and made:
                self._note_work(name, args, made[0], is_there)
            return result

    def _check(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], places: list[bool]) -> None:
        findings = self.gpu.findings
        indexes = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if indexes:
            given = [one for one in args[1] if isinstance(one, Tensor)]
            if any(one.dtype == torch.bool for one in given):
                findings.sync("a mask as index")
            tensors, places = tensors[:1] + tensors[1 + len(given) :], places[:1] + places[1 + len(given) :]
        if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            findings.sync(name)
        if name == "copy_":
            if places[0] != places[1]:
                findings.upload() if places[0] else findings.sync("copy_ to the host")
            return
        strict = name in _EQUAL_EVEN_FOR_NUMBERS
        strangers = [one for one, there in zip(tensors, places, strict=True) if not there and (one.ndim > 0 or strict)]
        if strangers or (func._schema.is_mutable and not places[0]):
            shapes = [
                f"{'cuda' if there else 'cpu'} {list(one.shape)}" for one, there in zip(tensors, places, strict=True)
            ]
            findings.mismatch(f"{name} of {', '.join(shapes)}")

    def _note_work(self, name: str, args: Any, result: Tensor, is_there: bool) -> None:
        findings = self.gpu.findings
        inner = (
            math.prod(args[1].shape[1:])
            if name == "convolution"
            else args[1 if name[0] in "ab" and "add" in name else 0].shape[-1]
        )
        who = findings.who[-1] if findings.who else "other"
        device, dtype = "cuda" if is_there else "cpu", str(args[1].dtype).removeprefix("torch.")
        findings.work[findings.phase, who, device, dtype] += result.numel() * inner


# The machine ----------------------------------------------------------------------------------------------------------


def _machine(gpu: Gpu) -> Iterator[Any]:
    """The patches that make torch say that there is a GPU."""
    original = torch.autocast.__init__

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    run_backward = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with Functions(gpu):  # checkpointed blocks are computed again, and ask for devices too
            return run_backward(*args, **kwargs)

    def metadata(tensor: Tensor) -> dict[str, Any]:  # hooks are called by operations, which do not see labels
        return {"shape": tensor.shape, "dtype": tensor.dtype}

    def by_device(
        tensors: Any, with_indices: bool = False
    ) -> Any:  # clipping by norm asks C++, which does not see labels
        groups = torch._C._group_tensors_by_device_and_dtype(tensors, with_indices)
        return {(gpu.device_of(group[0][0][0]), key[1]): group for key, group in groups.items()}

    yield patch.object(torch.autocast, "__init__", autocast)
    yield patch.object(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", by_device)
    yield patch.dict(torch.utils.checkpoint._allowed_determinism_checks_to_fns, default=metadata)
    yield patch.object(torch.autograd, "_engine_run_backward", backward)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "get_device_name": "a pretended GPU",
        "get_device_capability": (9, 0),
        "mem_get_info": (80 * GIB, 80 * GIB),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "get_rng_state_all": [],
        **dict.fromkeys(("_lazy_init", "set_device", "empty_cache", "set_rng_state_all", "reset_peak_memory_stats")),
    }
    for name, answer in answers.items():
        yield patch.object(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    yield patch.object(torch.cuda, "synchronize", lambda *_: gpu.findings.sync("torch.cuda.synchronize"))


@contextmanager
def pretended() -> Iterator[Gpu]:
    """Within the block there is a GPU."""
    gpu = Gpu()
    with ExitStack() as stack:
        for one in _machine(gpu):
            stack.enter_context(one)
        stack.enter_context(Functions(gpu))
        stack.enter_context(Operations(gpu))
        yield gpu
