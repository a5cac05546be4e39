"""A model that makes clips of prompts: loaded, with the way that it is sampled and the shape of its clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anyflow.backbone import stream
from anyflow.backbone.codec import Codec
from anyflow.backbone.guidance import Guidance
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.errors import UserError
from anyflow.evaluation import models
from anyflow.evaluation.measure import prompt_noise, take_of
from anyflow.evaluation.options import WayOptions
from anyflow.flowmap.samplers import SamplerKind


@dataclass(frozen=True)
class LoadedModel:
    """What makes clips.

    Attributes:
        backbone: the network.
        codec: its autoencoder and text encoder.
        shift: of its schedule.
        sampler: how its jumps are taken.
        guidance: of a network that has none in its weights.
        shape: of the clips.
    """

    backbone: FlowMapBackbone
    codec: Codec
    shift: float
    sampler: SamplerKind
    guidance: Guidance
    shape: ClipShape

    @classmethod
    def of(cls, model: str, way: WayOptions, shape: ClipShape) -> LoadedModel:
        """Load a model by folder or hub id.

        Raises:
            UserError: there is no such model, or it cannot be sampled this way.
        """
        sampler, guidance = models.way_of(model, way.sampler, way.guidance, way.negative, way.control_guidance)
        codec, backbone, shift = models.load_model(model, way.precision)
        return cls(backbone, codec, shift, sampler, guidance, shape)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one clip: ``(F, C, H, W)``."""
        return self.codec.latent_shape(self.shape.frames, self.shape.height, self.shape.width)

    @property
    def clips_at_once(self) -> int:
        """How many fit into one pass."""
        return self.backbone.clips_at_once(self.latent_shape)

    def calls(self, num_steps: int, num_given: int) -> int:
        """Network calls of a clip, of which so many latent frames are given."""
        return self.guidance.calls * self.backbone.calls_of(num_steps, self.latent_shape[0], num_given)

    def parts(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        num_steps: int,
        seed: int,
        given: Tensor | None = None,
        controls: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Clips uint8 ``[n, f, H, W, 3]``, chunk by chunk; their noise follows seed and key alone.

        Args:
            prompts: one a clip.
            keys: one a clip.
            num_steps: of the sampler.
            seed: of the noise.
            given: latents ``[n, k, C, H, W]`` that the clips begin with.
            controls: numbers of their pixel frames, float32 ``[n, F, W]``.
        """
        noise = prompt_noise(self.latent_shape, keys, seed).to(self.codec.device)
        way = {"take": take_of(self.sampler, keys, seed), **self.guidance.way(self.backbone, self.codec)}
        told = None if controls is None else controls.to(self.codec.device)
        asked = (list(prompts), noise, num_steps, self.shift, given, told)
        return stream.stream_video(self.backbone, self.codec, *asked, **way)

    def given_latents(self, pixels: Tensor) -> Tensor:
        """Given frames uint8 ``[n, F, H, W, 3]`` as latents."""
        return self.codec.encode_video(pixels.to(self.codec.device))


def given_pixels(path: Path, given: int, shape: ClipShape) -> Tensor:
    """The first frames of a picture or a video, uint8 ``[1, F, H, W, 3]``, scaled and cropped to the clip's size.

    Raises:
        UserError: it cannot be decoded, is too short, or leaves nothing to sample.
    """
    if given >= shape.frames:
        raise UserError(
            f"--given {given} leaves nothing to sample of {shape.frames} frames: give less, or more --frames"
        )
    fps = shape.fps if given > 1 else None
    try:
        frames = decode_clip(path.read_bytes(), dataclasses.replace(shape, frames=given, fps=fps))
    except DecodeError as error:
        raise UserError(f"{path}: {error}") from error
    return torch.from_numpy(frames)[None]
