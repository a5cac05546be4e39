"""The causal network: one pass, cached and bidirectional, each against the others and against diffusers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import AnyFlowFARTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow.backbone.causal import CausalBackbone
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.lora import LoraSettings, add_lora
from anyflow.backbone.roles import AdapterRoles
from anyflow.backbone.segments import SegmentMask, segment_mask
from anyflow.flowmap.chunks import ChunkLayout, PathBatch, in_chunks, layout_of
from anyflow.flowmap.rollout import BackwardSimulation
from anyflow.flowmap.tape import Tape

PARTITIONS = [(1, 2, 2, 1), (2, 1), (1, 1, 1, 1, 1), (3,)]
"""With and without compressed context, at the limits below."""

MakeText = Callable[[list[int]], tuple[Conditions, Tensor]]


@pytest.fixture
def far(tiny_config) -> Callable[..., AnyFlowFARTransformer3DModel]:
    """diffusers' own network, all of its weights random and of no gradient (its attention has none on the CPU)."""

    def make(**changes: object) -> AnyFlowFARTransformer3DModel:
        torch.manual_seed(2)
        network = AnyFlowFARTransformer3DModel(**{**tiny_config, "chunk_partition": (1, 2, 2, 1), **changes})
        with torch.no_grad():
            network.far_patch_embedding.weight.add_(torch.randn_like(network.far_patch_embedding.weight), alpha=0.1)
        return network

    return make


def laid_out(
    chunks: tuple[int, ...], limit: int, size: tuple[int, int], batch: int = 2
) -> tuple[ChunkLayout, PathBatch]:
    clean, noise = torch.randn(2, batch, sum(chunks), 16, *size)
    times = torch.tensor([900.0, 300.0, 40.0])[:batch]
    layout = layout_of(chunks, limit)
    return layout, in_chunks(layout, PathBatch(clean, noise, times, times * 0.4))


def noisy(layout: ChunkLayout, frames: Tensor) -> Tensor:
    return frames[:, layout.context_frames :][:, : layout.full_frames]


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("chunks", PARTITIONS)
@pytest.mark.parametrize("size", [(8, 12), (6, 10)])
def test_cached_inference_equals_recomputation_at_every_chunk(far, make_text: MakeText, limit, chunks, size) -> None:
    """Each jump of each chunk of a rollout, asked again in one uncached pass over the chunks so far."""
    backbone, (told, _) = CausalBackbone(far(full_chunk_limit=limit)), make_text([3, 7])
    done: list[Tensor] = []
    asked = 0

    @torch.no_grad()
    def check(z: Tensor, t: Tensor, r: Tensor, told: Conditions, **view: object) -> Tensor:
        nonlocal asked
        answer = backbone(z, t, r, told, **view)
        if "record" in view:
            return answer
        asked += 1
        so_far = chunks[: len(done) + 1]
        layout = layout_of(so_far, limit)
        clean = torch.cat([*done, z], dim=1)
        on_path = in_chunks(layout, PathBatch(clean, clean, t, r))  # the chunk's own clean copy is seen by nobody
        again = noisy(layout, backbone(on_path.clean, on_path.timestep, on_path.r_timestep, told, layout=layout))
        torch.testing.assert_close(answer, again[:, -z.shape[1] :], atol=1e-5, rtol=1e-5)
        return answer

    noise = torch.randn(2, sum(chunks), 16, *size)
    for part in backbone.generate(told, noise, [(1000.0, 500.0), (500.0, 0.0)], ask=check, chunks=chunks):
        done.append(part)
    assert asked == 2 * len(chunks)


@pytest.mark.parametrize("delta", ["r", "t-r"])
@pytest.mark.parametrize(("chunks", "limit"), [((1, 2, 2, 1), 2), ((1, 2), 3), ((2, 2, 1), 3)])
def test_the_training_pass_equals_diffusers(far, make_text: MakeText, chunks, limit, delta) -> None:
    stock = far(full_chunk_limit=limit, deltatime_type=delta).requires_grad_(False)
    told, full = make_text([3, 7])
    layout, on_path = laid_out(chunks, limit, (8, 12))
    context, last = layout.context_frames, layout.context_frames + layout.full_frames
    expected = stock(
        on_path.clean.where(on_path.timestep[..., None, None, None] == 0, on_path.noise)[:, :last],
        on_path.timestep[:, :last],
        on_path.r_timestep[:, :last],
        full,
        chunk_partition=list(chunks),
        clean_hidden_states=on_path.clean[:, last:],
        clean_timestep=torch.zeros(2, layout.full_frames),
        return_dict=False,
    )[0]
    z = on_path.clean.where(on_path.timestep[..., None, None, None] == 0, on_path.noise)
    got = CausalBackbone(copy.deepcopy(stock))(z, on_path.timestep, on_path.r_timestep, told, layout=layout)
    torch.testing.assert_close(got[:, context:last], expected, atol=1e-5, rtol=1e-5)
    assert not got[:, :context].any() and not got[:, last:].any()


def test_the_bidirectional_mode_is_one_chunk_of_all_frames(far, make_text: MakeText) -> None:
    stock = far().requires_grad_(False)
    told, full = make_text([3, 7])
    latents, t = torch.randn(2, 4, 16, 8, 12), torch.tensor([900.0, 30.0])
    spread = t[:, None].expand(-1, 4)
    expected = stock(latents, spread, spread * 0.5, full, chunk_partition=[4], return_dict=False)[0]
    backbone = CausalBackbone(copy.deepcopy(stock))
    torch.testing.assert_close(backbone(latents, t, t * 0.5, told), expected, atol=1e-5, rtol=1e-5)
    per_frame = backbone(latents, spread.contiguous(), spread * 0.5, told)
    torch.testing.assert_close(per_frame, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "flex"])
def test_all_kinds_of_attention_are_equal(far, make_text: MakeText, kind) -> None:
    told, _ = make_text([3, 7])
    layout, on_path = laid_out((1, 2, 2, 1), 2, (8, 12))
    answers, gradients = [], []
    for attention in ("segments", kind):
        backbone = CausalBackbone(far(full_chunk_limit=2), attention=attention)
        backbone.requires_grad_(kind != "flex")  # which has no backward pass on the CPU
        answer = backbone(on_path.noise, on_path.timestep, on_path.r_timestep, told, layout=layout)
        answers.append(answer.detach())
        if kind != "flex":
            answer.square().mean().backward()
            gradients.append([weight.grad for weight in backbone.parameters()])
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
    for one, other in zip(*gradients, strict=True) if gradients else ():
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_who_sees_whom() -> None:
    """Chunks a (compressed), B and C: noisy ones see themselves and clean earlier ones, clean ones no noise."""
    mask = segment_mask(layout_of((1, 2, 1), 2), full_tokens=4, compressed_tokens=1, kind="segments")
    names = ["a", "B noisy", "C noisy", "B", "C"]
    seen = {name: [names[run] for run in runs] for name, runs in zip(names, mask.reads, strict=True)}
    assert seen == {
        "a": ["a"],
        "B noisy": ["a", "B noisy"],
        "C noisy": ["a", "C noisy", "B"],
        "B": ["a", "B"],
        "C": ["a", "B", "C"],
    }
    assert mask.lengths == (1, 8, 4, 8, 4)
    assert SegmentMask((1, 2), ((0,), (0, 1))).dense(torch.device("cpu")).tolist() == [
        [True, False, False],
        [True, True, True],
        [True, True, True],
    ]


def test_later_frames_change_no_earlier_chunk(far, make_text: MakeText) -> None:
    backbone, (told, _) = CausalBackbone(far()), make_text([3, 7])
    layout, on_path = laid_out((1, 2, 2), 3, (8, 12))
    other = on_path.clean.clone()
    other[:, [3, 4, 8, 9]] += 1  # the last chunk, noisy and clean
    first, second = (
        backbone(clean, on_path.timestep, on_path.r_timestep, told, layout=layout) for clean in (on_path.clean, other)
    )
    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3:5], second[:, 3:5])


def rollout_gradients(backbone: CausalBackbone, told: Conditions, ask=None) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[no-untyped-def]
    torch.manual_seed(7)
    noise, probe = torch.randn(2, 2, 6, 16, 8, 8)
    jumps = BackwardSimulation(4, 1).jumps
    samples = torch.cat(list(backbone.generate(told, noise, jumps, ask=ask)), dim=1)
    (samples * probe).sum().backward()
    named = backbone.named_parameters()
    return samples.detach(), {name: weight.grad for name, weight in named if weight.grad is not None}


def test_gradients_of_a_rollout_are_exact_under_checkpointing(far, make_text: MakeText) -> None:
    """The cache that a chunk's forward read is the one that its recomputation reads, several chunks later."""
    told, _ = make_text([3, 7])
    plain = rollout_gradients(CausalBackbone(far()), told)
    recomputed = rollout_gradients(CausalBackbone(far(), gradient_checkpointing=True), told)
    assert torch.equal(plain[0], recomputed[0])
    assert plain[1].keys() == recomputed[1].keys() and len(plain[1]) > 20
    for name, gradient in plain[1].items():
        torch.testing.assert_close(recomputed[1][name], gradient, atol=0, rtol=1e-5, msg=name)


def test_gradients_of_a_role_are_exact_under_checkpointing(far, make_text: MakeText) -> None:
    """Student's rollout on a shared base, the critic speaking before the backward pass runs blocks, or jumps, again."""
    told, _ = make_text([3, 7])
    results = []
    for checkpointing, tape in ((False, Tape(0)), (True, Tape(0)), (True, Tape(4)), (False, Tape())):
        backbone = CausalBackbone(far(), gradient_checkpointing=checkpointing)
        add_lora(backbone, LoraSettings(rank=2, alpha=2))
        roles = AdapterRoles(backbone, LoraSettings(rank=2, alpha=2))
        torch.manual_seed(5)
        for name, weight in backbone.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(weight, std=0.1)
        noise, probe = torch.randn(2, 2, 6, 16, 8, 8)
        jumps = BackwardSimulation(4, 1).jumps
        samples = torch.cat(list(roles.generate("student", told, noise, jumps, take=tape.take)), dim=1)
        times = torch.tensor([500.0, 100.0])
        roles("critic", samples, times, times, told)  # all frames at once
        (samples * probe).sum().backward()
        tape.backward(lambda end, gradient: end.backward(gradient))
        gradients = {name: weight.grad for name, weight in roles.parameters("student")}
        assert all(weight.grad is None for _, weight in roles.parameters("critic"))
        results.append((samples.detach(), gradients))
    (kept, expected), *others = results
    assert any(gradient.any() for gradient in expected.values())
    for samples, found in others:
        assert torch.equal(kept, samples)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def test_no_gradient_crosses_from_chunk_to_chunk(far, make_text: MakeText) -> None:
    backbone, (told, _) = CausalBackbone(far()), make_text([3])
    noise = torch.randn(1, 6, 16, 8, 8, requires_grad=True)
    *_, last = backbone.generate(told, noise, [(1000.0, 0.0)])
    [gradient] = torch.autograd.grad(last.sum(), noise)
    assert gradient[:, -1:].any() and not gradient[:, :-1].any()


def test_given_frames_are_kept_and_sampling_starts_after_them(far, make_text: MakeText) -> None:
    backbone, (told, _) = CausalBackbone(far()), make_text([3])
    noise, known = torch.randn(1, 6, 16, 8, 8), torch.randn(1, 2, 16, 8, 8)
    parts = list(backbone.generate(told._replace(first_frames=known), noise, [(1000.0, 0.0)]))
    assert [part.shape[1] for part in parts] == [1, 1, 1, 2, 1]
    whole = torch.cat(parts, dim=1)
    assert torch.equal(whole[:, :2], known)
    other = backbone.sample(told._replace(first_frames=known + 1), noise, 1, 5.0)
    assert not torch.allclose(other[:, 2:], whole[:, 2:])


def test_long_videos_move_their_window(far, make_text: MakeText) -> None:
    """Past the trained length (6 frames) a chunk of 2 looks back at 4, and at the positions that it was trained at."""
    backbone, (told, _) = CausalBackbone(far(full_chunk_limit=2)), make_text([3])
    frames: list[int] = []
    backbone.register_forward_pre_hook(
        lambda _, inputs, view: frames.append(inputs[0].shape[1]) if "record" in view else None, with_kwargs=True
    )
    noise = torch.randn(1, 20, 16, 8, 8)
    parts = list(backbone.generate(told, noise, [(1000.0, 0.0)]))
    assert sum(part.shape[1] for part in parts) == 20
    assert frames == [1, 3, *[4] * 8]
    history = torch.cat(parts[7:9], dim=1)
    window = backbone.look_back(history, (2, 2), told)
    t = torch.full((1,), 1000.0)
    again = noise[:, 17:19] - backbone(noise[:, 17:19], t, 0 * t, told, window=window)
    torch.testing.assert_close(again, parts[9], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [0, 1, 3])
def test_network_calls_are_known_beforehand(far, make_text: MakeText, given: int) -> None:
    backbone, (told, _) = CausalBackbone(far(full_chunk_limit=2)), make_text([3])
    asked: list[Tensor] = []
    backbone.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    noise = torch.randn(1, 6, 16, 8, 8)
    told = told._replace(first_frames=noise[:, :given] if given else None)
    backbone.sample(told, noise, 3, 5.0)
    assert len(asked) == backbone.calls_of(3, 6, given)


def test_the_wrapped_transformer_still_serves_diffusers(far, make_text: MakeText) -> None:
    latents, full = torch.randn(2, 3, 16, 8, 12), make_text([3, 4])[1]
    stock = far().requires_grad_(False)
    t = torch.full((2, 3), 500.0)
    expected = stock(latents, t, t, full, chunk_partition=[1, 2], return_dict=False)[0]
    wrapped = CausalBackbone(copy.deepcopy(stock)).transformer
    got = wrapped(latents, t, t, full, chunk_partition=[1, 2], return_dict=False)[0]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_forward_mode_derivative_equals_the_finite_difference(far, make_text: MakeText) -> None:
    """Along the path of a on_path: given frames stay where they are."""
    backbone, (told, _) = CausalBackbone(far().double()), make_text([3, 7])
    layout, on_path = laid_out((1, 2, 2, 1), 2, (8, 8))
    moving = (on_path.timestep > 0).double()
    z, direction = on_path.noise.double(), torch.randn_like(on_path.noise).double() * moving[..., None, None, None]
    t, r = on_path.timestep.double(), on_path.r_timestep.double()

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        return backbone(z, t, r, told, layout=layout)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(velocity, (z, t), (direction / 1000, moving))
        step = 0.1
        ahead = velocity(z + direction * step / 1000, t + moving * step)
        behind = velocity(z - direction * step / 1000, t - moving * step)
    difference = (ahead - behind) / (2 * step)
    assert (derivative - difference).norm() / difference.norm() < 0.05


def test_tables_made_while_sampling_serve_training(far, make_text: MakeText) -> None:
    backbone, (told, _) = CausalBackbone(far()), make_text([3, 7])
    layout, on_path = laid_out((1, 2, 2, 1), 3, (8, 8))
    arguments = (on_path.noise, on_path.timestep, on_path.r_timestep, told)
    with torch.inference_mode():
        backbone(*arguments, layout=layout)
    backbone(*arguments, layout=layout).sum().backward()


def test_what_does_not_fit_is_refused(far, make_text: MakeText) -> None:
    backbone, (told, _) = CausalBackbone(far()), make_text([3])
    t = torch.zeros(1)
    with pytest.raises(ValueError, match="latents have 3 frames"):
        backbone(torch.randn(1, 3, 16, 8, 8), t, t, told, layout=ChunkLayout((), (1, 1)))
    with pytest.raises(ValueError, match="patches of one frame"):
        CausalBackbone(far(patch_size=(2, 2, 2), compressed_patch_size=(2, 4, 4)))


def test_bfloat16_keeps_times_in_float32_and_stays_near(far, make_text: MakeText) -> None:
    told, _ = make_text([3, 7])
    layout, on_path = laid_out((1, 2, 2), 2, (8, 12))
    arguments = (on_path.noise, on_path.timestep, on_path.r_timestep, told)
    expected = CausalBackbone(far())(*arguments, layout=layout)
    half = CausalBackbone(far()).to(torch.bfloat16)
    got = half(*arguments, layout=layout)
    assert got.dtype == torch.float32 and half.transformer.far_patch_embedding.weight.dtype == torch.bfloat16
    assert (got - expected).norm() / expected.norm() < 0.02
    parts = list(half.generate(told, torch.randn(2, 6, 16, 8, 12), [(1000.0, 0.0)]))
    assert all(part.isfinite().all() for part in parts)
