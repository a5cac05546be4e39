"""Classifier-free guidance of samples: away from a negative prompt, and away from what happens without controls.

A guided call asks a network twice, in one batch of twice the rows. For networks that have no guidance in their weights
(a teacher, plain Wan) the other question has the negative prompt; for those that are told controls it has none known::

    u = u_negative + scale * (u_prompt - u_negative)
    u = u_untold + control * (u - u_untold)

The former keeps the controls, the latter the prompt. Under both a call asks three questions, and each other one leads
away from the whole one.

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
from anyflow.flowmap.sampling import guide_from

if TYPE_CHECKING:
    from anyflow.backbone.codec import Codec


@dataclass(frozen=True)
class Guidance:
    """How samples are guided.

    Attributes:
        scale: 1 is none: the network is asked once.
        negative: the text of the other question.
        control: of controls against none known; 1 is none.
    """

    scale: float = 1.0
    negative: str = ""
    control: float = 1.0

    @property
    def calls(self) -> int:
        """Network calls where an unguided sampler makes one."""
        return 1 + (self.scale != 1) + (self.control != 1)

    @property
    def told(self) -> str:
        """In words; empty: there is none."""
        against = f"the negative prompt {self.negative!r}" if self.negative else "an empty prompt"
        parts = [f"guidance {self.scale:g} against {against}"] if self.scale != 1 else []
        parts += [f"control guidance {self.control:g} against no controls"] if self.control != 1 else []
        return f"{' and '.join(parts)}: {('two', 'three')[len(parts) - 1]} network calls a step" if parts else ""

    def way(self, ask: Ask, codec: Codec) -> dict[str, Any]:
        """The arguments by which a sampler is guided: none at scale 1, else ``ask``."""
        if self.calls == 1:
            return {}
        negative = codec.encode_text([self.negative]) if self.scale != 1 else None
        return {"ask": Guided(ask, self.scale, negative, self.control)}


UNGUIDED = Guidance()
"""How a network is sampled that has guidance in its weights, or needs none."""


class Guided:
    """Asks a network under guidance; its answer is float32.

    Args:
        ask: the network, or one of its roles.
        scale: of the guidance.
        negative: the negative prompt, one row; None: the text guides nothing.
        control: of the guidance by controls; 1: they guide nothing.
    """

    def __init__(self, ask: Ask, scale: float, negative: Text | None, control: float = 1.0) -> None:
        self.ask, self.scale, self.negative, self.control = ask, scale, negative, control
        self._all: tuple[Conditions, Conditions] | None = None
        self._scales = [scale] * (negative is not None) + [control] * (control != 1)

    def __call__(
        self, latents: Tensor, timestep: Tensor, r_timestep: Tensor, conditions: Conditions, **view: Any
    ) -> Tensor:
        """The guided answer ``[B, ...]`` of the network asked with ``[2B, ...]``; ``view`` is what else it is told."""
        count = 1 + len(self._scales)
        repeated = (torch.cat([part] * count) for part in (latents, timestep, r_timestep))
        if self._all is None or self._all[0] is not conditions:  # made once for the steps of a sample
            others = [conditions.under(self.negative)] if self.negative is not None else []
            others += [conditions.without_controls()] if self.control != 1 else []
            self._all = conditions, Conditions.concatenate([conditions, *others])
        answer, *against = self.ask(*repeated, self._all[1], **view).chunk(count)
        return guide_from(answer, list(zip(against, self._scales, strict=True)))
