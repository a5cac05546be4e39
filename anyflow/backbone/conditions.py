"""What a network is told about each sample of a batch, besides latents and times: one object, from stage to sampler.

Shapes: B batch, F latent frames, C latent channels, S text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Text(NamedTuple):
    """Prompt embeddings with their padding folded into one token.

    Wan pads every prompt with zero vectors to 512 tokens and attends to all of them. Those vectors are identical, so
    one of them, counted ``padded_length - length`` times in the softmax, gives the same result for less work.
    """

    embeddings: Tensor
    """``[B, S, D]``, zero after each prompt's length; ``S >= min(max(lengths) + 1, padded_length)``."""
    lengths: Tensor | None
    """``[B]`` int64: the tokens of each prompt. None: attend to the embeddings exactly as given, padding included."""
    padded_length: int
    """The number of tokens that the network was trained to see (512 for Wan)."""

    def select(self, rows: Tensor) -> Text:
        """The texts of the given rows (int64 ``[n]``), trimmed to the longest of them."""
        if self.lengths is None:
            return self._replace(embeddings=self.embeddings[rows])
        lengths = self.lengths[rows.to(self.lengths.device)]
        tokens = min(int(lengths.max()) + 1, self.padded_length)
        return self._replace(embeddings=self.embeddings[rows, :tokens], lengths=lengths)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Text:
        """Move, or cast the embeddings; the lengths stay int64."""
        embeddings = self.embeddings.to(device, dtype)
        lengths = None if self.lengths is None else self.lengths.to(embeddings.device)
        return self._replace(embeddings=embeddings, lengths=lengths)

    @staticmethod
    def concatenate(texts: Sequence[Text]) -> Text:
        """Stack texts along the batch, filling the shorter ones with padding.

        Raises:
            ValueError: the texts differ in their padded length, or only some carry lengths.
        """
        first = texts[0]
        if any(text.padded_length != first.padded_length for text in texts):
            raise ValueError(f"texts of different padded lengths: {[text.padded_length for text in texts]}")
        if len({text.lengths is None for text in texts}) > 1:
            raise ValueError("some texts carry lengths and some do not")
        longest = max(text.embeddings.shape[1] for text in texts)
        if first.lengths is None and any(text.embeddings.shape[1] != longest for text in texts):
            raise ValueError("texts without lengths must have equally many tokens")
        embeddings = [
            nn.functional.pad(text.embeddings, (0, 0, 0, longest - text.embeddings.shape[1])) for text in texts
        ]
        lengths = None if first.lengths is None else torch.cat([text.lengths for text in texts])  # type: ignore[misc]
        return Text(torch.cat(embeddings), lengths, first.padded_length)


class Conditions(NamedTuple):
    """The conditions of a batch. Another kind of them is another field here, read by the network that knows it.

    What belongs to frames belongs to those of the latents that go with it: :meth:`of_frames` takes the conditions of
    some.
    """

    text: Text
    """One prompt a sample."""
    first_frames: Tensor | None = None
    """``[B, k, C, H, W]``: clean latents that a rollout begins with, for image- or video-to-video; None: none."""
    controls: Tensor | None = None
    """``[B, F, P, W]`` float32: the W numbers of the P pixel frames that each latent frame covers, in their own units;
    NaN: not known. None: none are. Those of a video that is streamed may come
    as it is made (:class:`anyflow.backbone.control_feed.ControlFeed`)."""

    @property
    def num_given(self) -> int:
        """Latent frames that are given."""
        return 0 if self.first_frames is None else self.first_frames.shape[1]

    def select(self, rows: Tensor) -> Conditions:
        """Those of the given rows (int64 ``[n]``)."""
        return Conditions(self.text.select(rows), *(None if part is None else part[rows] for part in self[1:]))

    def of_frames(self, frames: slice | list[int] | Tensor) -> Conditions:
        """For a call with these frames' latents alone."""
        return self if self.controls is None else self._replace(controls=self.controls[:, frames])

    def under(self, prompt: Text) -> Conditions:
        """With a prompt (one row) in place of each sample's own; controls and given frames stay."""
        rows = torch.zeros(len(self.text.embeddings), dtype=torch.int64, device=self.text.embeddings.device)
        return self._replace(text=prompt.to(self.text.embeddings.device, self.text.embeddings.dtype).select(rows))

    def without_controls(self) -> Conditions:
        """With no control known; prompts and given frames stay."""
        controls = self.controls
        return self if controls is None else self._replace(controls=torch.full_like(controls, float("nan")))

    @staticmethod
    def concatenate(parts: Sequence[Conditions]) -> Conditions:
        """Several batches that differ in no more than prompts and controls, as one."""
        text = Text.concatenate([part.text for part in parts])
        rest = zip(*(part[1:] for part in parts), strict=True)
        return Conditions(text, *(None if of[0] is None else torch.cat(of) for of in rest))

    def with_negative(self, negative: Text) -> Conditions:
        """The batch twice: as it is, then with the negative prompt (one row) in place of each sample's own."""
        return Conditions.concatenate([self, self.under(negative)])
