"""What the rest of the project asks of a network: the mean velocity from ``t`` to ``r``, under conditions.

Shapes: B batch, F latent frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from anyflow.backbone.conditions import Conditions
from anyflow.backbone.context import ALONE, Context
from anyflow.backbone.options import Residual
from anyflow.backbone.segments import AttentionKind
from anyflow.flowmap.chunks import ChunkLayout
from anyflow.flowmap.sampling import Jump, Take, follow, steps_of, take_jump

Ask = Callable[..., Tensor]
"""Calls a network as its ``forward`` is called: the network itself, or one of its roles."""


TOKENS_AT_ONCE = 2**15
"""Up to so many tokens are sampled in one pass, and at least one clip. One of 81 x 480 x 832 fills it (32,760) and
occupies a GPU by itself: more at once take more memory and are no faster."""


class FlowMapBackbone(nn.Module):
    """A network that predicts mean velocities: a diffusers transformer in a wrapper that keeps its weights' names."""

    transformer: Any
    """The diffusers module: what is trained, sharded, saved and exported."""

    stored: Any = None
    """Weights still in their files (:class:`anyflow.backbone.load.StoredWeights`) while the network is on ``meta``."""

    compute: torch.dtype | None = None
    """Precision that the large layers compute in where it is not that of their weights, in training and in sampling
    alike. Times, the state that is sampled and what is returned stay float32. None where sharding sees to it."""

    residual: Residual = "auto"
    """Precision of what runs from block to block: see :class:`~anyflow.backbone.options.ParallelOptions`."""

    sharded_compute: torch.dtype | None = None
    """That precision where sharding sees to it."""

    context: Context = ALONE
    """The ranks that this network's calls share: each must make the same calls, and gets the whole answer."""

    def __call__(self, latents: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """:meth:`forward` in the network's precision, whoever asks."""
        if self.compute is None:
            return super().__call__(latents, *arguments, **options)
        with torch.autocast(latents.device.type, self.compute):
            return super().__call__(latents, *arguments, **options)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the bulk of the weights; times are float32 whatever it is."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        raise NotImplementedError

    def forward(self, latents: Tensor, timestep: Tensor, r_timestep: Tensor, conditions: Conditions) -> Tensor:
        """Mean velocity ``u(z, t, r, conditions)`` of the flow map ``z_r = z_t - (t - r) / 1000 * u``.

        Args:
            latents: ``[B, F, C, H, W]``.
            timestep: ``[B]`` when all frames share their time (cheaper), else ``[B, F]``; 0 is data, 1000 is noise.
            r_timestep: the time to go to, shaped like ``timestep``; equal to it for the instantaneous velocity.
            conditions: what each sample is told. Frames that are given stand in ``latents``, at time 0.

        Returns:
            ``[B, F, C, H, W]`` float32.
        """
        raise NotImplementedError

    is_causal = False
    """Whether it makes videos chunk by chunk."""

    attention: AttentionKind = "segments"
    """How a causal network's passes over chunks compute their masked attention (:mod:`anyflow.backbone.segments`)."""

    def draw_layout(self, num_frames: int, uniforms: Tensor, long_context: float) -> ChunkLayout | None:
        """Which frames of a clip a training pass looks at and how, from two uniforms; None: all of them at once.

        See :func:`anyflow.flowmap.chunks.draw_layout`; a pass with a layout is asked for with ``layout=``.
        """
        return None

    def chunks_of(self, num_frames: int, num_given: int = 0) -> tuple[int, ...]:
        """Frames of each part that a video of so many latent frames, the first of them given, is made in."""
        return (num_frames,)

    def calls_of(self, num_steps: int, num_frames: int, num_given: int = 0) -> int:
        """Network calls of a sample: the steps of each part that is made, and a look back from all but the first."""
        chunks = self.chunks_of(num_frames, num_given)
        made = [end - frames for frames, end in zip(chunks, accumulate(chunks), strict=True) if end > num_given]
        return num_steps * len(made) + sum(start > 0 for start in made)

    def clips_at_once(self, shape: Sequence[int]) -> int:
        """Clips of latents ``(F, C, H, W)`` that are sampled in one pass (:data:`TOKENS_AT_ONCE`); at least one.

        It depends on nothing else, so that ranks which share a network's weights agree.
        """
        frames, _, height, width = shape
        patch = self.transformer.config.patch_size
        tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
        return max(1, TOKENS_AT_ONCE // tokens)

    def fit_clip(self, num_frames: int) -> None:
        """Note that clips of so many latent frames are trained on, where the network's configuration says that."""

    def generate(
        self,
        conditions: Conditions,
        noise: Tensor,
        jumps: Sequence[Jump],
        *,
        ask: Ask | None = None,
        take: Take = take_jump,
    ) -> Iterator[Tensor]:
        """Follow the flow map from noise, and yield clean latents ``[B, f, C, H, W]`` part by part, as they are ready.

        The parts joined along the frames are the video. This network makes it in one part; a causal one in chunks.
        Gradients flow through the jumps of a part, unless the caller turns them off.

        Args:
            conditions: what each sample is told. Given frames come back as they are (image- or video-to-video).
            noise: standard normal ``[B, F, C, H, W]``.
            jumps: see :func:`anyflow.flowmap.sampling.steps_of` for a sampler's.
            ask: calls this network, in another role or guided (:mod:`anyflow.backbone.guidance`) perhaps.
            take: how each jump is taken; a network that is no flow map needs another way than its default.
        """
        asked = ask or self
        conditions, given = conditions.of_frames(slice(0, noise.shape[1])), conditions.first_frames
        yield follow(lambda z, t, r: asked(z, t, r, conditions), noise, jumps, first_frames=given, take=take)

    @torch.no_grad()
    def sample(
        self,
        conditions: Conditions,
        noise: Tensor,
        num_steps: int,
        shift: float,
        take: Take = take_jump,
        ask: Ask | None = None,
    ) -> Tensor:
        """The clean latents of a ``num_steps``-step sampler (sec. 6); the arguments are :meth:`generate`'s."""
        return torch.cat(list(self.generate(conditions, noise, steps_of(num_steps, shift), take=take, ask=ask)), dim=1)
