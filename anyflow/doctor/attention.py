"""Attention as the large networks ask for it: every backend of PyTorch's that runs here, timed; and what is taken.

``self``: all tokens of an 81 x 480 x 832 clip to all; ``text``: to a prompt padded to 512 tokens, with the bias that
stands for its padding, as the project asks for it. ``short`` is there for the math backend: no memory holds its scores
of a whole clip.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow.backbone.attention import (
    SelfAttentionProcessor,
    TextAttentionProcessor,
    padding_bias,
    with_spare_token,
)
from anyflow.backbone.conditions import Text
from anyflow.backbone.kernels import KERNELS, keep_fastest, only_kernel, prefer_kernel, usable_packages
from anyflow.doctor.findings import Findings
from anyflow.doctor.here import Here, is_out_of_memory
from anyflow.recipe.fields import all_fields

ON_A_CPU = ("flash", "math")
"""The others are GPUs' alone."""

BACKWARD = 2.5
"""Products of the backward pass for each of the forward's, the scores worked out anew included."""

SLOWER = 1.2
"""How many times as long as the fastest the project's way may take before it is reported."""


@dataclass(frozen=True)
class Shape:
    """Attention of one clip: ``heads`` of ``width`` channels, ``tokens`` that ask, ``prompt`` tokens of text that are
    asked (None: the tokens themselves), in a precision.

    ``has_math`` says whether the scores fit into memory as a whole.
    """

    name: str
    heads: int
    width: int
    tokens: int
    prompt: int | None = None
    has_math: bool = False


GPU_SHAPES = (
    Shape("1.3b.self", 12, 128, 32760),
    Shape("1.3b.text", 12, 128, 32760, prompt=100),
    Shape("1.3b.short", 12, 128, 2048, has_math=True),
    Shape("14b.self", 40, 128, 32760),
    Shape("14b.text", 40, 128, 32760, prompt=100),
)
CPU_SHAPES = (
    Shape("tiny.self", 6, 32, 120, has_math=True),
    Shape("tiny.text", 6, 32, 120, prompt=24, has_math=True),
    Shape("1.3b.short", 12, 128, 512, has_math=True),
)


def examine(found: Findings, here: Here, folder: Any) -> None:
    """Time every backend at every shape."""
    if not here.is_gpu:
        found.leave_out("whole clips", "32,760 tokens take a CPU hours: short shapes stand for them")
    prefer_kernel("auto")
    seconds: dict[str, list[float]] = {}
    for shape in GPU_SHAPES if here.is_gpu else CPU_SHAPES:
        times = _shape(found, here, shape)
        here.tidy()
        if shape.prompt is None and not shape.has_math:
            for name, both in times.items():
                seconds.setdefault(name, []).append(both)
    whole = {name: sum(each) for name, each in seconds.items() if len(each) == max(map(len, seconds.values()))}
    if here.is_gpu and whole:
        fastest = min(whole, key=lambda name: whole[name])
        file = keep_fastest(fastest)
        found.note({"kept": fastest})
        found.advise(f"hardware.attention=auto takes {fastest} on this kind of GPU from now on (kept in {file})")


def _shape(found: Findings, here: Here, shape: Shape) -> dict[str, float]:
    """Time every kernel at a shape; returns the seconds of each, backward pass included."""
    query, key, value, bias, text = inputs(shape, here)
    products = 4.0 * shape.tokens * key.shape[2] * shape.heads * shape.width / 1e12
    times: dict[str, float] = {}
    reference: Tensor | None = None
    for name in (*KERNELS, *usable_packages()):
        if (name == "math" and not shape.has_math) or not (here.is_gpu or name in ON_A_CPU):
            continue
        try:
            with only_kernel(name), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend cannot: that it cannot is what counts
                answer, forward, both = _timed(here, query, key, value, bias)
        except (RuntimeError, MemoryError) as error:
            here.tidy()
            why = "memory ran out" if is_out_of_memory(error) else "does not run here"
            found.leave_out(f"{shape.name}.{name}", why)
            continue
        times[name] = both
        found.note(rates(products, forward, both), f"{shape.name}.{name}")
        if reference is None:
            reference = answer
        elif (difference := float((answer - reference).abs().max())) > 0.05:
            found.is_wrong(f"{shape.name}: {name} is off by {difference:.2g}: update torch and the driver")
    _chosen(found, here, shape, times, (query, key, value, bias, text))
    return times


def inputs(shape: Shape, here: Here) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Text | None]:
    """Queries, keys and values ``[1, heads, tokens, width]``, the bias of a prompt's padding, and the prompt."""
    size = (1, shape.heads, shape.tokens, shape.width)
    made: dict[str, Any] = {"dtype": here.dtype, "device": here.device, "requires_grad": True}
    if shape.prompt is None:
        query, key, value = (torch.randn(size, **made) for _ in range(3))
        return query, key, value, None, None
    embeddings = torch.randn(1, 512, shape.heads * shape.width, dtype=here.dtype, device=here.device)
    lengths = torch.tensor([shape.prompt], device=here.device)
    text = with_spare_token(Text(embeddings, lengths, 512))
    keys = (1, shape.heads, text.embeddings.shape[1], shape.width)
    query, key, value = torch.randn(size, **made), torch.randn(keys, **made), torch.randn(keys, **made)
    return query, key, value, padding_bias(text, here.dtype), text


def rates(products: float, forward: float, both: float) -> dict[str, float]:
    """Milliseconds, and TFLOP/s by the products of the forward pass (10^12)."""
    return {
        "forward_ms": 1000 * forward,
        "both_ms": 1000 * both,
        "forward_tflops": products / forward,
        "both_tflops": (1 + BACKWARD) * products / both,
    }


def _timed(here: Here, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, float, float]:
    def attend() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    with torch.no_grad():
        answer = attend().float()
        forward = here.seconds(attend)
    return answer, forward, here.seconds(lambda: _backward(attend))


def _backward(attend: Callable[[], Tensor]) -> None:
    answer = attend()
    answer.backward(answer.detach())


def _chosen(found: Findings, here: Here, shape: Shape, times: dict[str, float], given: tuple[Any, ...]) -> None:
    """What is fastest, what PyTorch takes by itself, and what the project's own attention comes to."""
    query, key, value, bias, text = given
    if not times:
        found.is_wrong(f"{shape.name}: no attention runs here: update torch and the driver")
        return
    fastest = min(times, key=lambda name: times[name])
    default = SDPBackend(torch._fused_sdp_choice(query, key, value, attn_mask=bias))
    names = {backend: name for name, backend in KERNELS.items()}
    hidden = query.detach().transpose(1, 2).flatten(2).requires_grad_()
    attend = _project_attention(shape.heads, hidden, text)
    with Operators() as seen:
        attend()
    mine = seen.backend
    taken = here.seconds(lambda: _backward(attend))
    found.note({"fastest": fastest, "torch": names.get(default, default.name.lower())}, shape.name)
    found.note({"project": mine, "project_both_ms": 1000 * taken}, shape.name)
    if here.is_gpu and mine == "math" and not shape.has_math:
        found.is_wrong(f"{shape.name}: the project's attention falls back to math here: update torch and the driver")
    elif here.is_gpu and times.get(mine, 0.0) > SLOWER * times[fastest]:
        much = f"{times[mine] / times[fastest]:.1f} times as fast as {mine}, which the project runs"
        how = f": try hardware.attention={fastest}" if "hardware.attention" in all_fields() else ""
        found.advise(f"{shape.name}: {fastest} is {much}{how}")


def _project_attention(heads: int, hidden: Tensor, text: Text | None) -> Callable[[], Tensor]:
    """The project's own processors on tokens ``[1, L, heads * width]``, with projections that change nothing."""
    same = torch.nn.Identity()
    layer: Any = SimpleNamespace(heads=heads, norm_q=same, norm_k=same, to_q=same, to_k=same, to_v=same)
    layer.to_out = [same, same]
    if text is None:
        return lambda: SelfAttentionProcessor()(layer, hidden)
    return lambda: TextAttentionProcessor()(layer, hidden, text)


class Operators(TorchDispatchMode):
    """Takes down which attention operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    @property
    def backend(self) -> str:
        """By the last one: math has no operator of its own."""
        known = (name for name in KERNELS if self.seen and f"{name}_attention" in self.seen[-1])
        return next(known, "math")

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if "scaled_dot_product" in str(function):
            self.seen.append(str(function))
        return function(*arguments, **(options or {}))
