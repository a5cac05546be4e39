"""A network over many devices, in one order: activation checkpointing, compile, FSDP2, weights. Nobody else shards.

FSDP2 (``fully_shard``) cuts every weight along its first dimension and gathers a block while it computes. Here a block
is one unit, and so are the embedders of times and text:

- the kept ("master") weights have whatever precision they were loaded in: float32 where they are trained, bfloat16 for
  a frozen base under float32 adapters;
- blocks and large layers compute in ``ParallelSettings.compute``; gradients are summed over ranks in float32;
- what makes times and modulation computes in float32 whatever else does, or t + 5 and t - 5 would be one time.

A network that is built on ``meta`` gets its weights last: every rank reads its own part from the files, so that no
process ever holds a whole network.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from anyflow.backbone.attention import KeptAttention
from anyflow.backbone.compiled import compile_blocks
from anyflow.backbone.controls import MODULE as CONTROLS
from anyflow.backbone.load import StoredWeights
from anyflow.backbone.options import ParallelOptions
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.errors import UserError
from anyflow.system.data_ranks import data_rank

WAIT = timedelta(minutes=30)
"""How long a rank waits for the others in one collective before it gives up."""

_FLOAT32_UNITS = ("time_embedder", "delta_embedder", "time_proj", CONTROLS)


@dataclass(frozen=True)
class ParallelSettings(ParallelOptions):
    """How a network is spread.

    Attributes:
        compute: precision of the large layers' arithmetic; None: that of the weights.
        nodes: with more than one, weights are spread within a node and repeated over nodes (HSDP): less traffic between
            nodes, more memory.
    """

    compute: torch.dtype | None = None
    nodes: int = 1


def parallelize(
    backbone: FlowMapBackbone, settings: ParallelSettings, device: torch.device, mesh: DeviceMesh | None = None
) -> None:
    """Spread a network over all ranks, in place; adapters are on it already, activations already checkpointed.

    The ranks must have met (:func:`join_ranks`); ``mesh`` is the order they stand in, made here if it is not given.
    """
    transformer = backbone.transformer
    backbone.residual, backbone.sharded_compute = settings.residual, settings.compute
    if settings.compile:
        compile_blocks(backbone)
    mesh = mesh or device_mesh(device.type, settings.nodes)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, reshard_after_forward=True, offload_policy=offload)
    for name in _FLOAT32_UNITS:
        unit = getattr(transformer.condition_embedder, name, None)
        if unit is not None:
            shard(unit, mp_policy=_policy(torch.float32))
    shard(transformer.condition_embedder.text_embedder, mp_policy=_policy(settings.compute, cast_inputs=True))
    for block in transformer.blocks:
        shard(block, mp_policy=_policy(settings.compute))
    # gathered anew for every pass: weights may be exchanged for their average between two of them
    shard(backbone, mp_policy=_policy(torch.float32))
    load_parts(backbone, torch.device("cpu") if settings.offload else device)


def checkpoint_activations(backbone: FlowMapBackbone, keep_attention: bool = False) -> None:
    """Recompute each block in the backward pass; with ``keep_attention`` all of it but the attention's results.

    Attention costs most of a long clip's recomputation and its results are small: keeping them is fast, at one
    activation of a block's width a layer and attention.
    """
    run: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    if keep_attention:
        run = partial(run, context_fn=_kept_attention)
    backbone.transformer.enable_gradient_checkpointing(run)


def _policy(compute: torch.dtype | None, cast_inputs: bool = False) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=cast_inputs)


_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _kept_attention() -> tuple[KeptAttention, KeptAttention]:
    """Contexts of a block's two passes: its attention to the video, then (unless that is compiled) to the text."""
    first, second = zip(*(create_selective_checkpoint_contexts(_keep_attention) for _ in range(2)), strict=True)
    return KeptAttention(first), KeptAttention(second)


def _keep_attention(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


# Weights: in from the files, out to one rank --------------------------------------------------------------------------


@torch.no_grad()
def load_parts(backbone: FlowMapBackbone, device: torch.device) -> None:
    """Fill what is still on ``meta``: each rank reads its own part of every stored weight."""
    stored = backbone.stored
    transformer = backbone.transformer
    parts: dict[str, Tensor] = {}
    for name, weight in transformer.named_parameters():
        if weight.is_meta:
            assert stored is not None, f"{name} has no weights to load"
            parts[name] = _part(stored, name, weight, device)
    if parts:
        transformer.load_state_dict(parts, strict=False, assign=True)
    backbone.stored = None


def _part(stored: StoredWeights, name: str, weight: Tensor, device: torch.device) -> Tensor:
    if not isinstance(weight, DTensor):
        return stored.read(name).to(device)
    return _spread(stored.read(name, _window(weight)).to(device), weight)


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known to every rank, spread as ``like`` is; ``tensor`` itself if that is not sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return _spread(tensor[_window(like)].to(like.device, copy=True), like)


def _window(spread: DTensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole: FSDP2 deals out rows, rounded up, along one dimension of the mesh."""
    along = next(place for place, kind in enumerate(spread.placements) if kind.is_shard(0))
    rows, mesh = spread.shape[0], spread.device_mesh
    each = -(-rows // mesh.size(along))
    first = min(each * mesh.get_local_rank(along), rows)
    return (slice(first, min(first + each, rows)), *(slice(0, size) for size in spread.shape[1:]))


def _spread(part: Tensor, like: DTensor) -> DTensor:
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def gather_state(module: nn.Module, dtype: torch.dtype | None = None) -> Mapping[str, Tensor] | None:
    """A sharded module's whole state dict in host memory on rank 0, for an export; empty on the other ranks.

    Args:
        module: sharded, or not.
        dtype: precision that frozen weights and large matrices are kept in; adapters stay as they are.

    Returns:
        None if the module is not sharded at all: it can be exported as it is.
    """
    if not is_sharded_module(module):
        return None
    gathered = {}
    for name, part in module.state_dict().items():
        tensor = whole(part)
        if rank_and_size()[0] == 0:
            kept = tensor.dtype if ".lora_" in name or not tensor.is_floating_point() else dtype or tensor.dtype
            gathered[name] = tensor.to("cpu", kept)
    return gathered


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together from all ranks if it is sharded (a collective then)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Ranks ----------------------------------------------------------------------------------------------------------------


def accelerator_here(accelerator: str) -> str:
    """``gpu`` or ``cpu``: what ``auto`` is on this machine; anything else is what it says."""
    return ("gpu" if torch.cuda.is_available() else "cpu") if accelerator == "auto" else accelerator


def check_devices(accelerator: str, devices: int) -> None:
    """That this machine has the GPUs that a run asks of it.

    Raises:
        UserError: it has fewer.
    """
    here = torch.cuda.device_count()
    if accelerator_here(accelerator) == "gpu" and here < devices:
        give = f"hardware.devices={here}" if here else "hardware.accelerator=cpu (HARDWARE=cpu)"
        found = f"{here} GPU{'s' * (here > 1)}" if here else "no GPU"
        raise UserError(
            f"hardware.accelerator={accelerator} with hardware.devices={devices}: torch finds {found} on this machine: "
            f"set {give}"
        )


def join_ranks(accelerator: str) -> torch.device:
    """Meet the other ranks if this process is one of several (torchrun's variables say so); returns its device.

    Raises:
        ValueError: the machine has fewer GPUs than local ranks.
    """
    on_gpu = accelerator_here(accelerator) == "gpu"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and local >= torch.cuda.device_count():
        raise ValueError(f"local rank {local} finds {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=WAIT)
    return device


def gloo_group() -> Any:
    """All ranks in a second group, for collectives beside those of training; every rank must ask for it."""
    return dist.new_group(backend="gloo", timeout=WAIT)


def leave_ranks() -> None:
    """Part from the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def largest_on_ranks(number: int) -> int:
    """The largest of all ranks' numbers, on every rank (a collective)."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def own_rows(count: int, context: int = 1) -> list[int]:
    """Rows of a batch that are this rank's to do: dealt out in turn, equally many everywhere (the last is repeated).

    ``context`` ranks each do the same.
    """
    rank, size = data_rank(*rank_and_size(), context)
    return [min(row, count - 1) for row in range(rank, -(-count // size) * size, size)]


def join_rows(own: Tensor, count: int, context: int = 1) -> Tensor:
    """The whole batch, on every rank, of what each made of its :func:`own_rows` (a collective)."""
    size = rank_and_size()[1]
    if size == 1:
        return own
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, own.contiguous())
    return torch.stack(parts[::context], dim=1).flatten(0, 1)[:count]


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def rank_zero_first(work: Callable[[], Any], name: str) -> Any:
    """Do long work on rank 0 while the others wait, then (now quick) on the others; no time-out."""
    rank, size = rank_and_size()
    if size == 1:
        return work()
    store: Any = dist.distributed_c10d._get_default_store()
    if rank == 0:
        result = work()
        store.set(f"done/{name}", "1")
        return result
    while not store.check([f"done/{name}"]):
        time.sleep(0.5)
    return work()


def device_mesh(kind: str, nodes: int = 1) -> DeviceMesh:
    """All ranks in a row, or nodes x ranks of a node: weights repeated over the first, spread over the second."""
    size = rank_and_size()[1]
    if nodes > 1:
        return init_device_mesh(kind, (nodes, size // nodes), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))


def is_sharded_module(module: nn.Module) -> bool:
    """Whether weights of a module are spread over ranks."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())
