"""What an encoding hands out and gives back: its shards, and what they will cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Encoder(Protocol):
    """What encoding needs of a codec."""

    @property
    def fingerprint(self) -> str:
        """Of its weights, normalisation and precision."""
        ...

    def encode_video(self, video: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] to normalised latents [B, F, C, H, W]."""
        ...

    def embed(self, prompt: str) -> Tensor:
        """A prompt's embedding [length, D], without padding, on the CPU."""
        ...


@dataclass(frozen=True)
class CachePart:
    """One shard: ``kind`` "latents" or "texts", its number, and the clips or captions that it is made from.

    A worker need not know all captions: ``texts`` are those of a shard of texts.
    """

    kind: str
    number: int
    items: range
    texts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``latents-000003``."""
        return f"{self.kind}-{self.number:06d}"


@dataclass(frozen=True)
class TimedTexts:
    """Some captions, of how many."""

    texts: tuple[str, ...]
    of: int


@dataclass(frozen=True)
class EncodingCost:
    """What encoding takes: clips, distinct captions, bytes on disk, seconds on one device of this machine."""

    clips: int
    texts: int
    bytes: int
    seconds: float

    def told(self, devices: int = 1) -> str:
        """In words, for so many devices."""
        minutes = self.seconds / 60 / devices
        return f"{self.clips} clips, {self.texts} prompts, about {self.bytes / 1e6:.1f} MB and {minutes:.1f} min"
