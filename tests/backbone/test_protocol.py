"""Text: choosing, stacking and moving prompts."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from anyflow.backbone.protocol import Text


def test_select_repeats_rows_and_trims_to_the_longest_chosen(make_text) -> None:
    text, full = make_text([3, 7, 5])
    chosen = text.select(torch.tensor([2, 0, 0]))
    assert chosen.lengths.tolist() == [5, 3, 3]
    assert torch.equal(chosen.embeddings, full[[2, 0, 0], :6])  # one padding token after the longest


def test_select_keeps_a_full_prompt_whole(make_text) -> None:
    text, full = make_text([8, 2], padded_length=8)
    assert torch.equal(text.select(torch.tensor([0])).embeddings, full[:1])


def test_concatenate_pads_to_the_longest(make_text) -> None:
    (long, full_long), (short, full_short) = make_text([9]), make_text([1])
    both = Text.concatenate([long, short])
    assert both.lengths.tolist() == [9, 1]
    assert torch.equal(both.embeddings, torch.cat([full_long, full_short])[:, :10])


def test_concatenate_refuses_what_does_not_fit(make_text) -> None:
    with pytest.raises(ValueError, match="padded lengths"):
        Text.concatenate([make_text([1], 8)[0], make_text([1], 9)[0]])
    with pytest.raises(ValueError, match="carry lengths"):
        Text.concatenate([make_text([1])[0], make_text([1])[0]._replace(lengths=None)])


def test_lengths_stay_integers_when_cast_pickled_or_mapped(make_text) -> None:
    text, _ = make_text([2, 4])
    halved = text.to(dtype=torch.bfloat16)
    assert halved.embeddings.dtype == torch.bfloat16 and halved.lengths.dtype == torch.int64
    assert torch.equal(pickle.loads(pickle.dumps(text)).embeddings, text.embeddings)
    leaves, spec = pytree.tree_flatten(text)
    assert isinstance(pytree.tree_unflatten(leaves, spec), Text)
