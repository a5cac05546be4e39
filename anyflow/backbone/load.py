"""Any checkpoint in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AnyFlowTransformer3DModel, AutoencoderKLWan
from torch import nn

from anyflow.backbone.bidirectional import BidirectionalBackbone
from anyflow.errors import UserError


def new_backbone(config: dict[str, Any], seed: int) -> BidirectionalBackbone:
    """An untrained network of the given transformer configuration, with Wan's initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = AnyFlowTransformer3DModel.from_config(dict(config))
        _initialise(transformer)
    return BidirectionalBackbone(transformer)


def _initialise(transformer: AnyFlowTransformer3DModel) -> None:
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


def resolve_folder(path: str | Path, parts: Sequence[str] = ("transformer",)) -> Path:
    """The local folder of a path, of one of our runs (its ``model`` folder), or of a Hub name (downloaded, no pickles).

    Raises:
        UserError: nothing there, or none of the parts.
    """
    folder = Path(path)
    if not folder.exists():
        return _download(str(path), parts)
    if not any((folder / part).exists() for part in parts) and (folder / "model").is_dir():
        folder = folder / "model"
    return folder


def _download(name: str, parts: Sequence[str]) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"No model at {name}: give a folder in diffusers' layout, or a Hub name such as owner/model.")
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/{kind}" for part in parts for kind in ("*.json", "*.safetensors", "*.model", "*.txt")]
    try:
        return Path(snapshot_download(name, allow_patterns=["model_index.json", *patterns]))
    except Exception as error:  # the client raises a dozen kinds: no such repository, gated, no network, disk full
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} is no folder here, and the Hugging Face Hub did not give it: {reason}") from error


def load_codec_parts(
    folder: Path, text: bool, dtype: torch.dtype, text_dtype: torch.dtype
) -> tuple[AutoencoderKLWan, Any, nn.Module | None]:
    """Autoencoder, tokenizer and text encoder (None without text) of a pipeline folder.

    Raises:
        UserError: a part is missing or unreadable.
    """
    vae = _load_part(AutoencoderKLWan, folder, "vae", torch_dtype=dtype)
    if not text:
        return vae, None, None
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = _load_part(AutoTokenizer, folder, "tokenizer")
    return vae, tokenizer, _load_part(UMT5EncoderModel, folder, "text_encoder", dtype=text_dtype)


def _load_part(kind: Any, folder: Path, part: str, **options: Any) -> Any:
    place = folder / part
    if not place.is_dir():
        raise UserError(f"{folder} has no {part} folder: give a complete diffusers pipeline folder.")
    if part != "tokenizer":
        options["use_safetensors"] = True
    try:
        return kind.from_pretrained(str(place), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{place} cannot be read as {kind.__name__}: {str(error).strip().splitlines()[0]}") from error
