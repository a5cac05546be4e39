"""The causal model that ships: small, whole, and what its page promises of it, through the real command line."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from anyflow.backbone import far_pipeline
from anyflow.cli.main import app

MODEL, SHARED = "data/models/tiny-causal", ("vae", "text_encoder", "tokenizer")
PROMPT = "A green car drives fast and keeps the middle lane. A blue car is behind in the left lane."


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


@pytest.fixture(scope="module")
def clip(project: Path) -> Tensor:
    """A held-out clip, uint8 ``[17, 64, 96, 3]``."""
    from anyflow.data.decode import ClipShape
    from anyflow.evaluation.heldout import held_out

    [item] = held_out([str(project / "data" / "driving.yaml")], "heldout", ClipShape(17, 64, 96, None), 1)
    return torch.as_tensor(item.frames)


def test_it_is_a_whole_pipeline_that_adds_less_than_12_megabytes() -> None:
    """Autoencoder, text encoder and tokenizer are the bidirectional model's, stored once."""
    folder, base = Path(MODEL), Path("data/models/tiny")
    for part in SHARED:
        for path in (base / part).iterdir():
            assert (folder / part / path.name).read_bytes() == path.read_bytes()
    own = [Path(root) / name for root, _, names in os.walk(folder) for name in names]  # links are not followed
    assert sum(path.stat().st_size for path in own) < 12e6
    assert set(json.loads((folder / "model_index.json").read_text())) >= {*SHARED, "transformer", "scheduler"}
    assert (folder / "pipeline.py").read_bytes() == Path(far_pipeline.__file__).read_bytes()


def test_it_is_cut_in_the_chunks_of_its_model_file() -> None:
    from anyflow.recipe import load_recipe

    config = json.loads((Path(MODEL) / "transformer" / "config.json").read_text())
    network = load_recipe("finetune/driving", model="tiny-causal").model.network
    assert {name: config[name] for name in network} == network


@pytest.mark.parametrize("steps", [1, 4])
def test_the_given_frame_is_kept(clip: Tensor, steps: int) -> None:
    """Above 40 dB against what the codec makes of it."""
    from anyflow.backbone.stream import stream_video
    from anyflow.evaluation.models import load_model

    codec, backbone, shift = load_model(MODEL)
    first = codec.encode_video(clip[None, :1])
    noise = torch.randn(1, 5, *first.shape[2:], generator=torch.Generator().manual_seed(0))
    video = torch.cat(list(stream_video(backbone, codec, [PROMPT], noise, steps, shift, first)), dim=1)
    error = (video[:, 0].double() - codec.decode(first)[:, 0].double()).square().mean()
    assert video.shape == (1, 17, 64, 96, 3)
    assert 10 * torch.log10(255**2 / error.clamp(min=1e-9)) > 40
    assert (video[:, 1:].double() - video[:, :-1].double()).abs().mean() > 0.2  # it moves


def test_it_goes_on_from_a_picture_and_from_a_clip_and_for_long(clip: Tensor, tmp_path: Path) -> None:
    from anyflow.evaluation.report.picture import write_mp4

    write_mp4(tmp_path / "start.mp4", list(clip.numpy()), 8.0)
    save_picture(clip[0], tmp_path / "start.png")
    for option, name, frames, chunks in (("--image", "start.png", 17, 3), ("--video", "start.mp4", 41, 7)):
        out = tmp_path / name.replace(".", "-")
        words = ["--model", MODEL, option, str(tmp_path / name), "--frames", str(frames), "--steps", "1"]
        done = CliRunner().invoke(app, ["sample", PROMPT, *words, "--out", str(out)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert read_length(out / "prompt-1-steps-01.mp4") == frames
        assert f"{chunks}/{chunks}  steps: 1, chunk {chunks}" in done.stderr


def test_the_page_streams(project: Path) -> None:
    """The example of docs/causal.md, run as it is typed."""
    page = (project / "docs" / "causal.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(ast.parse(code), "docs/causal.md", "exec"), names)
    shown: list[tuple[int, ...]] = []
    names["show"] = lambda frames: shown.append(tuple(frames.shape))
    names["stream"](MODEL, PROMPT, 7)
    assert shown == [(1, 1, 64, 96, 3), *[(1, 8, 64, 96, 3)] * 3]


@pytest.mark.slow
def test_diffusers_loads_it_with_its_own_pipeline(clip: Tensor) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(MODEL, custom_pipeline=MODEL, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    size = {"num_frames": 17, "height": 64, "width": 96}
    [frames] = pipe(PROMPT, num_inference_steps=2, guidance_scale=1.0, generator=generator, **size).frames
    assert len(frames) == 17


def save_picture(frame: Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray(frame.numpy()).save(path)


def read_length(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
