"""An export that is told controls samples in diffusers what we sample, by files that know nothing of anyflow."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    DiffusionPipeline,
)
from torch import Tensor

from anyflow.backbone.bidirectional import BidirectionalBackbone
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.controls import ControlSettings, add_controls, by_latent_frame
from anyflow.backbone.export import export_pipeline
from anyflow.backbone.guidance import Guided
from anyflow.backbone.load import load_backbone, wrap
from anyflow.backbone.model_card import ModelCard
from anyflow.data.controls import control_values
from anyflow.data.wanted import described

SHIFT, STEPS, FRAMES = 3.0, 2, 13
STEER = {"holds": "a wheel", "width": 2, "low": [0.0, -1.0], "high": [20.0, 1.0], "at": "transition"}
SETTINGS = ControlSettings({"steer": STEER, "keys": {"holds": "keys", "width": 1, "kind": "multi-hot"}}, width=16)


@pytest.fixture(params=["bidirectional", "causal"])
def backbone(request, tiny_config) -> BidirectionalBackbone:
    torch.manual_seed(1)
    if request.param == "bidirectional":
        network = wrap(AnyFlowTransformer3DModel(**tiny_config))
    else:  # the oldest of four chunks is compressed
        network = wrap(AnyFlowFARTransformer3DModel(**tiny_config, chunk_partition=[1, 1, 1, 1], full_chunk_limit=3))
    module = add_controls(network.transformer, SETTINGS)
    module.initialise(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(module.layers[-1].weight)
    torch.nn.init.normal_(module.unknown)
    return network.requires_grad_(False)


@pytest.fixture
def folder(backbone, codec, tmp_path: Path) -> Path:
    card = ModelCard("Tiny", size=(FRAMES, 32, 48))
    return export_pipeline(tmp_path / "model", backbone.transformer, codec, SHIFT, card, dtype=torch.float32)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 4, 16, 4, 6)


def rows(seed: int = 0, frames: int = FRAMES) -> np.ndarray[Any, Any]:
    """As a user has them, in the units of the card."""
    random = np.random.default_rng(seed)
    steer = np.stack([random.uniform(0, 20, frames), random.uniform(-1, 1, frames)], axis=1)
    return np.concatenate([steer, random.integers(0, 2, (frames, 1))], axis=1)


def told(*arrays: np.ndarray[Any, Any]) -> Tensor:
    """As training has them: each through the data set's own code."""
    known = {name: described(facts) for name, facts in SETTINGS.controls.items()}
    values = [
        control_values({"steer": array[:, :2].tolist(), "keys": array[:, 2:].tolist()}, known, range(FRAMES), FRAMES)
        for array in arrays
    ]
    return by_latent_frame(torch.from_numpy(np.stack(values)), 4)


def loaded(folder: Path) -> Any:
    trusted = {"custom_pipeline": str(folder), "trust_remote_code": True, "local_files_only": True}
    return DiffusionPipeline.from_pretrained(folder, **trusted)


def theirs(pipeline: Any, captions: list[str], noise: Tensor, **given: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "num_frames": FRAMES, "num_inference_steps": STEPS}
    latents = noise.transpose(1, 2)
    return pipeline(captions, **size, latents=latents, output_type="latent", **given).frames.transpose(1, 2)


@torch.no_grad()
def test_the_shipped_pipeline_is_told_what_we_are_told(backbone, codec, captions, noise, folder) -> None:
    """Its numbers are normalised, shifted to the frame that an action leads to, and given to each chunk, as ours."""
    text = codec.encode_text(captions)
    pipeline = loaded(folder)
    assert isinstance(pipeline, AnyFlowFARPipeline if backbone.is_causal else AnyFlowPipeline)
    one, other = rows(0), rows(1)
    one[5, 0] = float("nan")
    same, each, none = (
        backbone.sample(Conditions(text, controls=controls), noise, STEPS, SHIFT)
        for controls in (told(one, one), told(one, other), None)
    )
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(theirs(pipeline, captions, noise, controls=one), same, **close)
    torch.testing.assert_close(theirs(pipeline, captions, noise, controls=np.stack([one, other])), each, **close)
    torch.testing.assert_close(theirs(pipeline, captions, noise), none, **close)
    assert (same[1] - each[1]).abs().max() > 0.05 < (none - same).abs().max()
    negative = codec.encode_text(["blurred"])
    guided = Guided(backbone, 2.0, negative)
    expected = backbone.sample(Conditions(text, controls=told(one, other)), noise, STEPS, SHIFT, ask=guided)
    asked = {"guidance_scale": 2.0, "negative_prompt": ["blurred"] * 2, "controls": np.stack([one, other])}
    torch.testing.assert_close(theirs(pipeline, captions, noise, **asked), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_frames_that_are_given_keep_their_controls(backbone, codec, captions, noise, folder) -> None:
    known = torch.randn(2, 2, 16, 4, 6)
    expected = backbone.sample(
        Conditions(codec.encode_text(captions), known, told(rows(), rows())), noise, STEPS, SHIFT
    )
    found = theirs(loaded(folder), captions, noise, video_latents=known, controls=rows())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("controls", "sentence"),
    [
        (np.zeros((FRAMES, 2)), r"controls are \[1, 13, 2\]: give \[frames, 3\]: steer \(2\), keys \(1\)"),
        (np.zeros(FRAMES), r"controls are \[13\]: give \[frames, 3\]"),
        (np.zeros((9, 3)), "controls cover 9 frames, the video has 13"),
        (np.zeros((3, FRAMES, 3)), "controls are for 3 videos, there are 2 prompts: give one array for each"),
        (np.full((FRAMES, 3), np.inf), "not finite: give NaN for what is not known"),
        ([["a"] * 3] * FRAMES, r"controls are no array of numbers: give \[frames, 3\]"),
    ],
)
def test_controls_of_another_shape_are_refused(captions, noise, folder, controls, sentence) -> None:
    pipeline = loaded(folder)
    with pytest.raises(ValueError, match=sentence):
        theirs(pipeline, captions, noise, controls=controls)
    assert pipeline.transformer.condition_embedder.told is None, "the next call is told nothing of this one"


@torch.no_grad()
def test_our_own_wrapper_serves_their_pipeline(backbone, codec, captions, noise, folder) -> None:
    """Loaded by us, the module is there already."""
    ours = load_backbone(folder)
    pipeline = DiffusionPipeline.from_pretrained(
        folder, transformer=ours.transformer, custom_pipeline=str(folder), trust_remote_code=True, local_files_only=True
    )
    expected = backbone.sample(
        Conditions(codec.encode_text(captions), controls=told(rows(), rows())), noise, STEPS, SHIFT
    )
    torch.testing.assert_close(theirs(pipeline, captions, noise, controls=rows()), expected, atol=1e-4, rtol=1e-4)


def test_the_shipped_files_stand_alone(backbone, folder: Path) -> None:
    files = {path.name for path in folder.glob("*.py")}
    corrected = "far_pipeline.py" if backbone.is_causal else "exact_pipeline.py"
    assert files == {"pipeline.py", "control_embedding.py", corrected}
    for name in files:
        tree = ast.parse((folder / name).read_text())
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {one for one in imported if one.startswith("anyflow")}
    text = (folder / "README.md").read_text()
    assert 'custom_pipeline=".", trust_remote_code=True' in text and "controls=controls, " in text
    assert "| steer.0 |  | 0 | 20 |" in text and "| keys |  | 0 | 1 |" in text
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["anyflow_controls"]["controls"]["steer"]["low"] == [0.0, -1.0]
