"""What can be asked of sampling by a command: each option of several commands is a field here."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow.flowmap.samplers import SAMPLERS
from anyflow.system.option import option

PRECISIONS = ("float32", "bfloat16")
"""What the network computes in; the autoencoder, the times and the samples' state are float32 in either."""


@dataclass(frozen=True)
class WayOptions:
    """How a model is sampled; what is left out is the model's own."""

    sampler: str | None = option(
        None, f"How jumps are taken, {' | '.join(SAMPLERS)}; else as the model says.", choices=tuple(SAMPLERS)
    )
    guidance: float | None = option(
        None,
        "Guidance of a network that has none in its weights (a teacher, plain Wan): two calls a step; 1 is none; "
        "else as the model says.",
        low=1,
    )
    negative: str | None = option(None, "The negative prompt that guidance leads away from; else the model's.")
    control_guidance: float | None = option(
        None, "How much more than told a model obeys its controls: a further call a step; 1 is none, and usual.", low=1
    )
    precision: str = option(
        "", f"Of the network, {' or '.join(PRECISIONS)}; else on a GPU that of the model's recipe.", choices=PRECISIONS
    )
