"""Samples that were made already, kept by everything that decides them: a measurement that was cut goes on with them.

A file holds a batch's latents and the seconds that they took, so that nothing is told otherwise than if it had been
sampled now. Its name is a digest of the model, the prompts, the noise, the given frames and the way of sampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyflow.backbone.parallelize import from_rank_zero, rank_and_size
from anyflow.system.files import replacing


class KeptSamples:
    """A folder of samples; of several ranks the first one reads and writes it.

    Args:
        folder: made when there is something to keep.
        made_by: what makes the samples besides what :meth:`name` is told: the model, its precision, the code.
    """

    def __init__(self, folder: Path, made_by: str = "") -> None:
        self.folder, self.made_by = folder, made_by
        self._used: set[Path] = set()

    def of(self, made_by: str) -> KeptSamples:
        """The same folder, for what something else makes; :meth:`clear` forgets both."""
        other = KeptSamples(self.folder, made_by)
        other._used = self._used
        return other

    def name(self, tensors: Sequence[Tensor | None], facts: Any) -> str:
        """The name of what comes of tensors (on the CPU) and of plain values."""
        digest = hashlib.sha256(repr((self.made_by, facts)).encode())
        for tensor in tensors:
            digest.update(b"none" if tensor is None else str((tensor.dtype, tuple(tensor.shape))).encode())
            if tensor is not None:
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def load(self, name: str) -> tuple[Tensor, float] | None:
        """Latents and the seconds that they took, on every rank; None if they are not there, or not whole."""
        return from_rank_zero(self._load(name) if rank_and_size()[0] == 0 else None)

    def save(self, name: str, latents: Tensor, seconds: float) -> None:
        """Keep latents, whole or not at all."""
        if rank_and_size()[0] > 0:
            return
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({"latents": latents.cpu().contiguous()}, partial, {"seconds": repr(seconds)})

    def clear(self) -> None:
        """Forget what was loaded or kept here: it is part of a result now."""
        for path in self._used:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _load(self, name: str) -> tuple[Tensor, float] | None:
        try:
            with safe_open(self._path(name), "pt") as file:
                return file.get_tensor("latents"), float(file.metadata()["seconds"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def _path(self, name: str) -> Path:
        path = self.folder / f"{name}.safetensors"
        self._used.add(path)
        return path
