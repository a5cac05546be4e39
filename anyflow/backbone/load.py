"""Any checkpoint in: Wan, both published layouts of AnyFlow, and our own exports.

Weights are read from safetensors only, never from pickles, and every name and shape must match.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from torch import Tensor, nn

from anyflow.backbone.bidirectional import FLOAT32_PARTS, BidirectionalBackbone
from anyflow.backbone.causal import CausalBackbone
from anyflow.backbone.controls import CONFIG_KEY, ControlSettings, add_controls, check_controls, new_weights
from anyflow.backbone.files import CAUSAL_KIND, check_start, read_json, read_weights, resolve_folder, says_causal
from anyflow.backbone.full import stored_name
from anyflow.backbone.guidance import Guidance
from anyflow.backbone.layout import check_config
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.errors import UserError
from anyflow.flowmap.samplers import SAMPLERS, SamplerKind

ARCHITECTURES: dict[str, tuple[type[BidirectionalBackbone], type[nn.Module]]] = {
    "bidirectional": (BidirectionalBackbone, AnyFlowTransformer3DModel),
    "causal": (CausalBackbone, AnyFlowFARTransformer3DModel),
}
"""The networks that can be built, and what they wrap, by the name that a recipe gives."""

GATE = 0.25
"""Share of the second time in the embedding, ``emb = (1 - GATE) * time(t) + GATE * delta(r)``, as released."""

FAR_PATCH = (1, 4, 4)
"""The patch of compressed frames, as released."""

CHUNKING = ("chunk_partition", "full_chunk_limit", "compressed_patch_size")
"""What a causal network's configuration has and a bidirectional one's lacks."""


SAMPLER_KEY = "anyflow_sampler"
"""Where the scheduler's configuration says how the model is sampled; diffusers warns that it does not know that."""

GUIDANCE_KEYS = ("anyflow_guidance_scale", "anyflow_negative_prompt")
"""Where it says how samples are guided, of a network that has no guidance in its weights."""

_KINDS = (
    "WanTransformer3DModel",
    "AnyFlowTransformer3DModel",
    "FAR_Wan_Transformer3DModel",  # the old layout of the published AnyFlow folders
    CAUSAL_KIND,
)
_SCALES = re.compile(r"scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|absmax|quant_(map|state)")
"""What lies beside weights in 8 or 4 bits, by ComfyUI's, vLLM's and bitsandbytes' names."""

_TIME, _DELTA = "condition_embedder.time_embedder.", "condition_embedder.delta_embedder."


def load_backbone(
    path: str | Path,
    *,
    architecture: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    gradient_checkpointing: bool = False,
    leave_stored: bool = False,
    network: Mapping[str, Any] | None = None,
    controls: ControlSettings | None = None,
) -> BidirectionalBackbone:
    """Load a network, converting a plain Wan transformer or a bidirectional network on the way.

    Args:
        path: a pipeline folder, a transformer's folder, one of our runs, or a Hub name.
        architecture: one of :data:`ARCHITECTURES`; None: what the folder holds.
        dtype: precision of the bulk of the weights (the parts that make times stay float32).
        device: where to put it.
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
        leave_stored: build on ``meta`` and leave the weights in their files until
            :func:`anyflow.backbone.parallelize.parallelize` lets every rank read its part.
        network: how a network that becomes causal divides videos: :data:`CHUNKING`; one that is causal knows.
        controls: what it shall be told of each frame; one that has learnt this keeps the ranges that it learnt with.
            None: what it has learnt.

    Raises:
        UserError: the folder is missing or incomplete, holds another kind of network, or its weights do not fit.
    """
    if not leave_stored:
        transformer = load_transformer(path, dtype, architecture, network, controls)
        return wrap(transformer, gradient_checkpointing).to(device)
    found = read_transformer(path, None, architecture, network, controls)
    backbone = wrap(_assemble(*found, assign=False), gradient_checkpointing)
    backbone.stored = StoredWeights(found.weights, partial(weight_precision, dtype=dtype))
    return backbone


def wrap(transformer: nn.Module, gradient_checkpointing: bool = False) -> BidirectionalBackbone:
    """The backbone that goes with a diffusers module."""
    build = CausalBackbone if isinstance(transformer, AnyFlowFARTransformer3DModel) else BidirectionalBackbone
    return build(transformer, gradient_checkpointing)


class StoredWeights:
    """Checked weights that still lie in their files, by the transformer's names."""

    def __init__(self, weights: dict[str, Tensor], precision: Callable[[str], torch.dtype]) -> None:
        self._weights = weights
        self._precision = precision

    def read(self, name: str, window: tuple[slice, ...] = ()) -> Tensor:
        """A copy of a weight, or of a window of it, in its precision; by its name in a network with adapters, too."""
        tensor = self._weights[stored_name(name)]
        tensor = tensor[window] if window else tensor
        return tensor.to(self._precision(name) if tensor.is_floating_point() else tensor.dtype, copy=True)

    def read_in(self, dtype: torch.dtype) -> StoredWeights:
        """The same files, the bulk of them read in another precision."""
        return StoredWeights(self._weights, partial(weight_precision, dtype=dtype))

    def __deepcopy__(self, memo: Any) -> StoredWeights:
        return self  # files are shared: a copy of the network reads the same


def keep_in(backbone: FlowMapBackbone, dtype: torch.dtype) -> None:
    """Keep the bulk of a network's weights in a precision; of one in its files, once they are read."""
    backbone.to(dtype)
    if backbone.stored is not None:
        backbone.stored = backbone.stored.read_in(dtype)


def new_backbone(
    config: dict[str, Any], seed: int, architecture: str = "bidirectional", controls: ControlSettings | None = None
) -> BidirectionalBackbone:
    """An untrained network of the given transformer configuration, with Wan's initialisation."""
    backbone, kind = backbone_class(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer: Any = kind.from_config(dict(config))  # type: ignore[attr-defined]
        _initialise(transformer)
        if controls is not None:
            add_controls(transformer, controls).initialise(torch.Generator().manual_seed(seed))
    return backbone(transformer)


def backbone_class(architecture: str) -> tuple[type[BidirectionalBackbone], type[nn.Module]]:
    """The classes behind a recipe's architecture: ours, and the diffusers module that it wraps.

    Raises:
        UserError: there is none of that name.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture {architecture!r} is not known: choose {' or '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[architecture]


def load_transformer(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    architecture: str | None = None,
    network: Mapping[str, Any] | None = None,
    controls: ControlSettings | None = None,
) -> nn.Module:
    """diffusers' transformer of a checkpoint, on the CPU; see :func:`load_backbone`."""
    found = read_transformer(path, lambda name: weight_precision(name, dtype), architecture, network, controls)
    return _assemble(*found)


class Found(NamedTuple):
    """A checkpoint's transformer, read and not yet built."""

    kind: type[nn.Module]
    """The diffusers class to build."""
    config: dict[str, Any]
    weights: dict[str, Tensor]
    place: Path | str
    """Where it was found, for error sentences."""


def read_transformer(
    path: str | Path,
    precision: Callable[[str], torch.dtype] | None,
    architecture: str | None = None,
    network: Mapping[str, Any] | None = None,
    controls: ControlSettings | None = None,
) -> Found:
    """What a checkpoint's folder holds, converted; see :func:`load_backbone` and ``read_weights``."""
    check_start(path)
    folder = resolve_folder(path)
    place = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_json(place / "config.json")
    kind = config.get("_class_name")
    if kind not in _KINDS:
        raise UserError(f"{place / 'config.json'} names {kind}: only Wan and AnyFlow transformers can be loaded.")
    if kind == "WanTransformer3DModel":
        config = {**config, "gate_value": GATE, "deltatime_type": "r"}
    check_config(config, place)
    weights = read_weights(place, precision)
    _refuse_quantized(weights, place)
    # the old layout has one class for both networks, and the wrong one would load with a warning only
    is_causal = says_causal(config) or any(name.startswith("far_") for name in weights)
    wanted = architecture or ("causal" if is_causal else "bidirectional")
    _, target = backbone_class(wanted)
    if is_causal and wanted != "causal":
        raise UserError(f"{place} holds a causal (FAR) network: set model.architecture to causal.")
    if kind == "WanTransformer3DModel":
        weights = _with_delta_embedder(weights)
    if wanted == "causal" and not is_causal:
        config = {**config, **{name: value for name, value in (network or {}).items() if name in CHUNKING}}
        weights = _with_far_patch(weights, config.get("compressed_patch_size", FAR_PATCH))
    if controls is not None and check_controls(ControlSettings.of(config), controls, place):
        weights = {**weights, **new_weights(controls, config["num_attention_heads"] * config["attention_head_dim"])}
        config = {**config, CONFIG_KEY: controls.to_json()}
    return Found(target, config, weights, place)


def read_shift(path: str | Path) -> float:
    """The schedule's shift that a pipeline folder was made for; 5 (Wan at 480p) if it does not say."""
    place = resolve_folder(path) / "scheduler" / "scheduler_config.json"
    config = read_json(place) if place.exists() else {}
    return float(config.get("shift") or config.get("flow_shift") or 5.0)


def read_sampler(path: str | Path) -> SamplerKind:
    """How a model must be sampled: as its export says (see :data:`anyflow.flowmap.samplers.SAMPLERS`).

    A folder that does not say holds a flow map, or a plain Wan transformer, whose only velocity is the instantaneous
    one.

    Raises:
        UserError: the folder names a sampler that is not known.
    """
    folder = resolve_folder(path)
    place = folder / "scheduler" / "scheduler_config.json"
    named = read_json(place).get(SAMPLER_KEY) if place.exists() else None
    if named is None:
        return "euler" if is_wan(path) else "flowmap"
    if named not in SAMPLERS:
        raise UserError(f"{place} asks for the sampler {named!r}: known are {', '.join(SAMPLERS)}.")
    return named


def read_guidance(path: str | Path) -> Guidance | None:
    """How a network without guidance in its weights is guided, if its export says so.

    Raises:
        UserError: the folder names no number from 1 up, or no text.
    """
    place = resolve_folder(path) / "scheduler" / "scheduler_config.json"
    scale, negative = map((read_json(place) if place.exists() else {}).get, GUIDANCE_KEYS)
    if scale is None:
        return None
    if not isinstance(scale, int | float) or not scale >= 1 or not isinstance(negative, str | None):
        raise UserError(f"{place}: {GUIDANCE_KEYS[0]}={scale!r} with {GUIDANCE_KEYS[1]}={negative!r}: export it again.")
    return Guidance(float(scale), negative or "")


def read_controls(path: str | Path) -> ControlSettings | None:
    """What a model's network is told of each frame, if anything."""
    folder = resolve_folder(path)
    place = folder / "transformer" / "config.json"
    return ControlSettings.of(read_json(place)) if place.exists() else None


def is_wan(path: str | Path) -> bool:
    """Whether a folder holds a plain Wan transformer."""
    network = resolve_folder(path) / "transformer" / "config.json"
    return network.exists() and read_json(network).get("_class_name") == _KINDS[0]


def weight_precision(name: str, dtype: torch.dtype) -> torch.dtype:
    """The precision that a weight is kept in where the bulk has ``dtype``."""
    return torch.float32 if any(part in name for part in FLOAT32_PARTS) else dtype


def _with_delta_embedder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second time embedder starts as a copy of the first, so ``r = t`` gives Wan's embedding back."""
    copies = {name.replace(_TIME, _DELTA): weight.clone() for name, weight in weights.items() if name.startswith(_TIME)}
    return {**weights, **copies}


def _with_far_patch(weights: dict[str, Tensor], patch: Sequence[int]) -> dict[str, Tensor]:
    """Compressed frames start with the patch embedding's kernel, stretched over the larger patch, as released.

    It is not scaled: where neighbouring latents are alike its tokens are four times as large as the usual ones. That is
    left to training, which with adapters trains this layer in full (:mod:`anyflow.backbone.full`).
    """
    kernel = weights["patch_embedding.weight"]  # [dim, C, *patch]
    stretched = F.interpolate(kernel.float().flatten(0, 1)[:, None], size=tuple(patch), mode="trilinear")
    far = stretched.reshape(*kernel.shape[:2], *patch).to(kernel.dtype)
    bias = weights["patch_embedding.bias"].clone()
    return {**weights, "far_patch_embedding.weight": far, "far_patch_embedding.bias": bias}


def _refuse_quantized(weights: Mapping[str, Tensor], place: Path | str) -> None:
    """Refuse codes that mean nothing without their scales; plain float8 numbers are numbers like any other.

    Raises:
        UserError: there are some.
    """
    codes = (name for name, tensor in weights.items() if _SCALES.search(name) or not tensor.is_floating_point())
    if found := min(codes, default=None):
        raise UserError(
            f"{place} holds quantised weights ({found}): give the model as it was published, in bfloat16 or float32; "
            "model.lora.base=int8 or nf4 makes it as small while adapters are trained."
        )


def _assemble(
    kind: Any, config: dict[str, Any], weights: dict[str, Tensor], place: Path | str, assign: bool = True
) -> nn.Module:
    """Build without initialising (14 B random numbers take minutes), then put the weights in."""
    known = inspect.signature(kind.__init__).parameters
    told = ControlSettings.of(config)
    config = {name: value for name, value in config.items() if name in known}
    with torch.device("meta"):
        transformer = kind.from_config(config)
        if told is not None:
            add_controls(transformer, told)
    _check_weights(transformer, weights, place)
    if assign:
        transformer.load_state_dict(weights, strict=True, assign=True)
    embedder = transformer.condition_embedder  # its gate is a constant which no checkpoint carries
    embedder.register_buffer("delta_emb_gate", torch.tensor([config.get("gate_value", GATE)]), persistent=False)
    return transformer


def _check_weights(transformer: nn.Module, weights: dict[str, Tensor], place: Path | str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    for problem, names in (("lacks", expected.keys() - weights.keys()), ("also has", weights.keys() - expected.keys())):
        if names:
            raise UserError(
                f"{place} {problem} {_some(names)}, so its weights and its config.json do not belong together: "
                "download it again, or take the folder of a complete transformer."
            )
    wrong = {name for name, shape in expected.items() if tuple(weights[name].shape) != shape}
    if wrong:
        name = min(wrong)
        raise UserError(
            f"{place}: {name} has shape {tuple(weights[name].shape)} where config.json asks for {expected[name]} "
            f"({len(wrong)} such weights): weights and config.json do not belong together."
        )


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more weights"


def _initialise(transformer: Any) -> None:
    """Wan's start: Xavier, small embedders, and an output of zero. Both time embedders start equal."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(transformer.patch_embedding.weight.flatten(1))
    embedder = transformer.condition_embedder
    for part in (embedder.text_embedder, embedder.time_embedder):
        for linear in (part.linear_1, part.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
    embedder.delta_embedder.load_state_dict(embedder.time_embedder.state_dict())
    nn.init.zeros_(transformer.proj_out.weight)
    if isinstance(transformer, AnyFlowFARTransformer3DModel):
        start = _with_far_patch(transformer.state_dict(), transformer.config.compressed_patch_size)
        transformer.load_state_dict(start)
