"""A small untrained model folder for the command line: the embedded layout, one layer, random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow.backbone.codec import Codec
from anyflow.backbone.embedded import build_text_encoder, build_tokenizer, build_vae, transformer_config
from anyflow.backbone.export import export_pipeline
from anyflow.backbone.load import new_backbone
from anyflow.backbone.model_card import ModelCard

CAPTIONS = ["A green car drives slowly and keeps the middle lane.", "A blue car is ahead in the left lane."]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder that loads in a moment."""
    return make_model(tmp_path_factory.mktemp("models") / "small", "bidirectional")


@pytest.fixture(scope="session")
def small_causal_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, chunk by chunk."""
    return make_model(tmp_path_factory.mktemp("models") / "small-causal", "causal", chunk_partition=[1, 2, 2])


def make_model(folder: Path, architecture: str, **changes: object) -> Path:
    """A pipeline folder with one layer and random weights."""
    tokenizer = build_tokenizer(CAPTIONS)
    codec = Codec(build_vae(0), tokenizer, build_text_encoder(len(tokenizer), 0))
    network = new_backbone({**transformer_config(), "num_layers": 1, **changes}, 0, architecture)
    card = ModelCard("small", size=(17, 64, 96), fps=8.0)
    export_pipeline(folder, network.transformer, codec, 3.0, card, codec_dtype=None)
    return folder
