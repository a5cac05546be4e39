"""Four ranks as two nodes of two: weights are cut within a node and repeated over nodes; an average of four ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from forked import on_ranks
from torch.distributed.tensor import DTensor

from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.load import load_backbone
from anyflow.backbone.parallelize import (
    ParallelSettings,
    gather_state,
    join_ranks,
    leave_ranks,
    parallelize,
    part_of,
    whole,
)

RANKS = 4


def question(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Conditions]:
    generator = torch.Generator().manual_seed(rank)
    latents = torch.randn(1, 2, 16, 4, 4, generator=generator)
    text = Text(torch.randn(1, 5, 64, generator=generator), torch.tensor([3]), 8)
    return latents, torch.tensor([900.0 - rank]), torch.tensor([300.0]), Conditions(text)


def _rank(rank: int, port: int, model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = join_ranks("cpu")
    backbone = load_backbone(model, leave_stored=True)
    parallelize(backbone, ParallelSettings(nodes=2), device)
    weight = backbone.transformer.blocks[0].attn1.to_q.weight
    assert isinstance(weight, DTensor) and weight.device_mesh.shape == (2, 2)
    assert weight.to_local().shape[0] * 2 == weight.shape[0]
    assert torch.equal(part_of(whole(weight), weight).to_local(), weight.to_local())
    backbone(*question(rank)).square().mean().backward()
    gradient = whole(weight.grad)
    gathered = gather_state(backbone.transformer)
    assert gathered is not None
    if rank == 0:
        torch.save({"gradient": gradient, "weights": dict(gathered)}, out)
    leave_ranks()


@pytest.mark.slow
def test_weights_are_cut_within_a_node(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    port = 30500 + os.getpid() % 1000
    on_ranks(_rank, (port, small_model, out), RANKS)
    found = torch.load(out, weights_only=True)
    alone = load_backbone(small_model)
    for rank in range(RANKS):
        (alone(*question(rank)).square().mean() / RANKS).backward()
    expected = alone.transformer.blocks[0].attn1.to_q.weight.grad
    torch.testing.assert_close(found["gradient"], expected, rtol=1e-4, atol=1e-8)
    assert found["weights"].keys() == alone.transformer.state_dict().keys()
    for name, weight in alone.transformer.state_dict().items():
        assert torch.equal(found["weights"][name], weight), name
