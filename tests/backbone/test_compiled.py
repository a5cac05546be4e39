"""Compiled blocks: answers and gradients of the stock blocks, and a word wherever something is not compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow.backbone import compiled, parallelize
from anyflow.backbone.compiled import compile_blocks, graph_count, pieces, take_apart
from anyflow.backbone.lora import add_lora
from anyflow.backbone.parallelize import checkpoint_activations
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.roles import ROLES

from .test_roles import LORA, apart, gradients, network, question, shake, shared


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    def forget() -> None:
        torch._dynamo.reset()
        pieces.cache_clear()
        compiled._tell.cache_clear()

    forget()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    forget()


def compile_here(backbone: FlowMapBackbone) -> FlowMapBackbone:
    compile_blocks(backbone, "eager")
    return backbone


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "hardware.compile" in line]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_roles_switch_in_the_middle(checkpointing: bool) -> None:
    """Catches an adapter that is looked up when a block is compiled, or anew when it is recomputed."""
    plain, roles = shared(checkpointing=checkpointing), shared(checkpointing=checkpointing)
    compile_here(roles.student)
    expected, found = gradients(plain, interrupt=True), gradients(roles, interrupt=True)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
    latents, timestep, r_timestep, conditions = question()
    with torch.no_grad():
        for role in ROLES:
            answer = roles(role, latents, timestep, r_timestep, conditions)
            torch.testing.assert_close(answer, apart(roles, role)(latents, timestep, r_timestep, conditions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_the_stock_block(dtype: torch.dtype) -> None:
    """Catches a missing gate, norm, residual or cast in the two functions that stand for the block's own forward."""
    plain = network().to(dtype)
    twin = compile_here(network().to(dtype))
    latents, timestep, _, conditions = question()
    for times in (timestep, timestep[:, None].repeat(1, 3)):
        ends = times * 0.5
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            expected, found = (net(latents, times, ends, conditions) for net in (plain, twin))
        assert torch.equal(found, expected)
    assert twin.state_dict().keys() == plain.state_dict().keys()


def test_blocks_share_their_graphs() -> None:
    """Catches a graph per block, and one per network."""
    before = graph_count()
    with torch.no_grad():
        for seed in (0, 1):
            compile_here(network(seed))(*question())
    assert graph_count() - before == 2


@pytest.mark.parametrize("is_compiled", [False, True])
def test_kept_attention_is_what_is_kept(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a policy that sees the whole block (compiling would be off, or looked into), or no attention at all."""
    seen: list[Any] = []
    policy = parallelize._keep_attention

    def watch(context: Any, operator: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(operator)
        return policy(context, operator, *arguments, **options)

    monkeypatch.setattr(parallelize, "_keep_attention", watch)
    found, expected = network(), network()
    checkpoint_activations(found, keep_attention=True)
    if is_compiled:
        compile_here(found)
    for net in (found, expected):
        net(*question()).square().mean().backward()
    attentions = [operator for operator in seen if operator in parallelize._ATTENTION]
    assert len(attentions) == (2 if is_compiled else 4)  # of two blocks: to the video, and to the text where it is seen
    assert not any("mm" in str(operator) for operator in seen)
    weights = dict(found.named_parameters())
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(weights[name].grad, weight.grad, rtol=1e-6, atol=1e-7)


def answers(capsys: pytest.CaptureFixture[str], backbone: FlowMapBackbone, *asked: Any) -> list[str]:
    """Asked twice, a network answers as its uncompiled twin; what it told meanwhile."""
    found = [backbone(*asked) for _ in range(2)]
    told_now = told(capsys)
    expected = network()(*asked)
    for answer in found:
        torch.testing.assert_close(answer, expected, rtol=1e-6, atol=1e-6)
    return told_now


def test_too_many_graphs_are_told_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a limit that is met in silence, and answers that suffer from it."""
    monkeypatch.setattr(compiled, "LIMIT", 1)
    torch._dynamo.config.recompile_limit = 1
    backbone = compile_here(network())
    with torch.no_grad():
        backbone(*question())
    assert not told(capsys)
    sentences = answers(capsys, backbone, *question())  # with gradient: a second graph
    assert [sentence.split()[2] for sentence in sentences] == ["before_attention", "after_attention"]
    assert all("more than 1 ways" in sentence and "hardware.compile=false" in sentence for sentence in sentences)


def test_what_cannot_be_compiled_is_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a failing compiler (here: a graph break) that ends the run, or passes in silence."""
    attend = compiled.attend

    def breaking(*arguments: Any) -> Tensor:
        torch._dynamo.graph_break()
        return attend(*arguments)

    monkeypatch.setattr(compiled, "attend", breaking)
    [sentence] = answers(capsys, compile_here(network()), *question())
    assert "after_attention is not compiled from here on (Unsupported" in sentence


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_mode_that_turns_compiling_off_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the frames that torch.compile skips without an error of its own."""
    with _Mode():
        sentences = answers(capsys, compile_here(network()), *question())
    assert len(sentences) == 2 and all("found no compiled frames" in sentence for sentence in sentences)


def test_a_forward_mode_derivative_goes_uncompiled_and_the_rest_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a crash of stage.derivative=jvp, and compiling that is off for good after it."""
    plain, twin = network(), compile_here(network())
    latents, timestep, r_timestep, conditions = question()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found, expected = (
            torch.func.jvp(lambda z, n=net: n(z, timestep, r_timestep, conditions), (latents,), (latents,))[1]
            for net in (twin, plain)
        )
    torch.testing.assert_close(found, expected)
    [sentence] = told(capsys)
    assert "jvp" in sentence
    before = graph_count()
    twin(latents, timestep, r_timestep, conditions)
    assert graph_count() == before + 2 and not told(capsys)


def test_an_unknown_layer_is_told_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a layer of another kind that is taken for a plain one (two adapters that speak at once)."""
    backbones = [network(), network()]
    for backbone in backbones:
        add_lora(backbone, LORA)
        add_lora(backbone, LORA, adapter="second")
        shake(((n, w) for n, w in backbone.named_parameters() if ".lora_" in n), 4)
        for layer in backbone.modules():
            if hasattr(layer, "_active_adapter"):
                layer._active_adapter = ["default", "second"]
    plain, twin = backbones
    assert torch.equal(compile_here(twin)(*question()), plain(*question()))
    [sentence] = told(capsys)
    assert "Linear" in sentence
    assert take_apart(twin.transformer.blocks[0]) is None


def test_a_pipeline_still_runs_compiled_blocks() -> None:
    """Catches a block that knows this project's arguments alone: a pipeline calls it with its own."""
    plain, twin = network().transformer, compile_here(network()).transformer
    latents, timestep, _, conditions = question()
    times = timestep[:, None].repeat(1, 3)
    found, expected = (net(latents, times, times, conditions.text.embeddings).sample for net in (twin, plain))
    assert torch.equal(found, expected)


def test_compiled_code_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps hundreds of megabytes of it in the folder for temporary files, which may be small."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "theirs")
    compile_here(network())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "theirs", "what the user has set stays"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_here(network())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".cache" / "anyflow" / "compiled")
