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
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.locks import locked
from anyflow.data.reader import TAR_BLOCK, ShardReader, check_length, find_split
from anyflow.data.shards import (
    INDEX_NAME,
    Sample,
    Shard,
    ShardIndex,
    shard_from_dict,
    shard_to_dict,
    write_durably,
    write_tar,
)
from anyflow.data.stream import Skip, enforce_budget
from anyflow.errors import UserError

CACHE_FILE = "cache.json"
CACHE_VERSION = 1
CLIPS_PER_SHARD = 256
"""Clips of the footage that one shard of latents is made from: what is lost when encoding is broken off."""

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
        The cache's folder; it appears whole or not at all. Broken off, encoding goes on after the last whole shard;
        of several processes one encodes and the others wait for it.

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
        with locked(parent / f".{folder.name}.lock"):
            if _is_whole(folder, fingerprint):
                return folder
            partial = parent / f".{folder.name}.part"
            partial.mkdir(exist_ok=True)
            encoder = _Encoder(reader, codec, shape, skipped, progress, error_budget)
            index = ShardIndex(tuple(encoder.shards(partial)))
            if not index.shards:
                raise UserError(f"card {str(card)!r}: no clip of its split {split!r} can be encoded")
            write_durably(partial / INDEX_NAME, json.dumps(index.to_dict(), separators=(",", ":")).encode())
            first = _read_latents(ShardReader([partial]), 0, 0)
            cache = LatentCache(fingerprint, source, shape, first.shape, tuple(skipped))
            write_durably(partial / CACHE_FILE, json.dumps({"version": CACHE_VERSION, **asdict(cache)}).encode())
            for note in partial.glob("*.done"):
                note.unlink()
            partial.rename(folder)
        (parent / f".{folder.name}.lock").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"the latent cache {str(folder)!r} cannot be written: {error.strerror or error}") from error
    for skip in skipped:
        log.warning("not encoded: %s", skip)
    log.info("encoded %d clips into %s, %d bytes", index.count, folder, index.bytes)
    return folder


@dataclass(frozen=True)
class EncodingCost:
    """What encoding a split takes, from one clip: clips, bytes on disk, seconds on this machine."""

    clips: int
    bytes: int
    seconds: float


def estimate_cost(card: str | Path, split: str, codec: VideoEncoder, shape: ClipShape) -> EncodingCost:
    """Encode the first usable clip twice, once to warm up, and multiply.

    Raises:
        UserError: the data are missing, or none of the first clips can be used.
    """
    footage = find_split(card, split)
    check_length(footage, shape)
    encoder = _Encoder(ShardReader([footage.folder], [footage.caption]), codec, shape, [], None, 1.0)
    for number in range(min(len(encoder.places), 20)):
        for _, parts in encoder.samples(range(number, number + 1)):
            started = time.perf_counter()
            list(encoder.samples(range(number, number + 1)))
            seconds = time.perf_counter() - started
            size = sum(map(len, parts.values())) + 3 * TAR_BLOCK
            return EncodingCost(len(encoder.places), len(encoder.places) * size, len(encoder.places) * seconds)
    raise UserError(f"card {str(card)!r}: none of the first clips of its split {split!r} can be encoded")


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


class _Encoder:
    """Encodes footage shard by shard; a shard that was whole when an earlier run broke off is taken over."""

    def __init__(
        self,
        reader: ShardReader,
        codec: VideoEncoder,
        shape: ClipShape,
        skipped: list[Skip],
        progress: Callable[[int, int], None] | None,
        error_budget: float,
    ) -> None:
        self.reader, self.codec, self.shape = reader, codec, shape
        self.skipped, self.progress, self.error_budget = skipped, progress, error_budget
        self.places = [(number, sample) for number, (_, shard) in enumerate(reader.shards) for sample in shard.samples]

    def shards(self, partial: Path) -> Iterator[Shard]:
        """Write the shards of latents in ``partial``, in the index's order; one without a usable clip is left out."""
        for number, start in enumerate(range(0, len(self.places), CLIPS_PER_SHARD)):
            tar, note = partial / f"latents-{number:06d}.tar", partial / f"latents-{number:06d}.done"
            done = _taken_over(tar, note)
            if done is not None:
                shard, skipped = done
                self.skipped += skipped
                enforce_budget(self.skipped, start + CLIPS_PER_SHARD, len(self.places), self.error_budget)
            else:
                before = len(self.skipped)
                shard = write_tar(self.samples(range(start, min(start + CLIPS_PER_SHARD, len(self.places)))), tar)
                facts = {"shard": shard_to_dict(shard), "skipped": [asdict(skip) for skip in self.skipped[before:]]}
                write_durably(note, json.dumps(facts).encode())
            if shard.samples:
                yield shard
            else:
                tar.unlink()

    def samples(self, numbers: range) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, members) of every usable clip."""
        for number in numbers:
            shard, sample = self.places[number]
            try:
                yield sample.key, self._encoded(shard, sample)
            except DecodeError as error:
                self.skipped.append(Skip(self.reader.shards[shard][1].name, sample.key, str(error)))
                enforce_budget(self.skipped, number + 1, len(self.places), self.error_budget)
                continue
            if self.progress is not None:
                self.progress(number + 1, len(self.places))

    def _encoded(self, shard: int, sample: Sample) -> dict[str, bytes]:
        from safetensors.numpy import save

        description = self.reader.describe(shard, sample)
        frames = decode_clip(self.reader.read(shard, sample, "mp4"), self.shape)
        latents = self.codec.encode_video(torch.from_numpy(frames)[None])[0].half().cpu().numpy()
        text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return {"safetensors": save({"latents": latents}), "json": text.encode()}


def _taken_over(tar: Path, note: Path) -> tuple[Shard, list[Skip]] | None:
    """A shard that is whole, and the clips that it leaves out."""
    try:
        facts = json.loads(note.read_text())
        shard = shard_from_dict(facts["shard"])
        whole = not shard.samples or tar.stat().st_size == shard.bytes
        return (shard, [Skip(**skip) for skip in facts["skipped"]]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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


def _cache_name(name: str, split: str, shape: ClipShape, source: str, fingerprint: str) -> str:
    rate = f"{shape.fps:g}fps" if shape.fps else "own-fps"
    return f"{name}-{split}-{shape.frames}x{shape.height}x{shape.width}-{rate}-{source[:8]}-{fingerprint[:12]}"


def _source_digest(reader: ShardReader) -> str:
    text = "\n".join(f"{shard.name} {shard.sha256}" for _, shard in reader.shards)
    return hashlib.sha256(text.encode()).hexdigest()
