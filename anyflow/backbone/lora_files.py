"""An adapter's file, whoever wrote it: the layers that it adapts, by what, and at which scale.

PEFT, diffusers, ComfyUI, kohya (musubi) and DiffSynth name the same layers differently: by diffusers' names or by Wan's
own, with dots or underscores, behind one of several prefixes. So each name is looked up among all names of the network
that the adapter is for. diffusers' converters serve less: they want every layer of Wan, and drop what they do not know.

A scale is ``alpha / rank``, layer by layer. An adapter here has one rank and one scale. Where a file has several, ranks
are filled up with zeros and scales go into the weights: what the network answers is the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anyflow.backbone.controls import CONFIG_KEY, ControlSettings
from anyflow.backbone.files import LORA_FILE, PEFT_FILE, read_json
from anyflow.backbone.full import FULL_FILE
from anyflow.errors import UserError, first_line

FULL_KEY = "anyflow_full"
"""In the header of an adapter's file: the modules that were trained in full beside it, so that none is lost unseen."""

_PEFT_CONFIG = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_EMBEDDERS = {"text_embedder": "text_embedding", "time_embedder": "time_embedding", "delta_embedder": "delta_embedding"}
_WAN_NAMES = {
    **{
        f"{attention}.to_{part}": f"{wan}.{part[0]}"
        for attention, wan in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for part in ("q", "k", "v", "out.0")
    },
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    **{
        f"condition_embedder.{ours}.linear_{n}": f"{wan}.{2 * n - 2}"
        for ours, wan in _EMBEDDERS.items()
        for n in (1, 2)
    },
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
"""diffusers' names of Wan's layers, without block numbers, and Wan's own. ``delta_embedding`` is AnyFlow's alone."""

_PREFIXES = (
    *("base_model.model.", "model.", "diffusion_model.", "transformer.", "unet.", "module.", "pipe.", "dit."),
    *("lora_unet_", "lora_transformer_", "lycoris_"),
)
_PART = re.compile(
    r"(?P<layer>.+?)[._]lora(?:_(?P<letter>[AB])|[._](?:linear_layer\.)?(?P<word>down|up))"
    r"(?:\.(?!weight$|bias$)[\w-]+)?(?:\.weight)?"
)
_WRITERS = (
    ("lora_unet_", "kohya's"),
    ("diffusion_model.", "ComfyUI's"),
    ("base_model.model.", "PEFT's"),
    ("transformer.", "diffusers'"),
    ("", "Wan's own"),
)
_STRANGERS = (
    (re.compile("dora_scale|magnitude_vector"), "a DoRA adapter"),
    (re.compile(r"lokr_|hada_|oft_|glora|\.[ab][12]\.weight|lora_mid"), "a LyCORIS adapter that is no plain LoRA"),
    (re.compile(r"\.(diff|diff_b|set_weight|w_norm|b_norm)$"), "changes of whole weights"),
    (re.compile(r"\.bias$"), "biases"),
    (re.compile(""), "weights that belong to no adapter"),
)
"""What is found in names, and what it means."""


@dataclass(frozen=True)
class LoraFile:
    """What an adapter's file holds, in the network's names.

    Attributes:
        path: the file.
        layers: of each adapted layer ``(A [rank, inputs], B [outputs, rank])``.
        rank, alpha: of all of them; ``alpha / rank`` is the scale.
        targets: the layers' endings as PEFT takes them, or their whole names.
        full: modules that were trained in full beside them.
        controls: what the network that carries it is told of each frame; None: nothing.
        told: what was converted, in words; empty where nothing was.
    """

    path: Path
    layers: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    targets: list[str]
    full: list[str]
    controls: ControlSettings | None
    told: str


def find_lora(path: str | Path) -> Path:
    """The safetensors file of an adapter: itself, in a folder, or in the folder ``lora`` of one of our runs.

    Raises:
        UserError: there is none, or several.
    """
    place = Path(path).expanduser()
    if place.is_dir() and not (place / LORA_FILE).is_file() and (place / "recipe.yaml").is_file():
        if not (place / "lora" / LORA_FILE).is_file():
            raise UserError(
                f"{path} is a run without an adapter: let it finish, or take one that trains adapters "
                "(model.lora.enabled=true)."
            )
        place = place / "lora"
    if place.is_dir():
        known = [file for name in (LORA_FILE, PEFT_FILE) if (file := place / name).is_file()]
        found = known or sorted(file for file in place.glob("*.safetensors") if file.name != FULL_FILE)
        if len(found) > 1 and not known:
            raise UserError(f"{path} holds {len(found)} safetensors files: name one of them, such as {found[0]}.")
        place = found[0] if found else next((f for f in sorted(place.iterdir()) if f.suffix in _PICKLES), place)
    if place.is_file() and place.suffix in _PICKLES:
        raise UserError(f"{place} is pickled, and pickles are never read: save the adapter as safetensors.")
    if not place.is_file() or place.suffix != ".safetensors":
        raise UserError(f"No LoRA at {path}: give a folder with {LORA_FILE}, or the safetensors file itself.")
    return place


def read_lora(file: Path, transformer: nn.Module) -> LoraFile:
    """An adapter's file, for a network.

    Raises:
        UserError: it is damaged, no low-rank adapter, or of another network.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata() or {}
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): copy it again.") from error
    pairs, alphas, others = _sort(tensors)
    told = _check_kind(file, tensors, pairs, others)
    names = _names_of(transformer)
    layers = {_layer_of(name, names): pair for name, pair in pairs.items()}
    if None in layers or len(layers) < len(pairs):
        strange = next((name for name in pairs if _layer_of(name, names) is None), min(pairs))
        raise UserError(
            f"{file} does not fit this network: {strange} is no linear layer of it (it adapts {len(pairs)} layers): "
            "it is the adapter of another model"
        )
    found: dict[str, tuple[Tensor, Tensor]] = {str(name): pair for name, pair in layers.items()}
    _check_shapes(file, found, transformer)
    config = _config(file, header)
    own_alphas = {str(_layer_of(name, names)): alpha for name, alpha in alphas.items()}
    scales = {name: _scale_of(name, own_alphas, config, pair[0].shape[0]) for name, pair in found.items()}
    targets = _targets(file, transformer, list(found), config)
    written = next(words for prefix, words in _WRITERS if next(iter(tensors)).startswith(prefix))
    is_own = header.get("lora_adapter_metadata") is not None
    found, rank, alpha, more = _made_uniform(found, scales)
    return LoraFile(
        path=file,
        layers=found,
        rank=rank,
        alpha=alpha,
        targets=targets,
        full=[name for name in header.get(FULL_KEY, "").split(",") if name],
        controls=ControlSettings.of({CONFIG_KEY: json.loads(header.get(CONFIG_KEY, "null"))}),
        told="" if is_own else _told(file, written, found, rank, alpha, [*told, *more]),
    )


def wan_name(layer: str) -> str:
    """Wan's own name of a layer that diffusers calls otherwise."""
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+)", layer)
    assert match is not None
    return (match[1] or "") + _WAN_NAMES.get(match[2], match[2])


def write_comfyui(source: Path, target: Path) -> int:
    """Write an adapter that we exported as ComfyUI reads it, ``diffusion_model.LAYER.lora_down.weight`` and so on.

    Args:
        source: the safetensors file in diffusers' layout.
        target: the file to write.

    Returns:
        How many layers ComfyUI's Wan lacks and will leave out (``delta_embedding``).
    """
    pairs, _, _ = _sort(load_file(source))
    with safe_open(source, framework="pt") as stored:
        alpha = float(_config(source, stored.metadata() or {})["lora_alpha"])
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        layer = f"diffusion_model.{wan_name(name.removeprefix('transformer.'))}"
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, target, metadata={"format": "pt"})
    return sum(f"delta_embedding.{n}.alpha" in name for name in tensors for n in (0, 2))


def matching(transformer: nn.Module, targets: Iterable[str]) -> list[str]:
    """The modules that PEFT takes the targets to mean: those of that name, or with that ending."""
    endings = tuple(f".{target}" for target in targets)
    names = (name for name, _ in transformer.named_modules() if not name.endswith(".base_layer"))
    return [name for name in names if f".{name}".endswith(endings)]


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float], list[str]]:
    """``(A and B by layer, alpha by layer, all other names)``, by the file's own names; of half a pair nothing."""
    halves: dict[str, dict[str, Tensor]] = {}
    alphas, others = {}, []
    for name, tensor in tensors.items():
        part = _PART.fullmatch(name)
        if part is not None:
            is_down = "A" in (part["letter"] or "") or part["word"] == "down"
            halves.setdefault(part["layer"], {})["A" if is_down else "B"] = tensor
        elif name.endswith(".alpha") and tensor.numel() == 1:
            alphas[name.removesuffix(".alpha")] = float(tensor)
        else:
            others.append(name)
    pairs = {layer: (half["A"], half["B"]) for layer, half in halves.items() if len(half) == 2}
    others += [f"{layer}.lora_{next(iter(half))}" for layer, half in halves.items() if len(half) == 1]
    return pairs, alphas, others


def _check_kind(file: Path, tensors: Mapping[str, Tensor], pairs: Mapping[str, Any], others: list[str]) -> list[str]:
    """Refuse what is no plain adapter; returns what is left out because it changes nothing.

    Raises:
        UserError: see above.
    """
    if not pairs and not any(re.search("lora|lokr|hada|oft|diff", name) for name in others):
        raise UserError(f"{file} holds no adapter: give the file of a LoRA (a network's weights are model.weights).")
    idle = [name for name in others if name.endswith((".diff", ".diff_b")) and not tensors[name].float().any()]
    rest = [name for name in others if name not in idle]
    if halves := [name for name in rest if name not in tensors]:
        raise UserError(f"{file} has {halves[0]} without its other half: copy or save it again.")
    if rest:
        form, what = next(known for known in _STRANGERS if any(known[0].search(name) for name in rest))
        named = next(name for name in rest if form.search(name))
        raise UserError(
            f"{file} has {what} ({named}, {len(rest)} such weights), and only low-rank adapters are read: merge it "
            "into its model by the tool that made it, and give that model as model.weights."
        )
    return [f"{len(idle)} changes of 0 left out"] if idle else []


def _names_of(transformer: nn.Module) -> dict[str, str]:
    """Every name that a linear layer may have in a file, to the network's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = (item for item in transformer.named_modules() if ".lora_" not in item[0] and ".base_layer" not in item[0])
    own = [name for name, module in modules if isinstance(module, nn.Linear | BaseTunerLayer)]
    names: dict[str, str] = {}
    for name in own:
        for known in (name, wan_name(name)):
            names[known] = names[known.replace(".", "_")] = name
    return names


def _layer_of(name: str, names: Mapping[str, str]) -> str | None:
    """The network's layer that a name in a file means, behind any prefixes."""
    while name not in names:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return names[name]


def _check_shapes(file: Path, layers: Mapping[str, tuple[Tensor, Tensor]], transformer: nn.Module) -> None:
    for name, (down, up) in layers.items():
        weight: Any = transformer.get_submodule(name).weight
        outputs, inputs = weight.shape
        if (down.ndim, up.ndim) != (2, 2) or down.shape[0] != up.shape[1]:
            raise UserError(f"{file} is damaged: {name} has {list(down.shape)} and {list(up.shape)}: copy it again.")
        if (up.shape[0], down.shape[1]) != (outputs, inputs):
            raise UserError(
                f"{file} does not fit this network: {name} has {down.shape[1]} inputs and {up.shape[0]} outputs in the "
                f"file, {inputs} and {outputs} in the network: it is the adapter of a model of another size"
            )


def _config(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration of an adapter, from the file's header or from beside it; empty if there is none.

    Raises:
        UserError: it cannot be read, or is of another kind than LoRA.
    """
    text = header.get("lora_adapter_metadata")
    if text is not None:
        try:
            stored = json.loads(text)
        except ValueError as error:
            raise UserError(f"{file}: its header is damaged ({first_line(error)}): copy it again.") from error
        return {key.removeprefix("transformer."): value for key, value in stored.items()}
    beside = file.with_name(_PEFT_CONFIG)
    config = read_json(beside) if file.name == PEFT_FILE and beside.is_file() else {}
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{beside} is of {config['peft_type']}, and only LoRA is read: merge it into its model.")
    return config


def _scale_of(name: str, alphas: Mapping[str, float], config: Mapping[str, Any], rank: int) -> tuple[float, float]:
    """``(alpha, scale)`` of a layer: by its own alpha, by PEFT's configuration, or else 1."""
    from peft.utils.other import get_pattern_key

    if name in alphas:
        return alphas[name], alphas[name] / rank
    if "lora_alpha" not in config:
        return float(rank), 1.0
    pattern = config.get("alpha_pattern") or {}
    key = next((key for known in (name, wan_name(name)) if (key := get_pattern_key(pattern, known)) in pattern), None)
    alpha = pattern[key] if key is not None else config["lora_alpha"]
    return alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _made_uniform(
    layers: dict[str, tuple[Tensor, Tensor]], scales: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, tuple[Tensor, Tensor]], int, float, list[str]]:
    """The layers with one rank and one scale, these two, and what was done for it in words."""
    ranks = {name: down.shape[0] for name, (down, _) in layers.items()}
    rank = max(ranks.values())
    alpha, scale = next(iter(scales.values()))
    is_mixed = len(set(ranks.values())) > 1
    if not is_mixed and len(set(scales.values())) == 1 and scale > 0:
        return layers, rank, alpha if alpha / rank == scale else scale * rank, []
    uniform = {}
    for name, (down, up) in layers.items():
        more = rank - ranks[name]
        uniform[name] = F.pad(down.float(), (0, 0, 0, more)), F.pad(up.float() * scales[name][1], (0, more))
    filled = ["lower ranks are filled up with zeros"] if is_mixed else []
    return uniform, rank, float(rank), ["the layers' own scales are in the weights now", *filled]


def _targets(file: Path, transformer: nn.Module, layers: list[str], config: Mapping[str, Any]) -> list[str]:
    """The layers in PEFT's words.

    Raises:
        UserError: an export of ours or diffusers' lacks some of its layers, or the network does.
    """
    named = config.get("target_modules")
    if isinstance(named, list) and (wanted := set(matching(transformer, named))):
        if differing := wanted ^ set(layers):
            raise UserError(f"{file} does not fit this network: {min(differing)} is in one of them only.")
        return sorted(named)
    endings = sorted({re.sub(r"^(blocks\.\d+|condition_embedder)\.", "", name) for name in layers})
    return endings if set(matching(transformer, endings)) == set(layers) else sorted(layers)


def _told(file: Path, written: str, layers: Mapping[str, Any], rank: int, alpha: float, more: Iterable[str]) -> str:
    delta = any("delta_embedder" in name for name in layers)
    facts = [f"{file}: {written} names, taken as {len(layers)} layers of rank {rank}, alpha {alpha:g}", *more]
    return "; ".join(facts if delta else [*facts, "none is of delta_embedder, which stays as in the base"])
