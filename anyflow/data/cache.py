"""Latents and prompt embeddings computed beforehand, as shards: training then needs no decoder, VAE or text encoder.

A cache is a folder of ordinary shards (``KEY.safetensors`` with float16 ``latents`` [F, C, H, W], and the source's
``KEY.json``), a folder ``texts`` of shards with each distinct caption's embedding, and a ``cache.json`` that says what
they were made from. Its name is derived from the same facts, so other footage, other shapes or another model never meet
an old cache. :mod:`anyflow.data.encode` makes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anyflow.data.card import caption_identity
from anyflow.data.decode import ClipShape, DecodeError
from anyflow.data.order import digest
from anyflow.data.reader import ShardReader, Split
from anyflow.data.shards import Sample
from anyflow.data.skips import Skip
from anyflow.errors import UserError
from anyflow.system.files import write_atomically

CACHE_FILE = "cache.json"
CACHE_VERSION = 2
TEXTS = "texts"

LatentShape = tuple[int, int, int, int]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentCache:
    """What a cache was made from.

    Attributes:
        codec: fingerprint of autoencoder (its normalisation included) and text encoder.
        source: digest of the footage's shards.
        shapes: frames, size and frame rate that clips were brought to before they were encoded.
        latent_shapes: (F, C, H, W) of each; None for one that no clip has.
        texts: distinct prompts whose embeddings are in it.
        skipped: the clips that could not be encoded.
    """

    codec: str
    source: str
    shapes: tuple[ClipShape, ...]
    latent_shapes: tuple[LatentShape | None, ...]
    texts: int
    skipped: tuple[Skip, ...] = ()

    def save(self, folder: Path) -> None:
        """Write it down in the cache's folder."""
        write_atomically(folder / CACHE_FILE, json.dumps({"version": CACHE_VERSION, **asdict(self)}).encode())


def load_cache(folder: str | Path, codec_hash: str | None = None) -> LatentCache:
    """Read what a cache was made from, and refuse it if another model made it.

    Raises:
        UserError: the folder is no cache, or the fingerprints differ.
    """
    path = Path(folder) / CACHE_FILE
    try:
        document = json.loads(path.read_text())
        if document["version"] != CACHE_VERSION:
            raise UserError(f"{path} has an unknown version: remove the folder and encode the data again.")
        cache = _from_document(document)
    except FileNotFoundError as error:
        raise UserError(f"no {CACHE_FILE} in {str(folder)!r}: encode the data first.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove the folder and encode the data again.") from error
    if codec_hash is not None and cache.codec != codec_hash:
        raise UserError(
            f"the cache {str(folder)!r} was encoded by another autoencoder or text encoder, or in another precision "
            f"({cache.codec[:12]}, not {codec_hash[:12]}): encode the data again."
        )
    return cache


def _from_document(document: dict[str, Any]) -> LatentCache:
    return LatentCache(
        codec=document["codec"],
        source=document["source"],
        shapes=tuple(ClipShape(**shape) for shape in document["shapes"]),
        latent_shapes=tuple(tuple(shape) if shape else None for shape in document["latent_shapes"]),
        texts=int(document["texts"]),
        skipped=tuple(Skip(**skip) for skip in document["skipped"]),
    )


def is_whole(folder: Path, fingerprint: str) -> bool:
    """Whether a usable cache is there; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        cache = load_cache(folder, fingerprint)
        ShardReader([folder], strict=True)
        if cache.texts:
            ShardReader([folder / TEXTS], strict=True)
    except UserError as error:
        log.warning("rebuilding the latent cache: %s", error)
        shutil.rmtree(folder)
        return False
    return True


class TextStore:
    """The embeddings in some caches, by their prompts; read one by one.

    Args:
        folders: the caches' folders.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.reader = ShardReader([folder / TEXTS for folder in folders if (folder / TEXTS).is_dir()], strict=True)
        self._places: dict[str, tuple[int, Sample]] = {
            sample.key: (number, sample)
            for number, (_, shard) in enumerate(self.reader.shards)
            for sample in shard.samples
        }

    def __contains__(self, prompt: str) -> bool:
        return text_key(prompt) in self._places

    def get(self, prompt: str) -> Tensor | None:
        """The embedding ``[length, D]`` of a prompt, without padding; None if it is not there or cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        place = self._places.get(text_key(prompt))
        if place is None:
            return None
        try:
            return load(self.reader.read(*place, "safetensors"))["text"]
        except (DecodeError, SafetensorError, KeyError, ValueError) as error:
            log.warning("the embedding of %r cannot be read: %s", prompt[:80], error)
            return None


def text_key(prompt: str) -> str:
    """The key of a prompt's embedding."""
    return digest(prompt)


def cache_name(split: Split, split_name: str, shapes: Sequence[ClipShape], source: str, fingerprint: str) -> str:
    """The folder of a cache: ``driving-train-17x64x96-own-fps-SOURCE-MODEL``."""
    first, *further = (f"{shape.frames}x{shape.height}x{shape.width}" for shape in shapes)
    more = f"+{len(further)}-{digest('+'.join(further))[:6]}" if further else ""
    rate = f"{shapes[0].fps:g}fps" if shapes[0].fps else "own-fps"
    return f"{split.name}-{split_name}-{first}{more}-{rate}-{source[:8]}-{fingerprint[:12]}"


def source_digest(reader: ShardReader, caption: str | None) -> str:
    """Digest of the footage's shards, and of what stands in for captions."""
    caption = caption_identity(caption)
    text = "\n".join(f"{shard.name} {shard.content}" for _, shard in reader.shards)
    return hashlib.sha256(f"{text}\n{caption}".encode() if caption else text.encode()).hexdigest()
