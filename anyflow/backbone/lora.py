"""Low-rank adapters through PEFT, as AnyFlow's released runs train them.

The adapted layers include both time embedders: an adapter on ``delta_embedder`` is what lets the network learn the
second time, so it is trained and saved with the rest. An exported adapter loads with ``pipeline.load_lora_weights``.
Modules that are trained in full beside it (:mod:`anyflow.backbone.full`) come and go with it, in a file of their own.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from anyflow.backbone.controls import add_controls, check_controls, controls_of
from anyflow.backbone.full import FULL_FILE, add_full, copy_name, full_names, full_state, stored_name
from anyflow.backbone.lora_files import find_lora, matching, read_lora
from anyflow.backbone.options import LoraOptions
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.quantized import with_originals
from anyflow.errors import UserError

ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings(LoraOptions):
    """An adapter's shape, checked.

    Attributes:
        full: endings of the names of modules that are trained in full beside the adapter.
    """

    full: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dropout != 0:
            raise UserError(f"lora.dropout is {self.dropout}, but must be 0: it would corrupt the finite difference.")
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(f"lora.rank {self.rank} and lora.alpha {self.alpha} must be positive.")


def add_lora(backbone: FlowMapBackbone, settings: LoraSettings, seed: int = 0, adapter: str = ADAPTER) -> int:
    """Freeze the network and add a trainable float32 adapter, which changes nothing yet.

    Returns:
        The number of trainable parameters.

    Raises:
        UserError: a target names no linear layer of the network, or a module to be trained in full is none of it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    transformer = backbone.transformer
    for target in settings.targets:
        found = [transformer.get_submodule(name) for name in matching(transformer, [target])]
        if not found or not all(isinstance(module, torch.nn.Linear | BaseTunerLayer) for module in found):
            raise UserError(
                f"lora.targets has {target}, which is no linear layer: choose from {_endings(transformer)}."
            )
    for name, parameter in transformer.named_parameters():
        if ".lora_" not in name:
            parameter.requires_grad_(False)
    _attach(transformer, settings, adapter)
    _start_adapter(transformer, adapter, seed)
    add_full(transformer, settings.full, adapter)
    return sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)


def _attach(transformer: Any, settings: LoraSettings, adapter: str) -> None:
    """Put PEFT's layers of that shape on the network; what they hold is still to be set."""
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets), lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Already found a `peft_config`"
        )  # several adapters are what roles are made of
        transformer.add_adapter(config, adapter)


def _start_adapter(transformer: torch.nn.Module, adapter: str, seed: int) -> None:
    """PEFT's usual start, drawn here: its own draw is lost where the network is still on ``meta``."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in transformer.named_modules():
        if not name.endswith((f".lora_A.{adapter}", f".lora_B.{adapter}")):
            continue
        start = torch.zeros(module.weight.shape)
        if ".lora_A." in name and not start.is_meta:
            torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        module.weight = torch.nn.Parameter(start if module.weight.is_meta else start.to(module.weight.device))


def has_lora(backbone: FlowMapBackbone) -> bool:
    """Whether the network carries an adapter."""
    return bool(getattr(backbone.transformer, "peft_config", None))


def lora_settings(backbone: FlowMapBackbone, adapter: str = ADAPTER) -> LoraSettings:
    """The shape of an adapter that the network carries."""
    config = backbone.transformer.peft_config[adapter]
    full = full_names(backbone.transformer, adapter)
    return LoraSettings(config.r, config.lora_alpha, sorted(config.target_modules), full=full)


def lora_state(
    backbone: FlowMapBackbone, adapter: str = ADAPTER, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter's weights by their portable names (``blocks.0.attn1.to_q.lora_A.weight``).

    Args:
        backbone: a network with that adapter.
        adapter: its name.
        weights: the transformer's state to read them from (gathered from all ranks, or averaged), instead of its own.
    """
    state = backbone.transformer.state_dict() if weights is None else weights
    marker = f".{adapter}.weight"
    return {
        name.removesuffix(marker) + ".weight": tensor.detach()
        for name, tensor in state.items()
        if (".lora_A." in name or ".lora_B." in name) and name.endswith(marker)
    }


def lora_full_state(
    backbone: FlowMapBackbone, adapter: str = ADAPTER, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What was trained in full beside the adapter, by a plain network's names; arguments as of :func:`lora_state`."""
    return full_state(backbone.transformer.state_dict() if weights is None else weights, adapter)


def lora_metadata(backbone: FlowMapBackbone, adapter: str = ADAPTER) -> dict[str, Any]:
    """The adapter's configuration in the form that diffusers stores beside the weights."""
    config = backbone.transformer.peft_config[adapter].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def load_lora(backbone: FlowMapBackbone, path: str | Path, adapter: str = ADAPTER) -> None:
    """Put an adapter of ours, or of another trainer, on a network, ready to sample or to train on.

    Args:
        backbone: the network that the adapter was trained on.
        path: the safetensors file, the folder that holds it, or one of our runs.
        adapter: the name to give it.

    Raises:
        UserError: no such file, or it belongs to another network, or what was trained beside it is missing.
    """
    transformer = backbone.transformer
    found = read_lora(find_lora(path), transformer)
    known = controls_of(transformer)
    if found.controls is not None and (known is None or check_controls(found.controls, known, found.path)):
        if backbone.stored is not None:
            raise UserError(
                f"{found.path} was trained with controls, which {', '.join(found.controls.controls)} name: give "
                "model.control.names the same"
            )
        add_controls(transformer, found.controls).initialise()
    if found.told and int(os.environ.get("RANK", "0")) == 0:
        print(found.told, file=sys.stderr)
    _attach(transformer, LoraSettings(found.rank, found.alpha, found.targets), adapter)
    weights: dict[str, Tensor] = {}
    for name, (down, up) in found.layers.items():
        weights |= {f"{name}.lora_A.{adapter}.weight": down, f"{name}.lora_B.{adapter}.weight": up}
    _place(transformer, weights)
    if found.full:
        _load_full(transformer, found.path.with_name(FULL_FILE), found.full, adapter)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _load_full(transformer: Any, file: Path, modules: list[str], adapter: str) -> None:
    """What was trained in full beside an adapter, from the file beside the adapter's."""
    told = ", ".join(modules)
    if not file.is_file():
        raise UserError(f"{file} is missing: {told} was trained in full beside this LoRA: keep the two files together.")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({str(error).strip()}): copy it again.") from error
    try:
        add_full(transformer, modules, adapter)
    except UserError as error:
        raise UserError(f"{file} does not fit this network: it has {told}.") from error
    own = transformer.state_dict()
    names = {name: f".lora_full.{adapter}." for name in own if f".lora_full.{adapter}." in name}
    weights = {name: stored.pop(name.replace(part, "."), None) for name, part in names.items()}
    wrong = [stored_name(name) for name, weight in weights.items() if weight is None or weight.shape != own[name].shape]
    if wrong or stored:
        raise UserError(f"{file} does not fit this network: {min([*wrong, *stored])} differs.")
    _place(transformer, {name: weight for name, weight in weights.items() if weight is not None})


def _place(transformer: Any, weights: Mapping[str, Tensor]) -> None:
    """Weights of an adapter as they are stored, in float32, into a network that may lie on ``meta`` otherwise.

    PEFT moves what it loads to the place and precision of the layer beneath: on ``meta`` it vanishes, and a bfloat16
    base would round it.
    """
    device = next((weight.device for weight in transformer.parameters() if not weight.is_meta), torch.device("cpu"))
    placed = {name: weight.to(device, torch.float32) for name, weight in weights.items()}
    transformer.load_state_dict(placed, strict=False, assign=True)


def merged_state(
    transformer: Any, adapter: str = ADAPTER, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A plain diffusers state dict with the adapter added into the layers (in float32); the network is left alone.

    Modules that were trained in full beside the adapter are taken as trained. Of a quantised base (:mod:`.quantized`)
    the weights are read from its files.

    Args:
        transformer: with or without an adapter.
        adapter: which one to merge.
        weights: the transformer's state to take instead of its own (gathered from all ranks, or averaged).
    """
    state = transformer.state_dict() if weights is None else weights
    merged = {}
    for name, tensor in with_originals(transformer, state):
        if ".lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        down, up = (state.get(f"{layer}.lora_{part}.{adapter}.weight") for part in "AB")
        tensor = tensor.detach()
        if down is not None and up is not None:
            change = _scale(transformer.peft_config[adapter]) * (up.detach().float() @ down.detach().float())
            tensor = (tensor.float() + change.to(tensor.device)).to(tensor.dtype)
        full = state.get(copy_name(name, adapter)) if ".base_layer." in name else None
        if full is not None:
            tensor = full.detach().to(tensor)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def _scale(config: Any) -> float:
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def _endings(transformer: torch.nn.Module) -> str:
    """Names of the linear layers, without block numbers."""
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    return ", ".join(sorted({name.split(".", 2)[2] if name.startswith("blocks.") else name for name in names}))
