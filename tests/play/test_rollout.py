"""A video without an end is the streamed one, and its thousandth frame costs what its hundredth did."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anyflow.backbone.stream import stream_video
from anyflow.evaluation.loaded import LoadedModel
from anyflow.evaluation.models import native_shape
from anyflow.evaluation.options import WayOptions
from anyflow.play.rollout import Rollout
from experiments.bench.compare import held_bytes


@pytest.fixture(scope="module")
def loaded(steered_model: Path) -> LoadedModel:
    return LoadedModel.of(str(steered_model), WayOptions(), native_shape(str(steered_model)))


def start() -> Tensor:
    return torch.randint(0, 256, (1, 1, 64, 96, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


@pytest.mark.parametrize("is_given", [True, False])
def test_it_is_the_streamed_video(loaded: LoadedModel, is_given: bool) -> None:
    """Trained on 5 latent frames; 11 are made: the window moves."""
    sizes = loaded.backbone.chunks_of(11, int(is_given))
    generator = torch.Generator().manual_seed(0)
    shape = loaded.latent_shape[1:]
    drawn = [
        torch.zeros(1, 1, *shape) if is_given and not place else torch.randn(1, frames, *shape, generator=generator)
        for place, frames in enumerate(sizes)
    ]
    controls = torch.rand(1, 41, 2) * torch.tensor([8.0, 1.0]) + torch.tensor([6.0, -0.5])
    known = loaded.given_latents(start()) if is_given else None
    noise = torch.cat(drawn, dim=1)
    whole = list(stream_video(loaded.backbone, loaded.codec, ["a road"], noise, 2, loaded.shift, known, controls))
    rollout, done = Rollout(loaded, "a road", start() if is_given else None), 0
    for part in whole:
        frames = rollout.next_frames
        assert frames == part.shape[1]
        made = rollout.chunk(controls[0, done : done + frames], 2)
        done += frames
        assert made.shape == part.shape[1:] and (made.int() - part[0].int()).abs().max() <= 1
    assert done == 41


def test_controls_steps_and_seed_change_the_chunk_they_come_with(loaded: LoadedModel) -> None:
    def second(speed: float, steps: int, seed: int = 0) -> Tensor:
        rollout = Rollout(loaded, "a road", start(), seed)
        first = rollout.chunk(torch.tensor([[10.0, 0.0]]), 1)
        assert first.shape == (1, 64, 96, 3)
        return rollout.chunk(torch.tensor([[speed, 0.0]]).expand(rollout.next_frames, 2), steps).float()

    plain = second(10.0, 2)
    assert torch.equal(plain, second(10.0, 2))
    for other in (second(14.0, 2), second(10.0, 4), second(10.0, 2, seed=1)):
        assert (plain - other).abs().mean() > 0.5


def costs(loaded: LoadedModel, chunks: int, looked_at: list[int]) -> list[tuple[int, int, int]]:
    """Network calls, bytes held at most and bytes left behind of some chunks."""
    rollout, asked = Rollout(loaded, "a road", start()), []
    hook = loaded.backbone.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].numel()))
    found = []
    try:
        for number in range(chunks):
            controls = torch.tensor([[10.0, 0.5]]).expand(rollout.next_frames, 2)
            asked.clear()
            if number in looked_at:
                peak, left = held_bytes(partial(rollout.chunk, controls, 2), "cpu")
                found.append((sum(asked), peak, left))
            else:
                picture = rollout.chunk(controls, 1)
    finally:
        hook.remove()
    assert picture.float().std() > 1
    return found


def test_a_late_chunk_costs_what_an_early_one_did(loaded: LoadedModel) -> None:
    early, late = costs(loaded, 22, [8, 20])
    assert late[0] == early[0] and late[1] <= early[1] * 1.01 and late[2] <= early[2] + 1000


@pytest.mark.slow
def test_two_hundred_chunks_and_more(loaded: LoadedModel) -> None:
    early, middle, late = costs(loaded, 242, [10, 120, 240])
    assert early[0] == middle[0] == late[0]
    assert max(middle[1], late[1]) <= early[1] * 1.01
    assert late[2] <= early[2] + 1000
