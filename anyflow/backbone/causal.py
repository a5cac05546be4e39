"""The causal flow-map network (FAR): a video chunk by chunk, each after the clean chunks before it (sec. 5).

It is diffusers' ``AnyFlowFARTransformer3DModel``, its weights and their names untouched: the bidirectional network and
a second patch embedding that compresses old frames. One network, three ways to ask it:

* without a layout: all frames at once, every token attending to every token; the bidirectional mode.
* with a :class:`~anyflow.flowmap.chunks.ChunkLayout`: chunks in one pass under a mask. With noisy frames this is the
  teacher-forced training pass; without, and with ``record``, it takes down what later chunks will look back at.
* with a :class:`Window`: one chunk, looking back at what was taken down.

The window of a chunk is new memory, made without gradient from clean frames and never written to again. So gradients
under checkpointing are exact, and each answer equals that of the one-pass mode.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AnyFlowFARTransformer3DModel
from torch import Tensor

from anyflow.backbone.attention import Memory, Recorder, RotaryTable, SelfAttentionProcessor, rotary_table
from anyflow.backbone.bidirectional import BidirectionalBackbone, check_times, in_float32
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.far_pipeline import ExactFARAttnProcessor
from anyflow.backbone.protocol import Ask
from anyflow.backbone.segments import AttentionKind, segment_mask
from anyflow.flowmap.chunks import ChunkLayout, draw_layout, layout_of, partition_frames
from anyflow.flowmap.sampling import BoundVelocity, Jump, Take, follow_chunks, take_jump


@dataclass(frozen=True)
class Window:
    """What a chunk looks back at: keys and values of earlier clean frames, one memory a block."""

    layout: ChunkLayout
    memories: tuple[Memory, ...]


class CausalAttentionProcessor(SelfAttentionProcessor):
    """This project's self-attention; given a pipeline's arguments, the stock one without its padding."""

    def __init__(self) -> None:
        self._stock = ExactFARAttnProcessor()

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(kwargs.get("rotary_emb"), dict):
            return self._stock(attn, hidden_states, *args, **kwargs)
        return super().__call__(attn, hidden_states, *args, **kwargs)


class CausalBackbone(BidirectionalBackbone):
    """Wraps an ``AnyFlowFARTransformer3DModel``.

    Args:
        transformer: diffusers' module.
        gradient_checkpointing: recompute blocks in the backward pass.
        attention: how the one-pass mode computes its masked attention; see :mod:`anyflow.backbone.segments`.
    """

    self_attention = CausalAttentionProcessor
    is_causal = True

    def __init__(
        self,
        transformer: AnyFlowFARTransformer3DModel,
        gradient_checkpointing: bool = False,
        attention: AttentionKind = "segments",
    ) -> None:
        super().__init__(transformer, gradient_checkpointing)
        config = transformer.config
        if config.patch_size[0] != 1 or config.compressed_patch_size[0] != 1 or config.full_chunk_limit < 1:
            raise ValueError("a causal network needs patches of one frame and a full_chunk_limit of at least 1")
        self.attention = attention
        self._chunk_tables: dict[tuple[Any, ...], RotaryTable] = {}

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        conditions: Conditions,
        *,
        layout: ChunkLayout | None = None,
        window: Window | None = None,
        record: Sequence[Recorder] | None = None,
    ) -> Tensor:
        """See :class:`~anyflow.backbone.protocol.FlowMapBackbone`; besides, one of these.

        Args:
            latents: ``[B, F, C, H, W]``: a video; with ``layout`` the frames that it names; with ``window`` a chunk.
            timestep: as in the protocol.
            r_timestep: as in the protocol.
            conditions: as in the protocol.
            layout: of a pass over chunks. Velocities of given frames come back as zeros.
            window: what the chunk looks back at.
            record: with ``layout``, takes down the keys and values of each block.
        """
        if layout is not None:
            return self._chunks_at_once(latents, timestep, r_timestep, conditions, layout, record)
        if window is not None:
            start = window.layout.num_frames
            return self._frames_at_once(latents, timestep, r_timestep, conditions, start, window.memories)
        return self._frames_at_once(latents, timestep, r_timestep, conditions)

    def _chunks_at_once(
        self,
        latents: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        conditions: Conditions,
        layout: ChunkLayout,
        record: Sequence[Recorder] | None,
    ) -> Tensor:
        """The frames of a layout in one pass under the mask of chunks."""
        check_times(latents, timestep, r_timestep)
        if latents.shape[1] != layout.num_frames:
            raise ValueError(f"latents have {latents.shape[1]} frames, {layout} has {layout.num_frames}")
        net, context = self.transformer, layout.context_frames
        grid, far_grid = (
            (latents.shape[3] // patch[1], latents.shape[4] // patch[2])
            for patch in (net.config.patch_size, net.config.compressed_patch_size)
        )
        tokens, far_tokens = grid[0] * grid[1], far_grid[0] * far_grid[1]
        video = latents.transpose(1, 2)
        parts = [in_float32(net.far_patch_embedding, video[:, :, :context])] if context else []
        parts += [in_float32(net.patch_embedding, video[:, :, context:])] if layout.full else []
        hidden = torch.cat([part.flatten(2) for part in parts], dim=2).transpose(1, 2)
        del parts  # as large as the whole sequence, of which a rank may go on with its share

        sizes = [far_tokens] * context + [tokens] * (layout.num_frames - context)
        share = self.context.share(sum(sizes))
        time, modulation = self._embed_times(timestep, r_timestep, sizes, conditions.controls, share)
        mask = segment_mask(layout, tokens, far_tokens, self.attention)
        table = self._chunk_table(layout, grid, far_grid, hidden.device)
        rotary: Any = tuple(map(share.own, table))
        hidden = share.own(hidden)
        hidden = self._through_blocks(hidden, conditions.text, modulation, rotary, share.under(mask), record)
        if not layout.noisy:
            return torch.zeros_like(latents, dtype=torch.float32)  # clean frames have nowhere to go

        first = context * far_tokens
        noisy = slice(first, first + layout.full_frames * tokens)
        velocity = self._read_out(hidden, time, (layout.full_frames, *grid), share, noisy)
        return F.pad(velocity, (0, 0, 0, 0, 0, 0, context, layout.full_frames))

    # Chunk by chunk ---------------------------------------------------------------------------------------------------

    def chunks_of(self, num_frames: int, num_given: int = 0) -> tuple[int, ...]:
        return partition_frames(num_frames, self.transformer.config.chunk_partition, num_given)

    def generate(
        self,
        conditions: Conditions,
        noise: Tensor,
        jumps: Sequence[Jump],
        *,
        ask: Ask | None = None,
        take: Take = take_jump,
        chunks: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Chunk by chunk, each after the window behind it; see the protocol's.

        A video longer than those trained on moves its window: the oldest chunks drop out of it, and frames are
        numbered from its start, so neither time nor memory of a chunk grow any further. The chunk before always stays.

        Args:
            conditions: as in the protocol; given frames fill the first chunks, and sampling starts after them.
            noise: as in the protocol.
            jumps: of every chunk.
            ask: as in the protocol.
            take: as in the protocol. A window is made again where a jump is taken again: only one lies in memory.
            chunks: frames of each chunk; None: :meth:`chunks_of`.
        """
        chunks = chunks or self.chunks_of(noise.shape[1], conditions.num_given)
        longest = max(sum(self.transformer.config.chunk_partition), max(chunks))
        asked = ask or self

        newest = lru_cache(maxsize=1)(lambda look: look())  # windows are large: one is kept
        ends = list(accumulate(chunks))
        done = 0

        def after(clean: Tensor, behind: Sequence[int]) -> BoundVelocity:
            own = conditions.of_frames(slice(done, ends[bisect(ends, done)]))
            earlier = conditions.of_frames(slice(done - clean.shape[1], done))
            look = partial(self.look_back, clean, behind, earlier, ask)
            return lambda z, t, r: asked(z, t, r, own, window=newest(look))

        for part in follow_chunks(after, noise, jumps, chunks, conditions.first_frames, take, longest):
            done += part.shape[1]
            yield part

    def draw_layout(self, num_frames: int, uniforms: Tensor, long_context: float) -> ChunkLayout:
        limit = self.transformer.config.full_chunk_limit
        return draw_layout(uniforms, self.chunks_of(num_frames), limit, long_context)

    def fit_clip(self, num_frames: int) -> None:
        self.transformer.register_to_config(chunk_partition=list(self.chunks_of(num_frames)))

    @torch.no_grad()
    def look_back(
        self, clean: Tensor, chunks: Sequence[int], conditions: Conditions, ask: Ask | None = None
    ) -> Window | None:
        """The window of the next chunk: the last chunks at full resolution, older ones compressed; without gradient.

        Args:
            clean: latents ``[B, F, C, H, W]`` of the frames before, from the window's first on.
            chunks: their chunks.
            conditions: what each sample is told, of these frames.
            ask: calls this network, in another role perhaps.
        """
        if not chunks:
            return None
        layout = layout_of(chunks, self.transformer.config.full_chunk_limit - 1, noisy=False)
        record = [Recorder() for _ in self.transformer.blocks]
        zeros = torch.zeros(len(clean), device=clean.device)
        (ask or self)(clean, zeros, zeros, conditions, layout=layout, record=record)
        return Window(layout, tuple(recorder.memory for recorder in record))

    def _rotary_table(self, grid: tuple[int, int, int], device: torch.device) -> RotaryTable:
        return self._chunk_table(ChunkLayout((), grid[:1], noisy=False), grid[1:], (0, 0), device)

    def _chunk_table(
        self, layout: ChunkLayout, grid: tuple[int, int], far_grid: tuple[int, int], device: torch.device
    ) -> RotaryTable:
        """Angles of a layout's tokens; a noisy frame and its clean copy have the same."""
        key = (layout, grid, far_grid, device)
        if key not in self._chunk_tables:
            stock = {
                "total_frames": layout.context_frames + layout.full_frames,
                "num_compressed_frames": layout.context_frames,
                "full_frame_shape": grid,
                "compressed_frame_shape": far_grid,
            }
            copies = layout if layout.noisy else None  # the stock module asks no more than whether there are copies
            self._chunk_tables[key] = rotary_table(
                self.transformer.rope, device, far_cfg=stock, clean_hidden_states=copies
            )
        return self._chunk_tables[key]
