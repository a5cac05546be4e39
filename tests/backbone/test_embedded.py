"""The tiny model's tokenizer and text encoder."""

from __future__ import annotations

import pytest
import torch
from diffusers import AnyFlowTransformer3DModel
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer

from anyflow.backbone.embedded import build_text_encoder, build_tokenizer, transformer_config


def test_tokenizer_knows_words_and_spells_the_rest(captions) -> None:
    tokenizer = build_tokenizer(captions)
    assert tokenizer.tokenize("The green zebra at 27 m/s") == [
        *("▁The", "▁green", "▁", "z", "e", "b", "r", "a", "▁", "a", "t", "▁", "2", "7", "▁", "m", "/", "s")
    ]
    assert tokenizer("left").input_ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0


def test_tokenizer_keeps_to_its_size_and_is_reproducible(captions) -> None:
    tokenizer = build_tokenizer(captions * 2, vocab_size=100)
    assert len(tokenizer) == 100
    assert tokenizer.get_vocab() == build_tokenizer(captions * 2, vocab_size=100).get_vocab()


def test_tokenizer_loads_without_network(tmp_path, captions) -> None:
    tokenizer = build_tokenizer(captions)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (*captions, "", "unknown é 3.5"):
        assert loaded(text).input_ids == tokenizer(text).input_ids


@torch.no_grad()
def test_text_encoder_tells_words_and_their_order_apart() -> None:
    encoder = build_text_encoder(vocab_size=50, seed=0)
    one, swapped = torch.tensor([[10, 11, 12, 13, 1]]), torch.tensor([[10, 13, 12, 11, 1]])
    first, second = (encoder(ids, torch.ones_like(ids)).last_hidden_state[0] for ids in (one, swapped))
    assert first.var() == pytest.approx(1, abs=0.1)
    assert cosine_similarity(first, encoder.shared.weight[one[0]]).min() > 0.5  # the token's own vector dominates
    assert 0.3 < cosine_similarity(first[1], second[3], dim=0) < 0.95  # the same word beside other words
    assert torch.equal(build_text_encoder(50, seed=0).shared.weight, encoder.shared.weight)


def test_transformer_fits_the_text_encoder() -> None:
    with torch.device("meta"):
        transformer = AnyFlowTransformer3DModel(**transformer_config())
    assert transformer.condition_embedder.text_embedder.linear_1.in_features == 64
    assert 3.5e6 < transformer.num_parameters() < 5e6
