"""Any checkpoint out: a folder that diffusers' pipelines load, or an adapter that they load on top.

``AnyFlowPipeline`` loads a bidirectional network, ``AnyFlowFARPipeline`` a causal one. The latter's cached attention is
wrong in diffusers, so the corrected pipeline goes with the folder (see :mod:`anyflow.backbone.far_pipeline`). So does
one for a bidirectional network whose first frames may be given, or whose tokens are larger than Wan 2.1's
(:mod:`anyflow.backbone.exact_pipeline`). With a network that is told controls goes a pipeline that takes them
(:mod:`anyflow.backbone.control_embedding`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AnyFlowFARTransformer3DModel, AnyFlowPipeline, FlowMapEulerDiscreteScheduler
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.controls import CONFIG_KEY, controls_of
from anyflow.backbone.files import LORA_FILE
from anyflow.backbone.full import FULL_FILE, full_names
from anyflow.backbone.layout import Layout
from anyflow.backbone.load import GUIDANCE_KEYS, SAMPLER_KEY
from anyflow.backbone.lora import ADAPTER, lora_full_state, lora_metadata, lora_state, merged_state
from anyflow.backbone.lora_files import FULL_KEY, write_comfyui
from anyflow.backbone.model_card import ModelCard, for_comfyui
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.errors import UserError
from anyflow.system.files import partial_folder, replacing, sync, sync_tree, write_atomically

_WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"


def export_pipeline(
    folder: str | Path,
    transformer: Any,
    codec: Codec,
    shift: float,
    card: ModelCard,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    single_file: bool = False,
) -> Path:
    """Write a complete pipeline folder: all of it, or (when interrupted) none of it.

    Args:
        folder: where to; an earlier export there is replaced.
        transformer: the diffusers module; an adapter on it is merged into what is written, and stays on the module.
        codec: autoencoder, tokenizer and text encoder to go with it, as they are: linked or copied from the folder that
            they came from, if there is one.
        shift: of the sampler's schedule: the one trained with.
        card: what the README says; its way of sampling is written down with the scheduler.
        weights: the transformer's state dict to write instead of its own: gathered from all ranks, or averaged.
        dtype: precision of the transformer's weights.
        single_file: all of the transformer's weights in one file, instead of several of at most 10 GB with an index.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else, or the codec has no text encoder.
    """
    if codec.text_encoder is None or codec.tokenizer is None:
        raise UserError("A pipeline needs its text encoder: load the codec with text=True to export.")
    target = Path(folder)
    if target.exists() and not (target / "model_index.json").exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} exists and is no exported model: choose another folder.")
    with _replacing(target) as place:
        merged = merged_state(transformer, weights=weights)
        _write_transformer(place / "transformer", transformer, merged, dtype, single_file)
        _write_scheduler(place / "scheduler", shift, card)
        _write_codec(place, codec)
        is_causal = isinstance(transformer, AnyFlowFARTransformer3DModel)
        _write_index(place, codec, type(transformer).__name__, "AnyFlowFARPipeline" if is_causal else "AnyFlowPipeline")
        told = controls_of(transformer)
        is_told = told is not None
        is_exact = not (is_causal or is_told) and (card.given or codec.layout != Layout())
        _write_code(place, is_causal, is_told, is_exact)
        card = replace(card, causal=is_causal, told=told.controls if told else {}, exact=is_exact)
        (place / "README.md").write_text(card.render(), encoding="utf-8")
    return target


def export_lora(
    folder: str | Path,
    backbone: FlowMapBackbone,
    card: ModelCard | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    adapter: str = ADAPTER,
) -> Path:
    """Write an adapter as float32 safetensors that ``AnyFlowPipeline.load_lora_weights(folder)`` takes.

    Modules that were trained in full go into a second file beside it, by the transformer's own names.

    Args:
        folder: where to; other files there stay.
        backbone: the network that carries the adapter.
        card: what the README says; None writes none.
        weights: the transformer's state to read the adapter from, instead of its own.
        adapter: its name.

    Returns:
        The adapter's safetensors file.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    layers = _float32(lora_state(backbone, adapter, weights))
    full = full_names(backbone.transformer, adapter)
    _write_full(target, _float32(lora_full_state(backbone, adapter, weights)))
    partial = ".partial.safetensors"
    AnyFlowPipeline.save_lora_weights(
        target,
        transformer_lora_layers=layers,
        weight_name=partial,
        transformer_lora_adapter_metadata=lora_metadata(backbone, adapter),
    )
    known = controls_of(backbone.transformer)
    noted = ({FULL_KEY: ",".join(full)} if full else {}) | ({CONFIG_KEY: json.dumps(known.to_json())} if known else {})
    if noted:
        _note(target / partial, noted)
    sync(target / partial)
    (target / partial).replace(target / LORA_FILE)
    if card is not None:
        is_causal = isinstance(backbone.transformer, AnyFlowFARTransformer3DModel)
        told = replace(card, causal=is_causal, full=full, told=known.controls if known else {})
        write_atomically(target / "README.md", told.render(lora=True))
    return target / LORA_FILE


def rename_for_comfyui(folder: Path, name: str) -> int:
    """Make an exported adapter's folder one for ComfyUI: ``name.safetensors`` for its ``models/loras``, and a README.

    Returns:
        How many layers ComfyUI's Wan does not have, and will leave out.

    Raises:
        UserError: modules were trained in full beside the adapter, for which ComfyUI has no place.
    """
    if (folder / FULL_FILE).exists():
        raise UserError(
            "--layout comfyui: modules were trained in full beside this adapter, and ComfyUI has no causal network: "
            "leave --layout out, or export it with --merge"
        )
    with replacing(folder / f"{name}.safetensors") as place:
        lost = write_comfyui(folder / LORA_FILE, place)
    (folder / LORA_FILE).unlink()
    if (folder / "README.md").exists():
        write_atomically(folder / "README.md", for_comfyui((folder / "README.md").read_text(encoding="utf-8"), name))
    return lost


def _float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float().cpu().contiguous() for name, tensor in state.items()}


def _write_full(target: Path, state: dict[str, Tensor]) -> None:
    """The file of modules trained in full; an adapter without any leaves none from before."""
    if not state:
        (target / FULL_FILE).unlink(missing_ok=True)
        return
    with replacing(target / FULL_FILE) as partial:
        save_file(state, partial, metadata={"format": "pt"})


def _note(file: Path, facts: Mapping[str, str]) -> None:
    """Say in the adapter's header what was trained in full beside it, and which controls it knows.

    Without the file of the former it is half of what was trained.
    """
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata() or {}
    with replacing(file) as noted:  # what is read may still lie in the old file
        save_file(load_file(file), noted, metadata={**header, **facts})


def _write_transformer(
    place: Path, transformer: Any, state: dict[str, Tensor], dtype: torch.dtype, single_file: bool
) -> None:
    place.mkdir()
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    header = {"_class_name": type(transformer).__name__, "_diffusers_version": diffusers.__version__}
    _write_json(place / "config.json", {**header, **config})
    _save_weights(place, state, dtype, single_file)


def _write_scheduler(place: Path, shift: float, card: ModelCard) -> None:
    FlowMapEulerDiscreteScheduler(shift=shift).save_pretrained(place)
    more: dict[str, Any] = {} if card.sampler == "flowmap" else {SAMPLER_KEY: card.sampler}
    if card.guidance is not None:
        more |= dict(zip(GUIDANCE_KEYS, (card.guidance.scale, card.guidance.negative), strict=True))
    if more:
        file = place / "scheduler_config.json"
        _write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **more})


def _write_code(place: Path, is_causal: bool, is_told: bool, is_exact: bool) -> None:
    """What diffusers' own pipelines lack: right attention of a causal network, given frames, and controls."""
    here = Path(__file__).parent
    files = {
        (False, False): ("exact_pipeline.py",) * is_exact,
        (True, False): ("far_pipeline.py",),
        (False, True): ("told_pipeline.py", "control_embedding.py", "exact_pipeline.py"),
        (True, True): ("told_far_pipeline.py", "control_embedding.py", "far_pipeline.py"),
    }[is_causal, is_told]
    for number, name in enumerate(files):
        shutil.copyfile(here / name, place / (name if number else "pipeline.py"))


def _write_codec(place: Path, codec: Codec) -> None:
    source = codec.source
    parts = ("vae", "text_encoder", "tokenizer")
    if source is not None and all((source / part).is_dir() for part in parts):
        for part in parts:
            _link_or_copy(source / part, place / part)
        return
    codec.tokenizer.save_pretrained(place / "tokenizer")
    codec.vae.save_config(place / "vae")
    _save_weights(place / "vae", codec.vae.state_dict(), codec.dtype)
    encoder: Any = codec.text_encoder
    state = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    encoder.save_pretrained(place / "text_encoder", state_dict=state)


def _save_weights(place: Path, state: dict[str, Tensor], dtype: torch.dtype, single_file: bool = False) -> None:
    place.mkdir(exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    save_torch_state_dict(
        tensors, place, filename_pattern=_WEIGHTS_PATTERN, max_shard_size="1000GB" if single_file else "10GB"
    )


def _write_index(place: Path, codec: Codec, transformer: str, pipeline: str) -> None:
    index = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"],
        "text_encoder": ["transformers", type(codec.text_encoder).__name__],
        "tokenizer": ["transformers", type(codec.tokenizer).__name__],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    _write_json(place / "model_index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _link_or_copy(source: Path, place: Path) -> None:
    """The files of a folder: hard links where the disk allows (a text encoder is 11 GB), else copies."""

    def bring(origin: str, destination: str) -> str:
        try:
            os.link(os.path.realpath(origin), destination)  # the Hub's cache holds symbolic links
        except OSError:
            shutil.copy2(origin, destination)
        return destination

    shutil.copytree(source, place, copy_function=bring)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the target's place on success, and vanishes on failure."""
    previous = target.with_name(f".{target.name}.previous")
    with partial_folder(target) as place:
        yield place
        sync_tree(place)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        place.rename(target)
    shutil.rmtree(previous, ignore_errors=True)
