"""What can be asked of the play."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anyflow.errors import UserError
from anyflow.system.option import option

STEPS = (1, 2, 4, 8)
"""Steps of the sampler that the page offers."""


@dataclass(frozen=True)
class PlayOptions:
    """What is played, and where it is shown."""

    image: Path | None = option(None, "A picture to start from.")
    data: str | None = option(
        None, "A card: start from its held-out clips (with --image: take its prompt); else from the model's own cards'."
    )
    prompt: str | None = option(None, "The prompt; else that of the clip.")
    steps: int = option(2, f"Steps to begin with, {', '.join(map(str, STEPS))}; the page changes them.", low=1)
    fps: float | None = option(None, "Frames a second to play; else the footage's own.", low=0.1, high=240)
    seed: int = option(0, "Seed of the noise.", low=0)
    out: Path = option(Path("runs/play"), "Folder of the films that are recorded.")
    port: int = option(0, "Port on 127.0.0.1; 0 takes a free one.", low=0, high=65535)
    no_browser: bool = option(False, "Print the address, and open no browser.")

    def check(self) -> None:
        """That a video can begin as it is asked to.

        Raises:
            UserError: it cannot.
        """
        if self.image is not None and not self.image.is_file():
            raise UserError(f"--image {self.image}: there is no such file")
        if self.steps not in STEPS:
            raise UserError(f"--steps {self.steps} is not on the page: give one of {', '.join(map(str, STEPS))}")
