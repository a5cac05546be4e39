"""The ways that a network is sampled, and what each means for the rest: light, for recipes and commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SamplerKind = Literal["flowmap", "euler", "renoise"]


@dataclass(frozen=True)
class Sampler:
    """A way of taking jumps.

    Attributes:
        asks: What the network is asked, in words.
        fuses_guidance: Whether such networks have guidance in their weights.
        draws: Whether fresh noise is drawn between jumps: then few steps are no preview of many.
        usage: For the model card of a network that diffusers' pipeline does not sample this way; empty: it does.
    """

    asks: str
    fuses_guidance: bool = True
    draws: bool = False
    usage: str = ""


SAMPLERS: dict[SamplerKind, Sampler] = {
    "flowmap": Sampler("the mean velocity of a jump"),
    "euler": Sampler(
        "the velocity where a jump begins, of plain flow matching",
        fuses_guidance=False,
        usage="This network knows velocities, not jumps: it takes many small steps (`anyflow_sampler: euler` in "
        "`scheduler/scheduler_config.json`), and no few-step sampler serves it.",
    ),
    "renoise": Sampler(
        "the way to the data, noised again for a further step",
        draws=True,
        usage="This network jumps to the data and is noised again for a further step (`anyflow_sampler: renoise` in "
        "`scheduler/scheduler_config.json`): `anyflow` does so by itself, diffusers' `AnyFlowPipeline` does not.",
    ),
}
"""Every way by its name; :func:`anyflow.evaluation.measure.take_of` has the code of each."""
