"""Finding and reading the files of a checkpoint; what goes wrong there is told in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from anyflow.backbone.layout import check_folder
from anyflow.errors import UserError, first_line

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that ``pipeline.load_lora_weights(folder)`` looks for."""
CAUSAL_KIND = "AnyFlowFARTransformer3DModel"
"""diffusers' name of the causal network."""
PEFT_FILE = "adapter_model.safetensors"
"""PEFT's own name for an adapter's weights."""


def resolve_folder(path: str | Path, parts: Sequence[str] = ("transformer",)) -> Path:
    """The local folder of a path, of one of our runs (its ``model`` folder), or of a Hub name (downloaded, no pickles).

    A Hub name may pin a revision (commit, tag or branch): ``owner/model@revision``. With ``HF_HUB_OFFLINE=1`` only what
    was downloaded before is found.

    Raises:
        UserError: there is nothing of that name.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return _download(str(path), parts)
    if any((folder / part).is_dir() for part in parts):
        return folder
    if any((folder / name).is_file() for name in (LORA_FILE, PEFT_FILE)):
        raise UserError(
            f"{folder} holds a LoRA adapter and no network: name its run's folder, export that with --merge, or load "
            "the adapter onto its base in Python (its README.md says how)"
        )
    return folder / "model" if (folder / "model").is_dir() else folder


def check_start(path: str | Path) -> Path:
    """Refuse a model that cannot become one flow map, of a Hub name too, before its weights are read or downloaded.

    Returns:
        Its folder, of a Hub name one with the configurations at least.

    Raises:
        UserError: it is refused (:func:`anyflow.backbone.layout.check_folder`), or there is nothing of that name.
    """
    folder = Path(path).expanduser()
    found = resolve_folder(folder) if folder.is_dir() else _download(str(path), ())
    check_folder(found)
    return found


def _download(name: str, parts: Sequence[str]) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) or name.startswith("."):
        raise UserError(
            f"No folder {name}: give a model folder in diffusers' layout, or a Hub name such as owner/model."
        )
    from huggingface_hub import snapshot_download

    folders = {*parts, "scheduler"}
    patterns = [f"{part}/{kind}" for part in folders for kind in ("*.json", "*.safetensors", "*.model", "*.txt")]
    repository, _, revision = name.partition("@")
    try:
        wanted = ["model_index.json", "transformer/config.json", *patterns]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # the client raises a dozen kinds: no such repository, gated, no network, disk full
        raise UserError(
            f"No folder {name}, and the Hugging Face Hub did not give it either ({first_line(error)}): "
            "check the name, or the network."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: no such file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"No {path.name} in {path.parent}: give a folder in diffusers' layout.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): download or export it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: download or export it again.")
    return content


def says_causal(config: Mapping[str, Any]) -> bool:
    """Whether a transformer's configuration is a causal (FAR) network's."""
    return config.get("_class_name") == CAUSAL_KIND or bool(config.get("init_far_model"))


def read_weights(place: Path, precision: Callable[[str], torch.dtype] | None) -> dict[str, Tensor]:
    """All tensors of a model's safetensors file or files, each in the precision asked for by its name.

    Without ``precision`` they stay in their files, as stored: memory is taken page by page where it is read, and shared
    by all processes of a machine.

    Raises:
        UserError: there are none, only pickles, or a file is missing or damaged.
    """
    weights: dict[str, Tensor] = {}
    for file in _weight_files(place):
        try:
            with safe_open(file, framework="pt", device="cpu") as stored:
                for name in stored.keys():  # noqa: SIM118 (the reader is no mapping)
                    tensor = stored.get_tensor(name)
                    if precision is not None:
                        # a copy: the reader's memory is the file's, which may be replaced while we train
                        tensor = tensor.to(precision(name) if tensor.is_floating_point() else tensor.dtype, copy=True)
                    weights[name] = tensor
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is missing or damaged ({first_line(error)}): download or export it again."
            ) from error
    return weights


def _weight_files(place: Path) -> list[Path]:
    index = place / f"{WEIGHTS_NAME}.index.json"
    if index.exists():
        return [place / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if (place / WEIGHTS_NAME).exists():
        return [place / WEIGHTS_NAME]
    files = sorted(place.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise UserError(
            f"{place} holds {len(files)} safetensors files and no {index.name} saying which belong together."
        )
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in place.glob(kind))
    if pickles:
        raise UserError(f"{place} holds only pickled weights ({pickles[0]}), which are never read: give safetensors.")
    raise UserError(f"No {WEIGHTS_NAME} in {place}: give a folder in diffusers' layout.")


def load_codec_parts(folder: Path, text: bool, dtype: torch.dtype, text_dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Autoencoder, tokenizer and text encoder (both None without text) of a pipeline folder.

    Raises:
        UserError: a part is missing or unreadable.
    """
    from diffusers import AutoencoderKLWan

    vae = _load_part(AutoencoderKLWan, folder, "vae", dtype=dtype)
    if not text:
        return vae, None, None
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = _load_part(AutoTokenizer, folder, "tokenizer")
    return vae, tokenizer, _load_part(UMT5EncoderModel, folder, "text_encoder", dtype=text_dtype)


def empty_codec_parts(folder: Path, dtype: torch.dtype, text_dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """As :func:`load_codec_parts`, without weights: autoencoder and text encoder are on the meta device.

    Raises:
        UserError: a configuration is missing or unreadable.
    """
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    tokenizer = _load_part(AutoTokenizer, folder, "tokenizer")
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(read_json(folder / "vae" / "config.json")).to(dtype)
        text_encoder = UMT5EncoderModel(UMT5Config(**read_json(folder / "text_encoder" / "config.json"))).to(text_dtype)
    return _without_gradient(vae), tokenizer, _without_gradient(text_encoder)


def _load_part(kind: Any, folder: Path, part: str, **options: Any) -> Any:
    """A part by its own loader, which must have found every weight: a missing one would silently be random."""
    place = folder / part
    if not place.is_dir():
        raise UserError(f"{folder} has no {part} folder: give a complete diffusers pipeline folder.")
    if part != "tokenizer":
        options.update(use_safetensors=True, output_loading_info=True)
    try:
        loaded = kind.from_pretrained(str(place), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{place} cannot be read as {kind.__name__}: {first_line(error)}") from error
    if part == "tokenizer":
        return loaded
    model, report = loaded
    missing = sorted({*report["missing_keys"], *(str(entry) for entry in report.get("mismatched_keys", ()))})
    if missing:
        raise UserError(f"{place} lacks {missing[0]} ({len(missing)} weights in all): download or export it again.")
    return _without_gradient(model)


def _without_gradient(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
