"""Streaming: parts joined are the whole, and each is there before the next is begun."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyflow.backbone.causal import CausalBackbone
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.load import new_backbone
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.stream import stream_video
from anyflow.flowmap.sampling import steps_of


def network(tiny_config, architecture: str) -> FlowMapBackbone:
    chunks = {"chunk_partition": [1, 2], "full_chunk_limit": 2} if architecture == "causal" else {}
    backbone = new_backbone({**tiny_config, **chunks}, 0, architecture)
    torch.nn.init.normal_(backbone.transformer.proj_out.weight, std=0.1)
    return backbone


@pytest.mark.parametrize("chunks", [[1, 2, 2], [2, 3], [1] * 5])
def test_parts_decode_to_the_whole_video(codec, chunks) -> None:
    latents = torch.randn(2, 5, 16, 4, 6)
    parts = list(codec.decode_parts(latents.split(chunks, dim=1)))
    assert [part.shape[1] for part in parts] == [4 * chunks[0] - 3, *(4 * frames for frames in chunks[1:])]
    difference = torch.cat(parts, dim=1).int() - codec.decode(latents).int()
    assert difference.abs().max() <= 1  # the last bit of a rounding


@pytest.mark.parametrize("given", [0, 1])
def test_a_causal_network_streams_chunk_by_chunk(tiny_config, codec, captions, given: int) -> None:
    backbone = network(tiny_config, "causal")
    assert isinstance(backbone, CausalBackbone)
    asked: list[int] = []
    backbone.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].shape[1]))
    noise = torch.randn(2, 7, 16, 4, 6)  # trained on 3 frames: the window moves
    known = torch.randn(2, given, 16, 4, 6) if given else None
    seen: list[tuple[int, int]] = []
    parts: list[Tensor] = []
    for part in stream_video(backbone, codec, captions, noise, 2, 3.0, known):
        assert torch.is_grad_enabled() and part.dtype == torch.uint8
        parts.append(part)
        seen.append((part.shape[1], len(asked)))  # two jumps a chunk, and a look back but for the first
    calls = 0 if given else 2
    assert seen == [(1, calls), (8, calls + 3), (8, calls + 6), (8, calls + 9)]
    whole = codec.decode(backbone.sample(Conditions(codec.encode_text(captions), known), noise, 2, 3.0))
    assert (torch.cat(parts, dim=1).int() - whole.int()).abs().max() <= 1


def test_a_bidirectional_network_streams_in_one_part(tiny_config, codec, captions) -> None:
    backbone, noise = network(tiny_config, "bidirectional"), torch.randn(2, 3, 16, 4, 6)
    [video] = stream_video(backbone, codec, captions, noise, 2, 3.0)
    told = Conditions(codec.encode_text(captions))
    [latents] = backbone.generate(told, noise, steps_of(2, 3.0))
    assert torch.equal(video, codec.decode(latents)) and torch.equal(
        latents.detach(), backbone.sample(told, noise, 2, 3.0)
    )
