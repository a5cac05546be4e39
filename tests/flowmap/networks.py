"""Tiny networks behind the velocity seam, smooth in time, that differ by text row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_TEXTS = 5


class FrameNetwork(nn.Module):
    """Velocity over latents ``[n, F, C, 1, 1]``: frames see their own times, the text and the mean frame."""

    def __init__(self, channels: int = 3, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(2 * channels + 2 + 4, width, generator=generator) / 3)
        self.second = nn.Parameter(torch.randn(width, channels, generator=generator) / 3)
        self.texts: Tensor
        self.register_buffer("texts", torch.randn(NUM_TEXTS, 4, generator=generator))
        self.calls: list[tuple[int, ...]] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        self.calls.append(tuple(rows.tolist()))
        self.dtypes |= {z.dtype, t.dtype, r.dtype}
        dtype = self.first.dtype
        frames = z.shape[1]
        t, r = ((time if time.ndim == 2 else time[:, None].expand(-1, frames)) / 1000 for time in (t, r))
        flat = z.flatten(2)
        parts = [flat, flat.mean(dim=1, keepdim=True).expand_as(flat), t[..., None], r[..., None]]
        text = self.texts[rows.clamp(max=len(self.texts) - 1)][:, None].expand(-1, frames, -1)
        hidden = torch.cat([*(part.to(dtype) for part in parts), text.to(dtype)], dim=-1) @ self.first
        return (torch.tanh(hidden) @ self.second).reshape(z.shape)
