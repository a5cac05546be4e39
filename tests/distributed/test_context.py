"""Ranks that share a clip's tokens answer as one rank does, with its gradients: every way that a network is asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import on_ranks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow.backbone.attention import Recorder
from anyflow.backbone.compiled import compile_blocks
from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.context import ALONE, Context, join_context
from anyflow.backbone.controls import ControlSettings
from anyflow.backbone.layout import check_heads
from anyflow.backbone.load import new_backbone
from anyflow.backbone.lora import LoraSettings, add_lora
from anyflow.backbone.parallelize import checkpoint_activations, join_ranks, leave_ranks
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.roles import AdapterRoles
from anyflow.errors import UserError
from anyflow.flowmap.chunks import layout_of
from anyflow.flowmap.tape import Tape
from anyflow.recipe import load_recipe
from anyflow.training.assemble import load_networks

NETWORK = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 64}
NETWORK |= {"text_dim": 32, "freq_dim": 32, "in_channels": 4, "out_channels": 4, "patch_size": [1, 2, 2]}
CHUNKS = {"chunk_partition": [1, 1, 1], "full_chunk_limit": 2, "compressed_patch_size": [1, 4, 4]}
FRAMES, HEIGHT, WIDTH = 3, 12, 4  # 12 tokens a frame; of one compressed 3: odd numbers in a causal pass
CONTROLS = ControlSettings({"wheel": {"width": 2, "kind": "continuous", "low": [-1, -1], "high": [1, 1]}}, 8, 2)

Ask = Callable[[FlowMapBackbone, Tensor], Tensor]


def conditions(controls: bool = False) -> Conditions:
    """Two prompts of other lengths, padded to eight tokens; controls of which some are unknown."""
    generator = torch.Generator().manual_seed(1)
    text = Text(torch.randn(2, 6, 32, generator=generator), torch.tensor([3, 5]), 8)
    text.embeddings[0, 3:] = text.embeddings[1, 5:] = 0
    told = torch.randn(2, FRAMES, 2, 2, generator=generator)
    told[0, 1] = float("nan")
    return Conditions(text, controls=told if controls else None)


def times(per_frame: bool = False) -> tuple[Tensor, Tensor]:
    t = torch.tensor([[0.0, 700.0, 300.0], [0.0, 950.0, 400.0]]) if per_frame else torch.tensor([900.0, 300.0])
    return t, 0.3 * t


def at_once(controls: bool = False, per_frame: bool = False) -> Ask:
    return lambda net, z: net(z, *times(per_frame), conditions(controls))


def odd(net: FlowMapBackbone, z: Tensor) -> Tensor:
    """One frame of five patches in a row: one rank of four has none."""
    return net(z[:, :1].flatten(3)[..., :20].unflatten(3, (2, 10)), *times(), conditions())


def in_chunks(controls: bool = False) -> Ask:
    """Compressed, noisy and clean frames under the mask of chunks."""
    layout = layout_of((1, 1, 1), 2)

    def ask(net: FlowMapBackbone, z: Tensor) -> Tensor:
        frames = layout.frames
        t = torch.linspace(100, 900, len(frames)).expand(2, -1)
        return net(z[:, frames], t, 0.3 * t, conditions(controls).of_frames(frames), layout=layout)

    return ask


def windowed(net: Any, z: Tensor) -> Tensor:
    """A chunk that looks back at what was taken down of two others."""
    window = net.look_back(z[:, :2].detach(), (1, 1), conditions(True).of_frames([0, 1]))
    assert isinstance(window.memories[0].key, Tensor)
    assert window.memories[0].key.shape[1:3] == (3 + 12, 4 // net.context.size), "all tokens, a share of the heads"
    return net(z[:, 2:], *times(), conditions(True).of_frames([2]), window=window)


def rollout(net: FlowMapBackbone, z: Tensor) -> Tensor:
    return torch.cat(list(net.generate(conditions(), z, ((1000.0, 800.0), (800.0, 500.0), (500.0, 0.0)))), dim=1)


def under(change: Callable[[FlowMapBackbone], Any], ask: Ask) -> Ask:
    """Asked of a network that was changed first."""

    def changed(net: FlowMapBackbone, z: Tensor) -> Tensor:
        change(net)
        return ask(net, z)

    return changed


def adapt(net: FlowMapBackbone) -> None:
    """Adapters on a frozen base, neither of whose factors is zero."""
    add_lora(net, LoraSettings(rank=2, alpha=2))
    for name, weight in net.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))


def compiled(net: FlowMapBackbone) -> None:
    compile_blocks(net, "eager")


def kept(net: FlowMapBackbone) -> None:
    checkpoint_activations(net, keep_attention=True)


CASES: dict[str, tuple[str, Ask]] = {
    "all at once": ("bidirectional", at_once()),
    "odd": ("bidirectional", odd),
    "a time a frame": ("bidirectional", at_once(per_frame=True)),
    "controls": ("bidirectional", at_once(controls=True)),
    "controls, a time a frame": ("bidirectional", at_once(True, True)),
    "checkpointed": ("bidirectional", under(checkpoint_activations, at_once())),
    "attention kept": ("bidirectional", under(kept, at_once())),
    "adapters": ("bidirectional", under(adapt, at_once())),
    "compiled": ("bidirectional", under(compiled, at_once())),
    "compiled, checkpointed": ("bidirectional", under(compiled, under(kept, at_once(per_frame=True)))),
    "rollout": ("bidirectional", under(checkpoint_activations, rollout)),
    "causal, all at once": ("causal", at_once()),
    "causal, chunks": ("causal", in_chunks()),
    "causal, chunks, controls, checkpointed": ("causal", under(checkpoint_activations, in_chunks(True))),
    "causal, compiled": ("causal", under(compiled, in_chunks())),
    "causal, window": ("causal", windowed),
    "causal, rollout": ("causal", rollout),
}


def network(architecture: str, ask: Ask) -> FlowMapBackbone:
    controls = CONTROLS if ask is not odd else None
    config = {**NETWORK, **(CHUNKS if architecture == "causal" else {})}
    net = new_backbone(config, 0, architecture, controls)
    generator = torch.Generator().manual_seed(2)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.15, generator=generator)
    return net


def outcome(architecture: str, ask: Ask, context: Context) -> dict[str, Tensor]:
    """The answer, the latents' gradient, and the weights' as ranks average them."""
    torch.manual_seed(0)
    net = network(architecture, ask)
    net.context = context
    z = torch.randn(2, FRAMES, 4, HEIGHT, WIDTH, requires_grad=True)
    answer = ask(net, z)
    (answer * torch.randn(answer.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    found = {"answer": answer.detach(), "latents": z.grad}
    for name, weight in net.named_parameters():
        if weight.requires_grad:
            found[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
    if context.size > 1:
        for name in found.keys() - {"answer", "latents"}:
            dist.all_reduce(found[name])
            found[name] /= context.size
    return found  # type: ignore[return-value]


def errors(one: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, float]:
    """Of everything, relative to the largest gradient."""
    assert one.keys() == shared.keys()
    scale = max(float(value.norm()) for name, value in one.items() if name not in ("answer", "latents"))
    norms = dict.fromkeys(one, scale) | {name: float(one[name].norm()) for name in ("answer", "latents")}
    return {name: float((value - shared[name]).norm()) / norms[name] for name, value in one.items()}


def _rank(rank: int, ranks: int, port: int, out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_ranks("cpu")
    context = join_context(ranks)
    found: dict[str, Any] = {name: errors(*(outcome(*CASES[name], who) for who in (ALONE, context))) for name in cases}
    if cases == list(CASES):
        found["jvp"] = _forward_derivative(context)
        found["tape"] = _taken_again(context)
        found["clips"] = _other_clips(rank, context)
    torch.save(found, out / f"{rank}.pt")
    leave_ranks()


def _forward_derivative(context: Context) -> float:
    """How far the forward-mode derivative along latents and times is from one rank's."""
    net = network("bidirectional", odd)
    z, dz = torch.randn(2, 2, FRAMES, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))
    t, r = times()
    results = []
    for net.context in (ALONE, context):
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            along = torch.func.jvp(lambda z, t: net(z, t, r, conditions()), (z, t), (dz, torch.ones(2)))
        results.append(along[1])
    return float((results[0] - results[1]).norm() / results[0].norm())


def _taken_again(context: Context) -> dict[str, float]:
    """The student's gradient of a rollout whose jumps are taken again, another role asked in between."""
    found = []
    for who in (ALONE, context):
        net = network("bidirectional", odd)
        checkpoint_activations(net)
        adapt(net)
        roles = AdapterRoles(net, LoraSettings(rank=2, alpha=2))
        net.context = who
        noise = torch.randn(2, FRAMES, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(6))
        tape = Tape(2)
        jumps = ((1000.0, 800.0), (800.0, 500.0), (500.0, 0.0))
        samples = torch.cat(list(roles.generate("student", conditions(), noise, jumps, tape.take)), dim=1)
        with torch.no_grad():
            target = roles("teacher", samples, *times(), conditions())
        (samples - target).square().mean().backward()
        tape.backward(lambda end, gradient: end.backward(gradient))
        gradients = {name: weight.grad for name, weight in roles.parameters("student") if weight.grad is not None}
        for gradient in gradients.values() if who.size > 1 else ():
            dist.all_reduce(gradient)
            gradient /= who.size
        found.append({"answer": samples.detach(), "latents": target, **gradients})
    return errors(*found)  # type: ignore[arg-type]


def _other_clips(rank: int, context: Context) -> str:
    context.check_same(["a", "b"])
    try:
        context.check_same(["a", "b" if rank == 0 else "c"])
    except UserError as error:
        return str(error)
    return ""


def on_some(ranks: int, out: Path, cases: list[str]) -> dict[str, Any]:
    on_ranks(_rank, (ranks, 32500 + os.getpid() % 1000 + ranks, out, cases), ranks)
    found = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    return {name: [each[name] for each in found] for name in found[0]}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    yield on_some(2, tmp_path_factory.mktemp("two"), list(CASES))


@pytest.mark.parametrize("case", [*CASES, "tape"])
def test_two_ranks_that_share_clips_are_one(case: str, two: dict[str, Any]) -> None:
    for found in two[case]:
        worst = max(found, key=found.get)
        assert found[worst] < 1e-5, (worst, found[worst])


def test_the_forward_derivative_is_that_of_one_rank(two: dict[str, Any]) -> None:
    assert max(two["jvp"]) < 1e-5


def test_ranks_that_read_other_clips_say_so(two: dict[str, Any]) -> None:
    assert all("hardware.context=2" in words and "b and c" in words for words in two["clips"])


@pytest.mark.slow
def test_of_four_ranks_one_has_padding_alone(tmp_path: Path) -> None:
    for case in on_some(4, tmp_path, ["odd", "causal, chunks"]).values():
        assert max(max(found.values()) for found in case) < 1e-5


def test_heads_that_cannot_be_dealt_out_are_refused(small_model: Path) -> None:
    """Also by whoever loads a recipe's networks."""
    check_heads(4, 12)
    words = [f"model.weights={small_model}", "hardware.devices=4", "hardware.context=4"]
    with pytest.raises(UserError, match=r"hardware.context=4 .* 6 attention heads.*context=2"):
        load_networks(load_recipe("finetune/driving", overrides=words))
    with pytest.raises(UserError, match=r"hardware.context=8 does not divide .* 12 attention heads.*context=4"):
        check_heads(8, 12)


def test_a_network_alone_takes_down_whole_heads() -> None:
    net: Any = network("causal", rollout)
    record = [Recorder() for _ in net.transformer.blocks]
    zeros = torch.zeros(2)
    clean = torch.randn(2, 2, 4, HEIGHT, WIDTH)
    net(clean, zeros, zeros, conditions(), layout=layout_of((1, 1), 1, noisy=False), record=record)
    assert record[0].memory.key.shape[2] == 4
