"""Text: choosing, stacking and moving prompts."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from anyflow.backbone.conditions import Text


def folded(make_text: Any, lengths: list[int], padded_length: int = 512) -> tuple[Text, torch.Tensor]:
    told, full = make_text(lengths, padded_length)
    return told.text, full


def test_select_repeats_rows_and_trims_to_the_longest_chosen(make_text) -> None:
    text, full = folded(make_text, [3, 7, 5])
    chosen = text.select(torch.tensor([2, 0, 0]))
    assert chosen.lengths.tolist() == [5, 3, 3]
    assert torch.equal(chosen.embeddings, full[[2, 0, 0], :6])  # one padding token after the longest


def test_select_keeps_a_full_prompt_whole(make_text) -> None:
    text, full = folded(make_text, [8, 2], 8)
    assert torch.equal(text.select(torch.tensor([0])).embeddings, full[:1])


def test_concatenate_pads_to_the_longest(make_text) -> None:
    (long, full_long), (short, full_short) = folded(make_text, [9]), folded(make_text, [1])
    both = Text.concatenate([long, short])
    assert both.lengths.tolist() == [9, 1]
    assert torch.equal(both.embeddings, torch.cat([full_long, full_short])[:, :10])


def test_concatenate_refuses_what_does_not_fit(make_text) -> None:
    with pytest.raises(ValueError, match="padded lengths"):
        Text.concatenate([folded(make_text, [1], 8)[0], folded(make_text, [1], 9)[0]])
    with pytest.raises(ValueError, match="carry lengths"):
        Text.concatenate([folded(make_text, [1])[0], folded(make_text, [1])[0]._replace(lengths=None)])


def test_lengths_stay_integers_when_cast_pickled_or_mapped(make_text) -> None:
    text, _ = folded(make_text, [2, 4])
    halved = text.to(dtype=torch.bfloat16)
    assert halved.embeddings.dtype == torch.bfloat16 and halved.lengths.dtype == torch.int64
    assert torch.equal(pickle.loads(pickle.dumps(text)).embeddings, text.embeddings)
    leaves, spec = pytree.tree_flatten(text)
    assert isinstance(pytree.tree_unflatten(leaves, spec), Text)


def test_conditions_are_chosen_and_doubled_together(make_text) -> None:
    """Catches given frames of another row, and a doubled batch whose second half keeps its prompts."""
    (told, _), (negative, _) = make_text([3, 5]), make_text([2])
    frames = torch.arange(2.0)[:, None, None, None, None]
    told = told._replace(first_frames=frames)
    chosen = told.select(torch.tensor([1]))
    assert chosen.num_given == 1 and float(chosen.first_frames) == 1.0 and chosen.text.lengths.tolist() == [5]
    both = told.with_negative(negative.text)
    assert both.text.lengths.tolist() == [3, 5, 2, 2] and both.first_frames.flatten().tolist() == [0, 1, 0, 1]
