"""The fingerprint of a codec's files: what is encoded by one codec is refused by another.

It is read from the files, so that training on what was encoded beforehand need not load the codec to know it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from anyflow.backbone.files import read_json

WHOLE = 2**30
"""Files up to so many bytes are read whole; of larger ones a piece of every STRIDE bytes: a text encoder has 11 GB."""
PIECE, STRIDE = 2**16, 2**24


def fingerprint_codec(folder: Path, dtype: torch.dtype, text_dtype: torch.dtype) -> str:
    """sha256 of autoencoder (statistics of its latents included), text encoder and tokenizer, and their precisions.

    Args:
        folder: of the pipeline.
        dtype: precision that the autoencoder works in.
        text_dtype: precision that the text encoder works in.

    Raises:
        UserError: a configuration is missing or damaged.
    """
    digest = hashlib.sha256(f"{dtype} {text_dtype}".encode())
    for part in ("vae", "text_encoder"):
        digest.update(json.dumps(_settings(folder / part / "config.json"), sort_keys=True).encode())
        for path in sorted((folder / part).glob("*.safetensors")):
            _add(digest, path)
    for path in sorted((folder / "tokenizer").glob("*")):
        if path.is_file():
            _add(digest, path)
    return digest.hexdigest()


def _settings(path: Path) -> dict[str, Any]:
    """A configuration, without what says who wrote it and when."""
    known = read_json(path)
    return {name: value for name, value in known.items() if not name.startswith("_") and "version" not in name}


def _add(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            while piece := file.read(STRIDE):
                digest.update(piece)
            return
        for start in range(0, size, STRIDE):
            file.seek(start)
            digest.update(file.read(PIECE))
