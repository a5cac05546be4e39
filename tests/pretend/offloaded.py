"""Weights in host memory on the pretended GPU, as FSDP2 with its offload policy has them, without ranks.

At rest a weight lies on the host. While the network is asked, a copy of it is on the device, and its gradient comes
back. What goes into the network is moved to the device, as FSDP2 does at its root. Blocks are not computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from gpu import CUDA
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from anyflow.backbone import parallelize
from anyflow.training import assemble, launch
from anyflow.training.callbacks.sharded import AnyCheckpoint


class _InHostMemory(SingleDeviceStrategy):
    """One device whose module stays where it is."""

    def __init__(self) -> None:
        super().__init__(CUDA)

    def model_to_device(self) -> None:
        """Nothing."""

    def teardown(self) -> None:
        """Nothing, as the strategy of sharded weights."""


def _lend_weights(network: nn.Module) -> None:
    at_rest = [(module, dict(module.named_parameters(recurse=False))) for module in network.modules()]

    def lend(*_: Any) -> None:
        for module, weights in at_rest:
            module._parameters.update({name: weight.to(CUDA) for name, weight in weights.items()})  # type: ignore[misc]

    def take_back(*_: Any) -> None:
        for module, weights in at_rest:
            module._parameters.update(weights)

    network.register_forward_pre_hook(lend)
    network.register_forward_hook(take_back, always_call=True)


def _move_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(lambda one: one.to(CUDA) if isinstance(one, Tensor) else one, (args, kwargs))


@contextmanager
def offloaded() -> Iterator[list[str]]:
    """Within the block networks are spread like this; yields a list of where each one's weights lie when a run ends."""
    networks: list[nn.Module] = []
    places: list[str] = []
    is_sharded_module = parallelize.is_sharded_module

    def spread(backbone: Any, settings: Any, device: torch.device, mesh: Any = None) -> None:
        assert settings.offload
        parallelize.load_parts(backbone, torch.device("cpu"))
        backbone.register_forward_pre_hook(_move_inputs, with_kwargs=True)
        for module in backbone.modules():  # fully_shard moves buffers to the device whatever its offload policy
            module._buffers.update({name: one.to(CUDA) for name, one in module._buffers.items() if one is not None})
        _lend_weights(backbone)
        networks.append(backbone)

    def is_spread(module: nn.Module) -> bool:
        return any(network is part for network in networks for part in module.modules())

    def leave() -> None:
        places.extend("+".join(sorted({weight.device.type for weight in one.parameters()})) for one in networks)

    def strategy(recipe: Any, manual: bool, writer: Any) -> dict[str, Any]:
        return {"strategy": _InHostMemory(), "precision": "32-true", "plugins": [AnyCheckpoint(writer)]}

    with ExitStack() as stack:
        stack.enter_context(patch.object(assemble, "is_sharded", lambda recipe: True))
        stack.enter_context(patch.object(assemble, "parallelize", spread))
        stack.enter_context(patch.object(launch, "_strategy", strategy))
        stack.enter_context(patch.object(launch, "leave_ranks", leave))
        for module in [one for name, one in sys.modules.items() if name.startswith("anyflow.")]:
            if vars(module).get("is_sharded_module") is is_sharded_module:
                stack.enter_context(patch.object(module, "is_sharded_module", is_spread))
        yield places
