"""What can be asked of rendering: each option of ``anyflow data make`` is a field here."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow.system.option import option


@dataclass(frozen=True)
class RenderOptions:
    """What is rendered."""

    clips: int = option(1000, "Training clips.", low=1)
    heldout: int = option(64, "Held-out clips, of other scenes.", low=1)
    seed: int = option(0, "Seed of the scenes.", low=0)
    look: str | None = option(
        None,
        "Driving: city, country. Driving-open: mixed, rush, or sand, gravel, clay, concrete alone. "
        "Robotics: middle, side. Games: high, low. First by default.",
    )
    workers: int = option(2, "Simulators at a time.", low=1)

    def command(self, domain: str) -> str:
        """What makes the same clips again."""
        look = f" --look {self.look}" if self.look else ""
        return f"anyflow data make {domain} --clips {self.clips} --heldout {self.heldout} --seed {self.seed}{look}"
