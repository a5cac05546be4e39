"""What the tests of the play share: a small model that is told controls, and a world that is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import drawn
import pytest


@pytest.fixture(scope="session")
def steered_model(small_causal_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained causal model whose pictures depend on its controls."""
    import torch

    from anyflow.backbone.codec import Codec
    from anyflow.backbone.controls import ControlSettings
    from anyflow.backbone.export import export_pipeline
    from anyflow.backbone.load import load_backbone
    from anyflow.backbone.model_card import ModelCard

    codec = Codec.from_folder(small_causal_model)
    backbone = load_backbone(small_causal_model, controls=ControlSettings(drawn.DRIVING, width=16))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        torch.nn.init.normal_(backbone.transformer.condition_embedder.control_embedder.layers[-1].weight)
    folder = tmp_path_factory.mktemp("models") / "steered"
    card = ModelCard("steered", size=(17, 64, 96), fps=8.0, data={"driving-uncaptioned": "MIT. A road."})
    export_pipeline(folder, backbone.transformer, codec, 3.0, card, dtype=torch.float32)
    return folder


Serve = Callable[..., AbstractContextManager[Any]]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Serve:
    """``with site() as address:`` serves the drawn world from a thread of this process."""
    drawn.replace_rollouts(monkeypatch.setattr)

    @contextmanager
    def serving(**changes: Any) -> Iterator[Any]:
        with drawn.serving(tmp_path, **changes) as served:
            yield served

    return serving
