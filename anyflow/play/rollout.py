"""A video without an end, chunk by chunk: each is asked for with its own controls and its own number of steps.

What it keeps is bounded: the clean latents that a chunk can look back at, what was told of them, and the decoder's
features. Frames are numbered from the window's start, so a chunk an hour from the start costs what the first full one
did. The frames are those of :func:`anyflow.backbone.stream.stream_video` under the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat

import torch
from torch import Tensor

from anyflow.backbone.conditions import Conditions
from anyflow.backbone.control_feed import followed
from anyflow.evaluation.loaded import LoadedModel
from anyflow.evaluation.measure import take_of
from anyflow.flowmap.sampling import steps_of


class Rollout:
    """One video of a causal network that is told controls.

    Args:
        model: the network and its codec.
        caption: of the video.
        start: pixels of the first frame, uint8 ``[1, 1, H, W, 3]``; None: it is sampled too.
        seed: of the noise.
    """

    def __init__(self, model: LoadedModel, caption: str, start: Tensor | None = None, seed: int = 0) -> None:
        self._model, self._device = model, model.codec.device
        self._text = model.codec.encode_text([caption])
        guidance = model.guidance.way(model.backbone, model.codec)
        self._way = {"take": take_of(model.sampler, [caption], seed), **guidance}
        self._generator = torch.Generator().manual_seed(seed)
        self._start = None if start is None else model.given_latents(start)
        given = 0 if self._start is None else self._start.shape[1]
        pattern = model.backbone.transformer.config.chunk_partition
        begin = model.backbone.chunks_of(pattern[0] + len(pattern) * max(pattern) + max(pattern), given)
        self._sizes = chain(begin, repeat(max(pattern)))
        self._kept = len(pattern)  # of chunks: no window has more
        self._chunks: tuple[int, ...] = ()
        self._clean = torch.zeros(1, 0, *model.latent_shape[1:], device=self._device)
        self._told: Tensor | None = None
        self._next = next(self._sizes)
        self._steps = 1
        self._video = model.codec.decode_parts(self._latents())

    @property
    def next_frames(self) -> int:
        """Pixel frames of the next chunk: the start, or the first frame of all, is one with what is made with it."""
        factor = self._model.codec.temporal_factor
        return factor * self._next - (0 if self._chunks else factor - 1)

    @torch.no_grad()
    def chunk(self, controls: Tensor, num_steps: int) -> Tensor:
        """The frames of the next chunk, uint8 ``[n, H, W, 3]``.

        Args:
            controls: numbers of its :attr:`next_frames` pixel frames, float32 ``[n, W]``; NaN where they are not known.
            num_steps: of the sampler.
        """
        factor, part = self._model.codec.temporal_factor, controls[None].to(self._device)
        self._told = followed(self._told, part, factor)
        self._steps = num_steps
        return next(self._video)[0].cpu()

    def _latents(self) -> Iterator[Tensor]:
        """Clean latents of chunk after chunk, each made when it is asked for."""
        while True:
            is_given = self._start is not None and not self._chunks
            made = self._start if is_given else self._made()
            assert made is not None
            self._chunks = (*self._chunks, self._next)[-self._kept :]
            window = sum(self._chunks)
            self._clean = torch.cat([self._clean, made.to(self._clean)], dim=1)[:, -window:]
            assert self._told is not None
            self._told = self._told[:, -window:]
            self._next = next(self._sizes)
            yield made

    def _made(self) -> Tensor:
        new = torch.randn(1, self._next, *self._clean.shape[2:], generator=self._generator).to(self._device)
        noise = torch.cat([self._clean, new], dim=1)  # of given frames none is looked at
        conditions = Conditions(self._text, self._clean if self._chunks else None, self._told)
        steps = steps_of(self._steps, self._model.shift)
        chunks = [*self._chunks, self._next]
        *_, made = self._model.backbone.generate(conditions, noise, steps, chunks=chunks, **self._way)  # type: ignore[call-arg]
        return made
