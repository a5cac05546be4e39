"""The options of a network: fields of a recipe's model and hardware, and of what takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from anyflow.system.option import option as _option

BaseWeights = Literal["full", "int8", "nf4"]
"""How a frozen base is kept under adapters."""

RELEASED_TARGETS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ffn.net.0.proj",
    "ffn.net.2",
    "time_embedder.linear_1",
    "time_embedder.linear_2",
    "delta_embedder.linear_1",
    "delta_embedder.linear_2",
)
"""The released list: self-attention, feed-forward and both timestep embedders (the delta embedder must learn)."""

Residual = Literal["auto", "float32", "compute"]

Attention = Literal["auto", "flash", "flash3", "flash4", "cudnn", "efficient", "math", "flex"]


@dataclass(frozen=True)
class LoraOptions:
    """Shape of an adapter. The learned change of a layer is ``alpha / rank * B @ A``."""

    rank: int = _option(256, "rank of the adapters", low=1)
    alpha: float = _option(256.0, "scale of the adapters (alpha / rank multiplies them)", above=0)
    targets: list[str] = _option(list(RELEASED_TARGETS), "names (endings) of the layers that carry an adapter")
    dropout: float = _option(
        0.0, "must be 0: dropout would corrupt the finite difference of the flow-map target", low=0
    )


@dataclass(frozen=True)
class ParallelOptions:
    """How a network computes on its devices."""

    compile: bool = _option(False, "compile the network's blocks: faster steps after a slow start")
    residual: Residual = _option(
        "auto",
        "precision of what runs from block to block in bf16; auto: float32 in passes without gradient, where it takes "
        "no memory and halves the error of the flow map's finite difference; float32: in all; compute: in none",
        choices=get_args(Residual),
    )
    context: int = _option(
        1,
        "ranks of a node that share the tokens of each clip: long clips in less memory; they count as one rank for "
        "data.global_batch",
        choices=(1, 2, 4, 8),
    )
    offload: bool = _option(False, "fsdp: keep weights and optimiser in host memory: the least GPU memory, slow")
