"""The memory of clips in the autoencoder without the device: its own loops, on tensors without contents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode

from anyflow.backbone.codec import ONE_PASS_PIXELS, Codec, codec_dtypes
from anyflow.backbone.embedded import build_vae
from anyflow.backbone.layout import vae_config_of
from anyflow.evaluation.heldout import clips_a_pass
from anyflow.memory.peak import Peak
from anyflow.memory.phases import CodecWork
from anyflow.recipe import Recipe

FRAMES = (9, 17)
"""Frames that a long clip is simulated with: the loop's peak grows linearly in them."""


def codec_work(recipe: Recipe, rows: int) -> CodecWork:
    """What a run's clips take in the autoencoder; ``rows`` are the clips of a curve that a rank samples in one pass."""
    dtype, _ = codec_dtypes(recipe.hardware.precision)
    config = _config(recipe)
    own, *further = recipe.data.shapes
    batch = recipe.data.batch_size
    budget = batch * _pixels(own)
    # of a smaller shape a batch has as many clips as fit
    batches = [(own, batch), *((shape, max(1, budget // _pixels(shape))) for shape in further)]
    return CodecWork(
        batch=max(_encoding(config, dtype, shape, clips) for shape, clips in batches),
        clip=max(_encoding(config, dtype, shape, 1) for shape, _ in batches),
        curve=max(_encoding(config, dtype, own, rows), _decoding(config, dtype, own, rows)),
    )


def rows_of_curve(recipe: Recipe, fitting: int) -> int:
    """Clips of a curve that each rank samples in one pass, where ``fitting`` fit."""
    ranks = recipe.data_ranks
    return -(-min(clips_a_pass(fitting, ranks), max(recipe.sampling.prompts, ranks)) // ranks)


Shape = tuple[int, int, int]
"""Frames, height, width, in pixels."""


def _pixels(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2]


def _config(recipe: Recipe) -> str:
    """The autoencoder's configuration as JSON, from its folder or published name, or that of Wan 2.1."""
    known = vae_config_of(recipe.model.codec or recipe.model.weights)
    embedded = {"of": "embedded"} if "tiny" in recipe.model.name else {}
    return json.dumps(embedded if known is None else known)


def _encoding(config: str, dtype: torch.dtype, shape: Shape, clips: int) -> float:
    return _work(config, dtype, shape, clips)[0]


def _decoding(config: str, dtype: torch.dtype, shape: Shape, clips: int) -> float:
    return _work(config, dtype, shape, clips)[1]


def _work(config: str, dtype: torch.dtype, shape: Shape, clips: int) -> tuple[float, float]:
    """Bytes to encode and to decode clips, which go in passes of as many as fit; the others wait as pixels."""
    frames, height, width = shape
    with _blank(config, dtype) as codec:
        at_once = min(clips, codec.clips_at_once(*shape))
    waiting = (clips - at_once) * 3 * _pixels(shape)
    if frames <= FRAMES[1] or at_once * FRAMES[0] * height * width <= ONE_PASS_PIXELS:
        passes = _pass(config, dtype, shape, at_once)
    else:
        low, high = (_pass(config, dtype, (few, height, width), at_once) for few in FRAMES)
        steps = (frames - FRAMES[0]) / (FRAMES[1] - FRAMES[0])
        passes = (low[0] + (high[0] - low[0]) * steps, low[1] + (high[1] - low[1]) * steps)
    return passes[0] + waiting, passes[1] + waiting


@lru_cache(maxsize=64)
def _pass(config: str, dtype: torch.dtype, shape: Shape, clips: int) -> tuple[float, float]:
    """Peaks of one pass in bytes, to encode and to decode."""
    frames, height, width = shape
    with _blank(config, dtype) as codec:
        video = torch.empty(clips, frames, height, width, 3, dtype=torch.uint8)
        latents = torch.empty(clips, *codec.latent_shape(frames, height, width))
        peaks = []
        for work, given in ((codec.encode_video, video), (codec.decode, latents)):
            tracker = Peak()
            for weight in codec.parameters():
                tracker.count(weight)
            weights = tracker.live
            tracker.count(given)
            with tracker:
                work(given, clips)
            peaks.append(float(tracker.peak - weights))
    return peaks[0], peaks[1]


@contextmanager
def _blank(config: str, dtype: torch.dtype) -> Iterator[Codec]:
    """The codec without contents, and without its text encoder."""
    fields: dict[str, Any] = {name: value for name, value in json.loads(config).items() if not name.startswith("_")}
    usual = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            vae = build_vae(0) if fields.pop("of", None) else AutoencoderKLWan(**fields)
        finally:
            torch.set_default_dtype(usual)
        yield Codec(vae)
