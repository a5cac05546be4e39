"""Modules that are trained in full beside low-rank adapters: the original stays frozen, every adapter has its own copy.

AnyFlow's released causal runs train ``far_patch_embedding`` so, the patch embedding of compressed frames. It starts as
the usual kernel stretched to four times as many latents and not scaled down (Wan has no such layer to start from), so
its tokens are four times as large as those that the blocks know wherever neighbouring latents are alike. Adapters on
other layers cannot mend that; the layer itself, a kernel of 256 numbers a channel, is small enough to be trained whole.

Copies are named like adapters' weights (``far_patch_embedding.lora_full.default.weight``): whoever tells adapters from
a frozen base by ``.lora_`` in a name (precision, checkpoints, roles) knows them too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anyflow.errors import UserError

FULL_FILE = "full_weights.safetensors"
"""Beside an exported adapter: diffusers takes nothing into the adapter's own file whose name lacks ``lora``."""

RELEASED_FULL: dict[str, tuple[str, ...]] = {"bidirectional": (), "causal": ("far_patch_embedding",)}
"""What the released runs train in full, by architecture."""

_COPY = re.compile(r"\.lora_full\.[^.]+\.")


class FullModule(nn.Module):
    """A frozen module and its trained copies, one an adapter; it answers as the copy of the speaking adapter does.

    It is switched as PEFT's layers are, by ``_active_adapter`` and ``_disable_adapters``. Where the speaking adapter
    has no copy, the original answers.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.base_layer = original.requires_grad_(False)
        self.lora_full = nn.ModuleDict()
        self._active_adapter: list[str] = []
        self._disable_adapters = False

    def add_copy(self, adapter: str) -> None:
        """A float32 copy of the original, to be trained under that adapter."""
        if adapter not in self.lora_full:
            self.lora_full[adapter] = copy.deepcopy(self.base_layer).float().requires_grad_(True)
        self._active_adapter = [adapter]

    @property
    def speaking(self) -> nn.Module:
        """Who answers now."""
        if self._disable_adapters:
            return self.base_layer
        names = [name for name in self._active_adapter if name in self.lora_full]
        return self.lora_full[names[0]] if names else self.base_layer

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the original; a float32 copy takes and gives a bfloat16 network's activations as they are."""
        module, first = self.speaking, inputs[0]
        kept = next(module.parameters()).dtype
        if first.dtype.itemsize >= kept.itemsize or torch.is_autocast_enabled(first.device.type):
            return module(*inputs, **named)
        return module(first.to(kept), *inputs[1:], **named).to(first.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)  # weight.dtype and the like: the network's own


def add_full(transformer: nn.Module, endings: Iterable[str], adapter: str) -> None:
    """Give an adapter its own trained copy of the modules with these endings of names; nothing changes yet.

    Raises:
        UserError: there is no such module, it has no weights, or an adapter sits in it.
    """
    for ending in endings:
        names = [name for name in _own_modules(transformer) if f".{name}".endswith(f".{ending}")]
        for name in names or [""]:
            _check(transformer, ending, name)
            module = transformer.get_submodule(name)
            if not isinstance(module, FullModule):
                owner, _, last = name.rpartition(".")
                module = FullModule(module)
                setattr(transformer.get_submodule(owner), last, module)
            module.add_copy(adapter)


def full_names(transformer: nn.Module, adapter: str) -> tuple[str, ...]:
    """The modules that are trained in full under an adapter."""
    named = transformer.named_modules()
    return tuple(name for name, module in named if isinstance(module, FullModule) and adapter in module.lora_full)


def full_state(state: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """Of a transformer's state, an adapter's copies by the names of a plain network's weights."""
    return {stored_name(name): tensor.detach() for name, tensor in state.items() if f".lora_full.{adapter}." in name}


def copy_name(name: str, adapter: str) -> str:
    """The name of an adapter's copy of a wrapped module's weight (``X.base_layer.weight``)."""
    return name.replace(".base_layer.", f".lora_full.{adapter}.")


def original_name(name: str) -> str:
    """The name of the original of a copy's weight."""
    return _COPY.sub(".base_layer.", name)


def stored_name(name: str) -> str:
    """The name that a weight of an adapted network's base, or of a module trained in full, has in a plain network."""
    return _COPY.sub(".", name).replace(".base_layer.", ".")


def _own_modules(transformer: nn.Module) -> list[str]:
    """The network's modules as they are named without adapters."""
    names = (name for name, _ in transformer.named_modules())
    return [name for name in names if name and ".base_layer" not in name and ".lora_" not in name]


def _check(transformer: nn.Module, ending: str, name: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    module = transformer.get_submodule(name) if name else None
    weighted = module is not None and any(True for _ in module.parameters())
    if not weighted or isinstance(module, nn.ModuleList | nn.ModuleDict):
        alone = [other for other in _own_modules(transformer) if "." not in other and other != "blocks"]
        candidates = sorted(
            other for other in alone if any(True for _ in transformer.get_submodule(other).parameters())
        )
        raise UserError(
            f"lora.full has {ending}, which is no module with weights of this network: choose from "
            f"{', '.join(candidates)}, or a module of a block (attn1.norm_q)."
        )
    if module is not None and any(isinstance(part, BaseTunerLayer) for part in module.modules()):
        raise UserError(
            f"lora.full has {ending}, and lora.targets has adapters in {name}: take it out of one of the two lists."
        )
