"""Guided networks: both questions in one call, each chunk's window its own question's, and one call at scale 1."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AnyFlowFARTransformer3DModel
from torch import Tensor

from anyflow.backbone.bidirectional import BidirectionalBackbone
from anyflow.backbone.causal import CausalBackbone
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.guidance import UNGUIDED, Guidance, Guided
from anyflow.backbone.stream import stream_video
from anyflow.flowmap.chunks import PathBatch, in_chunks, layout_of
from anyflow.flowmap.sampling import guide, steps_of, take_velocity

SCALE = 2.5


class Watched:
    """A network that notes what it is asked."""

    def __init__(self, network: Any) -> None:
        self.network, self.asked = network, []

    def __call__(self, z: Tensor, t: Tensor, r: Tensor, told: Conditions, **view: Any) -> Tensor:
        self.asked.append((z, t, r, told, view))
        return self.network(z, t, r, told, **view)


@pytest.fixture
def far(tiny_config) -> AnyFlowFARTransformer3DModel:
    config = {**tiny_config, "chunk_partition": (1, 2, 2, 1), "full_chunk_limit": 2}
    return AnyFlowFARTransformer3DModel(**config).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("spread", [False, True])
def test_a_guided_answer_is_that_of_two_questions_in_one_call(stock, make_text, spread) -> None:
    """Catches swapped halves, a negative prompt that is not asked, and times or frames that differ between them."""
    network = Watched(BidirectionalBackbone(stock))
    (told, _), (negative, _) = make_text([3, 7]), make_text([11])
    z, t = torch.randn(2, 3, 16, 4, 6), torch.tensor([900.0, 300.0])
    t = t[:, None].repeat(1, 3) if spread else t
    found = Guided(network, SCALE, negative.text)(z, t, t / 2, told)
    [(both, times, ends, texts, _)] = network.asked
    assert torch.equal(both, torch.cat([z, z])) and torch.equal(times, torch.cat([t, t]))
    assert torch.equal(ends, torch.cat([t, t]) / 2) and texts.text.lengths.tolist() == [3, 7, 11, 11]
    alone = [network.network(z, t, t / 2, one) for one in (told, negative.select(torch.zeros(2, dtype=torch.int64)))]
    torch.testing.assert_close(found, alone[1] + SCALE * (alone[0] - alone[1]), atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    other, _ = make_text([4, 2])
    guided = Guided(network, SCALE, negative.text)
    guided(z, t, t / 2, told), guided(z, t, t / 2, other)
    assert network.asked[-1][3].text.lengths.tolist() == [4, 2, 11, 11], "another text is not the first one"


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 1, 3])
@pytest.mark.parametrize("frames", [6, 9])
def test_a_guided_causal_video_equals_one_without_any_cache(far, make_text, given, frames) -> None:
    """Every jump of every chunk by two uncached passes over the chunks so far, one a prompt.

    Catches a window that both questions share: what earlier frames are to the negative prompt is another thing.
    """
    network = CausalBackbone(far)
    (told, _), (negative, _) = make_text([3, 7]), make_text([5])
    noise = torch.randn(2, frames, 16, 8, 12)
    first = torch.randn(2, given, 16, 8, 12) if given else None
    chunks, asked = network.chunks_of(frames, given), 0
    longest, done = (
        sum(far.config.chunk_partition),
        [] if first is None else list(first.split(list(_until(chunks, given)), 1)),
    )
    gap = 0.0

    def window() -> list[Tensor]:
        kept = list(done)
        while len(kept) > 1 and sum(part.shape[1] for part in kept) + chunks[len(done)] > longest:
            kept = kept[1:]
        return kept

    def uncached(z: Tensor, t: Tensor, r: Tensor, prompt: Conditions) -> Tensor:
        kept = window()
        layout = layout_of([*(part.shape[1] for part in kept), z.shape[1]], far.config.full_chunk_limit)
        clean = torch.cat([*kept, z], dim=1)
        on_path = in_chunks(layout, PathBatch(clean, clean, t, r))
        answer = network(on_path.clean, on_path.timestep, on_path.r_timestep, prompt, layout=layout)
        return answer[:, layout.context_frames :][:, : layout.full_frames][:, -z.shape[1] :]

    guided = Guided(network, SCALE, negative.text)

    def check(z: Tensor, t: Tensor, r: Tensor, prompt: Conditions, **view: Any) -> Tensor:
        nonlocal asked, gap
        answer = guided(z, t, r, prompt, **view)
        if "record" not in view:
            asked += 1
            both = uncached(z, t, r, told), uncached(z, t, r, negative.select(torch.zeros(2, dtype=torch.int64)))
            torch.testing.assert_close(answer, guide(*both, SCALE), atol=2e-5, rtol=1e-4)
            gap = max(gap, float((both[0] - both[1]).abs().max()))
        return answer

    parts = network.generate(told._replace(first_frames=first), noise, steps_of(2, 3.0), ask=check, take=take_velocity)
    for index, part in enumerate(parts):
        if index >= len(done):
            done.append(part)
    assert asked == 2 * (len(chunks) - len(_until(chunks, given))) and gap > 1e-3


def _until(chunks: tuple[int, ...], frames: int) -> tuple[int, ...]:
    """The first chunks, of so many frames."""
    return next(chunks[:count] for count in range(len(chunks) + 1) if sum(chunks[:count]) == frames)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["bidirectional", "causal"])
def test_given_frames_stay_as_given_to_both_questions(stock, far, make_text, architecture) -> None:
    """Catches given frames that guidance moves, or that the negative prompt's rows do not have."""
    network = BidirectionalBackbone(stock) if architecture == "bidirectional" else CausalBackbone(far)
    watched, (told, _), (negative, _) = Watched(network), make_text([3, 7]), make_text([5])
    first, noise = torch.randn(2, 1, 16, 8, 12), torch.randn(2, 3, 16, 8, 12)
    guided = Guided(watched, SCALE, negative.text)
    video = network.sample(told._replace(first_frames=first), noise, 2, 3.0, take_velocity, ask=guided)
    assert torch.equal(video[:, :1], first)
    seen = [z for z, *_, view in watched.asked if "record" in view or architecture == "bidirectional"]
    assert seen and all(torch.equal(z[:, :1], torch.cat([first, first])) for z in seen)
    assert all(len(z) == 4 for z, *_ in watched.asked), "both questions in each call"


@torch.no_grad()
def test_scale_one_is_todays_sampler_to_the_bit(stock, codec, captions) -> None:
    """Catches a second call, or another arithmetic, where there is no guidance."""
    network = BidirectionalBackbone(copy.deepcopy(stock))
    calls: list[int] = []
    network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    noise = torch.randn(2, 2, 16, 4, 6)
    plain = network.sample(Conditions(codec.encode_text(captions)), noise, 3, 3.0)
    assert UNGUIDED.way(network, codec) == {} and (UNGUIDED.calls, UNGUIDED.told) == (1, "")
    [video] = stream_video(network, codec, captions, noise, 3, 3.0, **Guidance(1.0, "blurred").way(network, codec))
    assert torch.equal(video, codec.decode(plain)) and calls == [2] * 6
    calls.clear()
    [guided] = stream_video(network, codec, captions, noise, 3, 3.0, **Guidance(4.0, "blurred").way(network, codec))
    assert calls == [4] * 3 and not torch.equal(guided, video)
    by_hand = network.sample(
        Conditions(codec.encode_text(captions)), noise, 3, 3.0, ask=Guided(network, 4.0, codec.encode_text(["blurred"]))
    )
    assert torch.equal(guided, codec.decode(by_hand))
