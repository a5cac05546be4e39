"""The bidirectional network gives diffusers' numbers, whatever the wrapper saves."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AnyFlowTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow.backbone.attention import padding_bias, with_spare_token
from anyflow.backbone.bidirectional import FLOAT32_PARTS, BidirectionalBackbone
from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.load import new_backbone

B, F, C, H, W = 3, 2, 16, 8, 12
T, R = torch.tensor([900.0, 500.0, 3.0]), torch.tensor([900.0, 20.0, 0.0])


def reference(stock: AnyFlowTransformer3DModel, latents: Tensor, t: Tensor, r: Tensor, full: Tensor) -> Tensor:
    frames = latents.shape[1]
    t, r = (time if time.ndim == 2 else time[:, None].expand(-1, frames) for time in (t, r))
    return stock(latents, t.reshape(t.shape), r.reshape(r.shape), full, return_dict=False)[0]


def test_shared_times_equal_diffusers(stock, make_text) -> None:
    told, full = make_text([1, 12, 5])
    latents = torch.randn(B, F, C, H, W)
    expected = reference(stock, latents, T, R, full)
    got = BidirectionalBackbone(copy.deepcopy(stock))(latents, T, R, told)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("delta", ["r", "t-r"])
def test_times_of_each_frame_equal_diffusers(tiny_config, make_text, delta) -> None:
    stock = AnyFlowTransformer3DModel(**tiny_config, deltatime_type=delta)
    told, full = make_text([4, 4, 2])
    latents, t = torch.randn(B, F, C, H, W), torch.rand(B, F) * 1000
    r = t * torch.rand(B, F)
    expected = reference(stock, latents, t, r, full)
    got = BidirectionalBackbone(copy.deepcopy(stock))(latents, t, r, told)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 100, 511, 512])
def test_folded_padding_equals_padding(stock, make_text, length) -> None:
    told, full = make_text([length])
    latents = torch.randn(1, F, C, H, W)
    backbone = BidirectionalBackbone(stock)
    as_given = backbone(latents, T[:1], R[:1], Conditions(Text(full, None, 512)))
    folded = backbone(latents, T[:1], R[:1], told)
    torch.testing.assert_close(folded, as_given, atol=1e-5, rtol=1e-5)
    assert told.text.embeddings.shape[1] <= length + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_weighs_what_it_should_in_every_precision(dtype) -> None:
    """The exponentials of the biases must add up to the padding tokens: log(n) in bfloat16 misses by 1.5 %."""
    lengths = torch.arange(1, 513)
    text = with_spare_token(Text(torch.zeros(512, 512, 1, dtype=dtype), lengths, 512))
    bias = padding_bias(text, dtype)
    assert bias.dtype == dtype and bias.shape == (512, 1, 1, 513)
    weight = bias.float().exp().squeeze()
    real = torch.arange(513) < lengths[:, None]
    assert (weight[real] == 1).all()
    padding = weight.masked_fill(real, 0).sum(1)
    torch.testing.assert_close(padding, (512 - lengths).float(), rtol=1e-3, atol=0)


def test_wrong_times_are_refused(stock, make_text) -> None:
    told, _ = make_text([1, 1, 1])
    with pytest.raises(ValueError, match=r"\[B\] or \[B, F\]"):
        BidirectionalBackbone(stock)(torch.randn(B, F, C, H, W), T, R[:, None].expand(B, F), told)


def test_the_wrapped_transformer_still_serves_diffusers(stock, make_text) -> None:
    """A pipeline built on ``backbone.transformer`` calls its own forward, with complex frequencies and plain text."""
    latents, full = torch.randn(B, F, C, H, W), make_text([3, 4, 5])[1]
    expected = reference(stock, latents, T, R, full)
    wrapped = BidirectionalBackbone(copy.deepcopy(stock)).transformer
    torch.testing.assert_close(reference(wrapped, latents, T, R, full), expected, atol=1e-6, rtol=1e-6)


def test_bfloat16_keeps_times_and_adapters_in_float32(stock, make_text) -> None:
    """Cast through a parent, as a trainer does. Times 0.25 apart are one number in bfloat16, but not here."""
    backbone = BidirectionalBackbone(stock)
    exact = {name: weight.clone() for name, weight in stock.state_dict().items()}
    nn.ModuleList([backbone]).to(torch.bfloat16)
    for name, parameter in stock.named_parameters():
        kept = any(part in name for part in FLOAT32_PARTS)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        if kept:
            assert torch.equal(parameter, exact[name]), name
    assert stock.condition_embedder.delta_emb_gate.dtype == torch.float32
    told, _ = make_text([3])
    latents = torch.randn(1, F, C, H, W)
    outputs = [backbone(latents, torch.tensor([t]), torch.tensor([0.0]), told) for t in (900.0, 900.25)]
    assert outputs[0].dtype == torch.float32
    assert not torch.equal(*outputs)


def test_bfloat16_stays_near_float32(stock, make_text) -> None:
    told, full = make_text([1, 12, 5])
    latents = torch.randn(B, F, C, H, W)
    expected = reference(stock, latents, T, R, full)
    got = BidirectionalBackbone(copy.deepcopy(stock)).to(torch.bfloat16)(latents, T, R, told)
    assert (got - expected).norm() / expected.norm() < 0.02


def test_autocast_leaves_times_alone(stock, make_text) -> None:
    backbone, (told, _) = BidirectionalBackbone(stock), make_text([3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding, modulation = backbone._embed_times(T, R, 1)
        assert backbone(torch.randn(1, F, C, H, W), T[:1], R[:1], told).isfinite().all()
    exact = backbone._embed_times(T, R, 1)
    assert torch.equal(embedding, exact[0]) and torch.equal(modulation, exact[1])


def test_gradient_checkpointing_changes_no_gradient(stock, make_text) -> None:
    told, _ = make_text([1, 12, 5])
    latents = torch.randn(B, F, C, H, W)
    gradients = []
    for checkpointing in (False, True):
        backbone = BidirectionalBackbone(copy.deepcopy(stock), gradient_checkpointing=checkpointing)
        embeddings = told.text.embeddings.clone().requires_grad_()
        backbone(latents, T, R, Conditions(told.text._replace(embeddings=embeddings))).square().mean().backward()
        gradients.append([embeddings.grad, *(parameter.grad for parameter in backbone.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-7, rtol=1e-5)


def test_forward_mode_derivative_equals_the_finite_difference(stock, make_text) -> None:
    backbone = BidirectionalBackbone(stock)
    told, _ = make_text([1, 12, 5])
    latents, direction = torch.randn(B, F, C, H, W), torch.randn(B, F, C, H, W)
    t, r, step = torch.tensor([900.0, 500.0, 300.0]), torch.tensor([100.0, 20.0, 0.0]), 0.5

    def velocity(z: Tensor, time: Tensor) -> Tensor:
        return backbone(z, time, r, told)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tangent = (direction / 1000, torch.ones_like(t))
        _, derivative = torch.func.jvp(velocity, (latents, t), tangent)
        ahead = velocity(latents + direction * step / 1000, t + step)
        behind = velocity(latents - direction * step / 1000, t - step)
    difference = (ahead - behind) / (2 * step)
    assert (derivative - difference).norm() / difference.norm() < 0.05


def test_a_table_of_positions_made_while_sampling_serves_training(stock, make_text) -> None:
    backbone, (told, _) = BidirectionalBackbone(stock), make_text([2])
    latents = torch.randn(1, F, C, H, W)
    with torch.inference_mode():
        backbone(latents, T[:1], R[:1], told)
    backbone(latents, T[:1], R[:1], told).sum().backward()


def test_a_new_network_is_reproducible_and_starts_at_zero(tiny_config, make_text) -> None:
    state = torch.get_rng_state()
    first, second, other = (new_backbone(tiny_config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [backbone.transformer.blocks[0].attn1.to_q.weight for backbone in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    embedder = first.transformer.condition_embedder
    assert torch.equal(embedder.time_embedder.linear_1.weight, embedder.delta_embedder.linear_1.weight)
    assert not first(torch.randn(1, F, C, H, W), T[:1], R[:1], make_text([1])[0]).any()
