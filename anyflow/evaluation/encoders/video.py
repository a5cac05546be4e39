"""Features of clips by a published video encoder (VideoMAE, ViViT, TimeSformer, V-JEPA ...) from a local folder.

The folder is a transformers one; safetensors alone are read, and no code that comes with it is run. Its features make
distances that other people's evaluations can be compared with, where the domain is natural video.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from anyflow.errors import UserError, first_line

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of colours, for an encoder that does not say its own."""


def read_config(folder: Path, where: str) -> tuple[Any, int, tuple[int, int]]:
    """An encoder's configuration, the frames that it takes, and their height and width, before weights are loaded.

    Raises:
        UserError: the folder holds no encoder of videos, or no safetensors.
    """
    from transformers import AutoConfig
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    with _told(where, folder):
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    frames = int(getattr(config, "num_frames", 0) or getattr(config, "frames_per_clip", 0))
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    if not frames or size is None:
        raise UserError(f"{where} {folder} ({config.model_type}) takes no videos: give an encoder of clips")
    if not any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise UserError(f"{where} {folder} has no {SAFE_WEIGHTS_NAME}: pickled weights are not loaded, convert them")
    return config, frames, (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@contextmanager
def _told(where: str, path: str | Path) -> Iterator[None]:
    """Say in a sentence that a folder cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{where} {path} cannot be read ({first_line(error)}): give a transformers video encoder with safetensors"
        ) from error


class VideoEncoder:
    """A frozen encoder: the mean of its last layer's tokens.

    Attributes:
        name: of its distances: ``encoder_frechet`` and ``encoder_kernel``.
        source: which network, from where.

    Raises:
        UserError: the folder is missing, is no encoder of videos, or holds weights only as pickles.
    """

    name = "encoder"

    def __init__(
        self, path: str | Path, where: str = "--encoder", device: torch.device | str = "cpu", batch_size: int = 4
    ) -> None:
        from transformers import AutoModel

        folder = Path(path).expanduser()
        config, self.frames, self.size = read_config(folder, where)
        with _told(where, path):
            model: Any = AutoModel.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        self.model = model.eval().requires_grad_(False).to(device)
        self.mean, self.spread = (torch.tensor(values, device=device) for values in self._colours(folder))
        self.device, self.batch_size = device, batch_size
        self.source = f"{config.model_type} of {folder}"

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Features ``[N, D]`` of uint8 clips ``[N, F, H, W, 3]``, float64 on the CPU."""
        return torch.cat([self._encode(part) for part in clips.split(self.batch_size)])

    def _encode(self, clips: Tensor) -> Tensor:
        chosen = torch.linspace(0, clips.shape[1] - 1, self.frames).round().long()
        frames = (clips[:, chosen].to(self.device).float() / 255 - self.mean) / self.spread
        flat = frames.permute(0, 1, 4, 2, 3).flatten(0, 1)
        flat = functional.interpolate(flat, size=self.size, mode="bilinear", antialias=True)
        video = flat.unflatten(0, (len(clips), self.frames))
        answer = self.model(**{self.model.main_input_name: video}).last_hidden_state
        return answer.flatten(1, -2).mean(1).double().cpu()

    @staticmethod
    def _colours(folder: Path) -> tuple[Any, Any]:
        import json

        for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
            if (folder / name).is_file():
                found = json.loads((folder / name).read_text(encoding="utf-8"))
                return found.get("image_mean", IMAGENET[0]), found.get("image_std", IMAGENET[1])
        return IMAGENET
