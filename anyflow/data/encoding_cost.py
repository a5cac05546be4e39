"""What an encoding takes, measured on a few captions and a clip before it begins."""

from __future__ import annotations

from dataclasses import dataclass


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
