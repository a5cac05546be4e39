"""Classifier-free guidance of samples, for networks that have none in their weights (a teacher, plain Wan).

A guided call asks a network twice, for the prompt and for the negative prompt, in one batch of twice the rows::

    u = u_negative + scale * (u_prompt - u_negative)

It is an :data:`~anyflow.backbone.protocol.Ask` like any other, so whatever samples through one is guided: every way of
taking jumps, given frames, and a causal network's chunks. What such a network takes down of earlier chunks has the
rows of both questions too, so each looks back at its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.protocol import Ask
from anyflow.flowmap.sampling import guide

if TYPE_CHECKING:
    from anyflow.backbone.codec import Codec


@dataclass(frozen=True)
class Guidance:
    """How samples are guided.

    Attributes:
        scale: 1 is none: the network is asked once.
        negative: the text of the other question.
    """

    scale: float = 1.0
    negative: str = ""

    @property
    def calls(self) -> int:
        """Network calls where an unguided sampler makes one."""
        return 1 if self.scale == 1 else 2

    @property
    def told(self) -> str:
        """In words; empty: there is none."""
        if self.scale == 1:
            return ""
        against = f"the negative prompt {self.negative!r}" if self.negative else "an empty prompt"
        return f"guidance {self.scale:g} against {against}: two network calls a step"

    def way(self, ask: Ask, codec: Codec) -> dict[str, Any]:
        """The arguments by which a sampler is guided: none at scale 1, else ``ask``."""
        return {} if self.scale == 1 else {"ask": Guided(ask, self.scale, codec.encode_text([self.negative]))}


UNGUIDED = Guidance()
"""How a network is sampled that has guidance in its weights, or needs none."""


class Guided:
    """Asks a network under guidance; its answer is float32.

    Args:
        ask: the network, or one of its roles.
        scale: of the guidance.
        negative: the negative prompt, one row.
    """

    def __init__(self, ask: Ask, scale: float, negative: Text) -> None:
        self.ask, self.scale, self.negative = ask, scale, negative
        self._both: tuple[Conditions, Conditions] | None = None

    def __call__(
        self, latents: Tensor, timestep: Tensor, r_timestep: Tensor, conditions: Conditions, **view: Any
    ) -> Tensor:
        """The guided answer ``[B, ...]`` of the network asked with ``[2B, ...]``; ``view`` is what else it is told."""
        twice = (torch.cat([part, part]) for part in (latents, timestep, r_timestep))
        if self._both is None or self._both[0] is not conditions:  # made once for the steps of a sample
            self._both = conditions, conditions.with_negative(self.negative)
        conditional, unconditional = self.ask(*twice, self._both[1], **view).chunk(2)
        return guide(conditional, unconditional, self.scale)
