"""Tiny networks: 2 heads, 2 layers, float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AnyFlowTransformer3DModel
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.embedded import build_text_encoder, build_tokenizer, build_vae


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def captions() -> list[str]:
    return ["The green car turns left.", "A robot arm slowly opens the top drawer, then it stops."]


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "text_dim": 64,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
    }


@pytest.fixture
def stock(tiny_config: dict[str, Any]) -> AnyFlowTransformer3DModel:
    """diffusers' own network, all of its weights random."""
    return AnyFlowTransformer3DModel(**tiny_config)


@pytest.fixture
def make_text() -> Callable[..., tuple[Conditions, Tensor]]:
    """Conditions of folded texts, and the same texts zero-padded to the full length."""

    def make(lengths: list[int], padded_length: int = 512) -> tuple[Conditions, Tensor]:
        full = torch.zeros(len(lengths), padded_length, 64)
        for row, length in zip(full, lengths, strict=True):
            row[:length] = torch.randn(length, 64)
        tokens = min(max(lengths) + 1, padded_length)
        return Conditions(Text(full[:, :tokens], torch.tensor(lengths), padded_length)), full

    return make


@pytest.fixture(scope="session")
def codec(captions: list[str]) -> Codec:
    """The embedded model's frozen parts, untrained."""
    tokenizer = build_tokenizer(captions)
    return Codec(build_vae(seed=0), tokenizer, build_text_encoder(len(tokenizer), seed=0))
