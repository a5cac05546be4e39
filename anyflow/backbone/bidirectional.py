"""The bidirectional flow-map network: all frames at once, every token attending to every token.

It is diffusers' ``AnyFlowTransformer3DModel``, its weights and their names untouched. The outer pass is written anew,
so that times shared by all frames are not repeated over tokens, times stay in float32 and padding is folded. The blocks
are the stock modules, called as modules: sharding hooks, adapters and activation checkpointing work on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import AnyFlowTransformer3DModel
from torch import Tensor, nn

from anyflow.backbone.attention import (
    Memory,
    Recorder,
    RotaryTable,
    SelfAttentionProcessor,
    install_processors,
    rotary_table,
    with_spare_token,
)
from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.context import Share
from anyflow.backbone.controls import MODULE as CONTROLS
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.segments import SegmentMask

FLOAT32_PARTS = (
    "time_embedder",
    "delta_embedder",
    "time_proj",
    "delta_emb_gate",
    "scale_shift_table",
    "norm2",
    CONTROLS,
    "lora_",
    "absmax",
    "levels",
)
"""Parameters whose names contain one of these stay float32 at any precision.

In bfloat16 t + 5 and t - 5 often round to the same embedding, which ruins the finite difference; adapters in bfloat16
swallow small updates. Together they are under 2 % of the weights."""


ALL = slice(None)


class BidirectionalBackbone(FlowMapBackbone):
    """Wraps an ``AnyFlowTransformer3DModel``; see :class:`~anyflow.backbone.protocol.FlowMapBackbone` for the call."""

    self_attention: type[SelfAttentionProcessor] = SelfAttentionProcessor

    def __init__(self, transformer: AnyFlowTransformer3DModel, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        if transformer.config.image_dim is not None:
            raise ValueError("a transformer with image embeddings (image_dim) cannot serve as a flow-map backbone")
        self.transformer = transformer
        self._rotary_tables: dict[tuple[tuple[int, int, int], torch.device], RotaryTable] = {}
        install_processors(transformer, self.self_attention)
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.patch_embedding.weight.device

    def forward(self, latents: Tensor, timestep: Tensor, r_timestep: Tensor, conditions: Conditions) -> Tensor:
        return self._frames_at_once(latents, timestep, r_timestep, conditions)

    def _frames_at_once(
        self,
        latents: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        conditions: Conditions,
        start: int = 0,
        memories: Sequence[Memory] | None = None,
    ) -> Tensor:
        """Frames of which every token sees every other; they stand at frame ``start``, after those of ``memories``."""
        check_times(latents, timestep, r_timestep)
        hidden = in_float32(self.transformer.patch_embedding, latents.transpose(1, 2))
        frames, height, width = hidden.shape[2:]
        hidden = hidden.flatten(2).transpose(1, 2)  # [B, L, dim], L = frames * height * width
        share = self.context.share(hidden.shape[1])
        time, modulation = self._embed_times(timestep, r_timestep, height * width, conditions.controls, share)
        table = self._rotary_table((start + frames, height, width), hidden.device)
        rotary: Any = tuple(share.own(part[:, -share.tokens :]) for part in table)
        hidden = share.own(hidden)
        hidden = self._through_blocks(hidden, conditions.text, modulation, rotary, share.under(None), memories)
        return self._read_out(hidden, time, (frames, height, width), share)

    def _through_blocks(
        self,
        hidden: Tensor,
        text: Text,
        modulation: Tensor,
        rotary: RotaryTable,
        mask: SegmentMask | Share | None = None,
        memories: Sequence[Memory | Recorder] | None = None,
    ) -> Tensor:
        """Tokens ``[B, L, dim]`` through all blocks; ``mask`` and ``memories`` (one a block) are for self-attention."""
        net = self.transformer
        hidden = hidden.to(self._stream_dtype)
        text = with_spare_token(text)
        text = text._replace(embeddings=net.condition_embedder.text_embedder(text.embeddings.to(self.dtype)))
        checkpointing = net.gradient_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(net.blocks):
            arguments = (hidden, text, modulation, rotary, mask, *(() if memories is None else (memories[index],)))
            hidden = net._gradient_checkpointing_func(block, *arguments) if checkpointing else block(*arguments)
        return hidden

    def _read_out(
        self,
        hidden: Tensor,
        time: Tensor,
        grid: tuple[int, int, int],
        share: Share,
        asked: slice = ALL,
    ) -> Tensor:
        """Velocities ``[B, F, C, H, W]`` float32 of the tokens of a sequence that are ``asked`` for.

        ``hidden`` are this rank's; ``time`` is their embedding ``[B, 1 or L, dim]``.
        """
        if share.is_whole:
            hidden, time = hidden[:, asked], time if time.shape[1] == 1 else time[:, asked]
        net = self.transformer
        checkpointing = net.gradient_checkpointing and torch.is_grad_enabled()
        project = partial(net._gradient_checkpointing_func, self._project) if checkpointing else self._project
        projected: Tensor = project(hidden, time)
        tokens = share.whole(projected)
        return self._unpatchify(tokens if share.is_whole else tokens[:, asked], *grid)

    def _project(self, hidden: Tensor, time: Tensor) -> Tensor:
        """The last norm and layer, in float32: activations that a checkpointed pass need not keep."""
        net = self.transformer
        shift, scale = (net.scale_shift_table[None] + time[:, :, None]).unbind(2)
        return in_float32(net.proj_out, net.norm_out(hidden.float()) * (1 + scale) + shift)

    @property
    def _stream_dtype(self) -> torch.dtype:
        """Precision of what runs from block to block: see :class:`~anyflow.backbone.options.ParallelOptions`."""
        if self.residual == "float32" or (self.residual == "auto" and not torch.is_grad_enabled()):
            return torch.promote_types(self.dtype, torch.float32)
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.sharded_compute or self.dtype

    def _embed_times(
        self,
        timestep: Tensor,
        r_timestep: Tensor,
        tokens_per_frame: int | Sequence[int],
        controls: Tensor | None = None,
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embedding ``[B, N, dim]`` and modulation ``[B, N, 6, dim]``, float32, of times and controls.

        N is 1, or L (this rank's tokens) where frames differ: for times ``[B, F]``, or controls ``[B, F, P, W]`` of a
        network that knows such. ``tokens_per_frame`` is one number, or one a frame where they differ.
        """
        embedder = self.transformer.condition_embedder
        second = r_timestep if embedder.deltatime_type == "r" else timestep - r_timestep
        with torch.autocast(timestep.device.type, enabled=False):
            time = _embed(embedder.timesteps_proj, embedder.time_embedder, timestep)
            delta = _embed(embedder.timesteps_proj, embedder.delta_embedder, second)
            gate = embedder.delta_emb_gate
            embedding = (1 - gate) * time + gate * delta
            embedding = embedding[:, None] if timestep.ndim == 1 else embedding
            if (embed := getattr(embedder, CONTROLS, None)) is not None:
                told = embed.nothing(len(timestep)) if controls is None else controls
                embedding = embedding + embed(told)
            project = embedder.time_proj
            modulation = project(embedder.act_fn(embedding).to(project.weight.dtype)).float().unflatten(-1, (6, -1))
        frames = embedding.shape[1]
        if timestep.ndim == 1 and (embed is None or controls is None):
            return embedding, modulation
        each = [tokens_per_frame] * frames if isinstance(tokens_per_frame, int) else list(tokens_per_frame)
        repeats, total = torch.tensor(each, device=timestep.device), sum(each)  # the total: nothing waits for a device
        frame = torch.arange(frames, device=timestep.device).repeat_interleave(repeats, output_size=total)
        frame = frame if share is None else share.own(frame[None])[0]
        return embedding.index_select(1, frame), modulation.index_select(1, frame)

    def _rotary_table(self, grid: tuple[int, int, int], device: torch.device) -> RotaryTable:
        key = (grid, device)
        if key not in self._rotary_tables:
            layout = {"total_frames": grid[0], "full_frame_shape": grid[1:]}
            self._rotary_tables[key] = rotary_table(self.transformer.rope, device, layout_cfg=layout)
        return self._rotary_tables[key]

    def _unpatchify(self, tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
        """``[B, L, pf * ph * pw * C]`` to ``[B, F, C, H, W]``."""
        patch_frames, patch_height, patch_width = self.transformer.config.patch_size
        grid = tokens.unflatten(1, (frames, height, width)).unflatten(-1, (patch_frames, patch_height, patch_width, -1))
        grid = grid.permute(0, 1, 4, 7, 2, 5, 3, 6)  # [B, f, pf, C, h, ph, w, pw]
        return grid.reshape(len(grid), frames * patch_frames, -1, height * patch_height, width * patch_width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BidirectionalBackbone:
        """Let ``.to(bfloat16)`` and its like, called here or on a parent, leave the FLOAT32_PARTS in float32."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        kept = {id(tensor) for name, tensor in tensors if any(part in name for part in FLOAT32_PARTS)}

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in kept and moved.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(keep_float32, recurse)


def in_float32(layer: nn.Module, inputs: Tensor) -> Tensor:
    """A small layer in float32 (or its own precision if that is wider), whatever its weights are kept in.

    What enters and leaves the network is rounded nowhere else: a finite difference is of the last bits of both. So a
    GPU's convolutions must not round to TF32 either, as they do unless they are told not to.
    """
    weights = dict(layer.named_parameters())
    dtype = torch.promote_types(torch.float32, next(iter(weights.values())).dtype)
    with torch.autocast(inputs.device.type, enabled=False), _whole_convolutions(inputs.is_cuda):
        if all(weight.dtype == dtype for weight in weights.values()):
            return layer(inputs.to(dtype))  # type: ignore[no-any-return]
        wide = {name: weight.to(dtype) for name, weight in weights.items()}
        return torch.func.functional_call(layer, wide, inputs.to(dtype))  # type: ignore[no-any-return]


@contextmanager
def _whole_convolutions(on_gpu: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and not on_gpu
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check_times(latents: Tensor, timestep: Tensor, r_timestep: Tensor) -> None:
    """Refuse times of another shape than the protocol's."""
    if timestep.shape != r_timestep.shape or timestep.shape not in (latents.shape[:1], latents.shape[:2]):
        raise ValueError(
            f"timestep {tuple(timestep.shape)} and r_timestep {tuple(r_timestep.shape)} must both be [B] or [B, F] "
            f"of latents {tuple(latents.shape)}"
        )


def _embed(sinusoids: Any, embedder: Any, time: Tensor) -> Tensor:
    """Embed times ``[...]`` as ``[..., dim]`` in float32."""
    features = sinusoids(time.flatten())  # float32
    weight = embedder.linear_1.weight
    return embedder(features.to(weight.dtype)).float().unflatten(0, time.shape)
