"""What the stages' tests share."""

from __future__ import annotations

import pytest
from tiny_stage import CAPTIONS

from anyflow.backbone.codec import Codec
from anyflow.backbone.embedded import build_text_encoder, build_tokenizer, build_vae


@pytest.fixture(scope="session")
def codec() -> Codec:
    tokenizer = build_tokenizer(CAPTIONS)
    return Codec(build_vae(0), tokenizer, build_text_encoder(len(tokenizer), 0))
