"""What is measured of a model: what is sampled, and how it is judged. Built once, and passed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from anyflow.backbone.guidance import UNGUIDED, Guidance
from anyflow.evaluation.curve import STEPS, HeldOut
from anyflow.flowmap.samplers import SamplerKind

Sampler = Callable[..., Tensor]
"""``(told, noise, num_steps, shift)`` to clean latents: a model's own sampler, text encoder included.

A model that is no flow map is also given ``take=``: how its jumps are taken.
"""

BATCH_SIZE = 8
"""Clips a pass of a curve, unless they are large or somebody asks for others."""


class Extractor(Protocol):
    """Features of clips, for distances between sets of them."""

    name: str
    """Of the figures: ``NAME_frechet`` and ``NAME_kernel``."""

    def __call__(self, clips: Tensor) -> Tensor:
        """Map uint8 clips ``[N, F, H, W, 3]`` to features ``[M, D]``, some for each clip."""


class Labels(Protocol):
    """Reads labels from clips: a probe."""

    def accuracies(self, clips: Tensor, items: Sequence[HeldOut]) -> Mapping[str, float]:
        """By name of the figure, the share of clips whose label, read from the pixels, is the one asked for."""


class ControlReader(Labels, Protocol):
    """Reads controls back from pixels: :class:`anyflow.evaluation.control_probe.ControlProbe`."""

    def partners(self, items: Sequence[HeldOut]) -> list[int] | None:
        """For each prompt the one whose controls differ most from its own; None: none can be compared."""

    def gap(
        self, clips: Tensor, swapped: Tensor, items: Sequence[HeldOut], partners: Sequence[int]
    ) -> tuple[float, float | None]:
        """How much farther clips under their partners' controls are from their own; and as a share of the whole."""


class CurveCodec(Protocol):
    """The part of the codec that a curve needs."""

    def encode_video(self, video: Tensor) -> Tensor:
        """Map uint8 clips ``[B, F, H, W, 3]`` to latents ``[B, f, C, h, w]``."""

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents to uint8 clips."""


@dataclass(frozen=True)
class SampledModel:
    """What samples.

    Attributes:
        sampler: the model's.
        codec: encodes and decodes; frozen.
        device: where both run.
        calls: network calls of a clip by steps, latent frames and given ones (a backbone's ``calls_of``).
    """

    sampler: Sampler
    codec: CurveCodec
    device: torch.device | str = "cpu"
    calls: Callable[[int, int, int], int] = lambda num_steps, num_frames, num_given: num_steps


@dataclass(frozen=True)
class Judges:
    """What judges samples besides the figures that are always measured.

    Attributes:
        extractors: of further distances.
        labels: of further accuracies.
        notes: what is to be said of them.
        controls: of the labels the one that reads controls back; None: none does.
    """

    extractors: Sequence[Extractor] = ()
    labels: Sequence[Labels] = ()
    notes: Sequence[str] = ()
    controls: ControlReader | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How prompts are sampled and judged; of two models that are compared, all but ``sampler`` is the same.

    Attributes:
        label: names the curve in tables and plots.
        steps: step counts, each of the inference schedule of ``shift``.
        shift: of that schedule.
        seeds: of the noise; every prompt is sampled with each of them, the real clips are encoded once.
        given_frames: latent frames that are given from each prompt's own clip: 1 is image-to-video.
        left_out: latent frames that comparisons leave out beyond those that are given: what another model is given.
        sampler: how the model takes its jumps.
        guidance: of a network that has none in its weights; each call then counts as so many of the network's.
        batch_size: clips a pass, at most; changes speed and memory, not the draws.
        show: of how many prompts (the first) the samples are kept for the picture.
        judges: further ones.
    """

    label: str = "after"
    steps: Sequence[int] = STEPS
    shift: float = 5.0
    seeds: Sequence[int] = (0,)
    given_frames: int = 0
    left_out: int = 0
    sampler: SamplerKind = "flowmap"
    guidance: Guidance = UNGUIDED
    batch_size: int = BATCH_SIZE
    show: int = 6
    judges: Judges = Judges()
