"""Latents computed beforehand, as shards: training then reads a few kilobytes a clip and needs no decoder at all.

A cache is a folder of ordinary shards (``KEY.safetensors`` with float16 ``latents`` [F, C, H, W], and the source's
``KEY.json``) and a ``cache.json`` that says what they were made from. Its name is derived from the same facts, so other
footage, another size or another autoencoder never meet an old cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.reader import ShardReader, check_length, find_split
from anyflow.data.shards import write_samples
from anyflow.data.stream import Skip, enforce_budget
from anyflow.errors import UserError

CACHE_FILE = "cache.json"
CACHE_VERSION = 1
LATENTS_PER_SHARD = 1000

log = logging.getLogger(__name__)


class VideoEncoder(Protocol):
    """What the cache needs of a codec."""

    vae: nn.Module

    def encode_video(self, video: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] to normalised latents [B, F, C, H, W]."""
        ...


@dataclass(frozen=True)
class LatentCache:
    """What a cache was made from.

    Attributes:
        codec: fingerprint of the autoencoder.
        source: digest of the footage's shards.
        shape: frames, size and frame rate of the encoded clips.
        latent_shape: (F, C, H, W).
        skipped: the clips that could not be encoded.
    """

    codec: str
    source: str
    shape: ClipShape
    latent_shape: tuple[int, int, int, int]
    skipped: tuple[Skip, ...] = ()


def encode_dataset(
    card: str | Path,
    split: str,
    codec: VideoEncoder,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    error_budget: float = 0.01,
) -> Path:
    """Encode a card's split, unless the same cache is there already.

    Every clip is encoded by itself, from its beginning: its bytes depend on nothing else.

    Args:
        card: name or path of a card, or a folder of shards.
        split: "train" or "heldout".
        codec: the autoencoder.
        out: folder in which the cache's own folder is made; ``cache`` beside the card by default.
        progress: called with (clips done, clips in all).
        frames, height, width, fps: shape of a clip, as training asks for it.
        error_budget: largest share of unusable clips that is tolerated.

    Returns:
        The cache's folder; it appears whole or not at all.

    Raises:
        UserError: the data are missing, too many clips are bad, or the folder cannot be written.
    """
    shape = ClipShape(frames, height, width, fps)
    footage = find_split(card, split)
    check_length(footage, shape)
    reader = ShardReader([footage.folder], [footage.caption])
    fingerprint, source = codec_fingerprint(codec.vae), _source_digest(reader)
    parent = Path(out) if out is not None else footage.home / "cache"
    folder = parent / _cache_name(footage.name, split, shape, source, fingerprint)
    if _is_whole(folder, fingerprint):
        return folder
    skipped: list[Skip] = []
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent) as scratch:
            partial = Path(scratch) / folder.name
            samples = _encoded_samples(reader, codec, shape, skipped, progress, error_budget)
            index = write_samples(samples, partial, "latents", LATENTS_PER_SHARD)
            reading = ShardReader([partial])
            first = _read_latents(reading, 0, 0)
            cache = LatentCache(fingerprint, source, shape, first.shape, tuple(skipped))
            (partial / CACHE_FILE).write_text(json.dumps({"version": CACHE_VERSION, **asdict(cache)}))
            _move_into_place(partial, folder, fingerprint)
    except OSError as error:
        raise UserError(f"the latent cache {str(folder)!r} cannot be written: {error.strerror or error}") from error
    for skip in skipped:
        log.warning("not encoded: %s", skip)
    log.info("encoded %d clips into %s, %d bytes", index.count, folder, index.bytes)
    return folder


def load_cache(folder: str | Path, codec_hash: str | None = None) -> LatentCache:
    """Read what a cache was made from, and refuse it if another autoencoder made it.

    Raises:
        UserError: the folder is no cache, or the fingerprints differ.
    """
    path = Path(folder) / CACHE_FILE
    try:
        document = json.loads(path.read_text())
        if document.pop("version") != CACHE_VERSION:
            raise UserError(f"{path} has an unknown version: remove the folder and encode the data again.")
        cache = LatentCache(
            codec=document["codec"],
            source=document["source"],
            shape=ClipShape(**document["shape"]),
            latent_shape=tuple(document["latent_shape"]),  # type: ignore[arg-type]
            skipped=tuple(Skip(**skip) for skip in document["skipped"]),
        )
    except FileNotFoundError as error:
        raise UserError(f"no {CACHE_FILE} in {str(folder)!r}: encode the data first.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove the folder and encode the data again.") from error
    if codec_hash is not None and cache.codec != codec_hash:
        raise UserError(
            f"the cache {str(folder)!r} was encoded by another autoencoder ({cache.codec[:12]}, "
            f"not {codec_hash[:12]}): encode the data again."
        )
    return cache


def codec_fingerprint(vae: nn.Module) -> str:
    """sha256 of an autoencoder: its weights as they compute (precision included) and its configuration."""
    digest = hashlib.sha256()
    config = {name: value for name, value in dict(getattr(vae, "config", {})).items() if not name.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encoded_samples(
    reader: ShardReader,
    codec: VideoEncoder,
    shape: ClipShape,
    skipped: list[Skip],
    progress: Callable[[int, int], None] | None,
    error_budget: float,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, members) of every usable clip, in the index's order."""
    from safetensors.numpy import save

    places = [(number, sample) for number, (_, shard) in enumerate(reader.shards) for sample in shard.samples]
    for done, (number, sample) in enumerate(places, start=1):
        try:
            description = reader.describe(number, sample)
            frames = decode_clip(reader.read(number, sample, "mp4"), shape)
        except DecodeError as error:
            skipped.append(Skip(reader.shards[number][1].name, sample.key, str(error)))
            enforce_budget(skipped, done, len(places), error_budget)
            continue
        latents = codec.encode_video(torch.from_numpy(frames)[None])[0].half().cpu().numpy()
        text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        yield sample.key, {"safetensors": save({"latents": latents}), "json": text.encode()}
        if progress is not None:
            progress(done, len(places))


def _read_latents(reader: ShardReader, shard: int, number: int) -> np.ndarray:
    from safetensors.numpy import load

    return load(reader.read(shard, reader.sample(shard, number), "safetensors"))["latents"]


def _is_whole(folder: Path, fingerprint: str) -> bool:
    """Whether a usable cache is there; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        load_cache(folder, fingerprint)
        ShardReader([folder], strict=True)
    except UserError as error:
        log.warning("rebuilding the latent cache: %s", error)
        shutil.rmtree(folder)
        return False
    return True


def _move_into_place(partial: Path, folder: Path, fingerprint: str) -> None:
    """Rename; if another process was quicker its cache stays, for the two are equal."""
    try:
        partial.rename(folder)
    except OSError:
        if not _is_whole(folder, fingerprint):
            raise


def _cache_name(name: str, split: str, shape: ClipShape, source: str, fingerprint: str) -> str:
    rate = f"{shape.fps:g}fps" if shape.fps else "own-fps"
    return f"{name}-{split}-{shape.frames}x{shape.height}x{shape.width}-{rate}-{source[:8]}-{fingerprint[:12]}"


def _source_digest(reader: ShardReader) -> str:
    text = "\n".join(f"{shard.name} {shard.sha256}" for _, shard in reader.shards)
    return hashlib.sha256(text.encode()).hexdigest()
