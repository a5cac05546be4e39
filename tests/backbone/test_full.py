"""Modules trained in full beside adapters: trained, exported and loaded back, and seen by their own role alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnyFlowFARTransformer3DModel
from torch import Tensor

from anyflow.backbone.causal import CausalBackbone
from anyflow.backbone.export import export_lora
from anyflow.backbone.files import LORA_FILE
from anyflow.backbone.full import FULL_FILE, FullModule
from anyflow.backbone.load import load_backbone, new_backbone
from anyflow.backbone.lora import (
    LoraSettings,
    add_lora,
    load_lora,
    lora_full_state,
    lora_settings,
    lora_state,
    merged_state,
)
from anyflow.backbone.parallelize import gather_state, load_parts
from anyflow.backbone.roles import ROLES, AdapterRoles, Role
from anyflow.errors import UserError
from anyflow.flowmap.chunks import layout_of

FAR = "far_patch_embedding"
SETTINGS = LoraSettings(rank=4, alpha=8, full=(FAR,))
LAYOUT = layout_of((1, 1, 2), 2)
"""Of three chunks the oldest is compressed: it comes through the patch embedding that is trained in full."""


@pytest.fixture
def far(tiny_config: dict[str, Any]) -> AnyFlowFARTransformer3DModel:
    torch.manual_seed(2)
    return AnyFlowFARTransformer3DModel(**tiny_config, chunk_partition=[1, 1, 2], full_chunk_limit=2)


@torch.no_grad()
def shake(weights: Any, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=size)


def trained(far: Any, settings: LoraSettings = SETTINGS, seed: int = 1) -> CausalBackbone:
    """A network whose adapter and patch embedding have moved."""
    backbone = CausalBackbone(copy.deepcopy(far))
    add_lora(backbone, settings)
    shake([weight for weight in backbone.parameters() if weight.requires_grad], seed)
    return backbone


@pytest.fixture
def question(make_text: Any) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, LAYOUT.num_frames, 16, 8, 8, generator=generator)
    t = torch.rand(2, LAYOUT.num_frames, generator=generator) * 1000
    return latents, t, t * 0.5, make_text([3, 9])[0]


def test_a_copy_changes_nothing_and_is_trained_beside_the_adapter(far: Any, question: Any) -> None:
    backbone = CausalBackbone(copy.deepcopy(far))
    before = backbone(*question, layout=LAYOUT)
    adapters = add_lora(CausalBackbone(copy.deepcopy(far)), LoraSettings(rank=4, alpha=8))
    assert add_lora(backbone, SETTINGS) == adapters + 48 * (16 * 16 + 1)
    assert torch.equal(backbone(*question, layout=LAYOUT), before)
    backbone(*question, layout=LAYOUT).square().mean().backward()
    patch = backbone.transformer.far_patch_embedding
    assert isinstance(patch, FullModule) and patch.weight is patch.base_layer.weight
    assert all(weight.grad.any() for weight in patch.lora_full["default"].parameters())
    assert not any(weight.requires_grad for weight in patch.base_layer.parameters())
    assert lora_settings(backbone).full == (FAR,)


@pytest.mark.parametrize("module", [FAR, "attn1.norm_q", "text_embedder", "proj_out"])
def test_copies_are_float32_on_a_bfloat16_base(far: Any, question: Any, module: str) -> None:
    """Anything else would swallow small updates; and the network's own precision goes on around them."""
    backbone = CausalBackbone(far).to(torch.bfloat16)
    add_lora(backbone, LoraSettings(rank=4, alpha=8, full=(module,)))
    backbone.to(torch.bfloat16)
    own = [weight for name, weight in backbone.named_parameters() if ".lora_full." in name]
    assert own and {weight.dtype for weight in own} == {torch.float32} and backbone.dtype == torch.bfloat16
    backbone(*question, layout=LAYOUT).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in own)
    with torch.autocast("cpu", torch.bfloat16):
        backbone(*question, layout=LAYOUT).square().mean().backward()


@torch.no_grad()
def test_an_export_comes_back_with_both_files(far: Any, question: Any, tmp_path: Path) -> None:
    """By file, by folder, by a run's folder; on a network that lies in memory and on one whose weights still do not."""
    source = trained(far)
    expected = source(*question, layout=LAYOUT)
    file = export_lora(tmp_path / "run" / "lora", source)
    (tmp_path / "run" / "recipe.yaml").touch()
    for path in (file, file.parent, tmp_path / "run"):
        backbone = CausalBackbone(copy.deepcopy(far))
        load_lora(backbone, path)
        assert torch.equal(backbone(*question, layout=LAYOUT), expected)
        assert [n for n, w in backbone.named_parameters() if w.requires_grad] == [
            n for n, w in source.named_parameters() if w.requires_grad
        ]
    far.save_pretrained(tmp_path / "base")
    stored = load_backbone(tmp_path / "base", leave_stored=True)
    load_lora(stored, file)
    load_parts(stored, torch.device("cpu"))
    assert torch.equal(stored(*question, layout=LAYOUT), expected)


def test_weights_that_still_lie_in_files_come_as_float32_copies(far: Any, question: Any, tmp_path: Path) -> None:
    """A bfloat16 base built on meta: the copy starts from what is stored, not from what bfloat16 leaves of it."""
    far.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, dtype=torch.bfloat16, leave_stored=True)
    add_lora(backbone, SETTINGS)
    load_parts(backbone, torch.device("cpu"))
    patch = backbone.transformer.far_patch_embedding
    assert torch.equal(patch.lora_full["default"].weight, far.far_patch_embedding.weight)
    assert torch.equal(patch.base_layer.weight, far.far_patch_embedding.weight.bfloat16())
    assert patch.lora_full["default"].weight.requires_grad and not patch.base_layer.weight.requires_grad
    backbone(*question, layout=LAYOUT).sum().backward()


def test_half_of_an_export_is_refused(far: Any, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """The adapter alone would load, and sample with a patch embedding that it was not trained with."""
    export_lora(tmp_path, trained(far))
    with pytest.raises(UserError, match=r"does not fit this network: it has far_patch_embedding"):
        load_lora(new_backbone(tiny_config, 0), tmp_path)
    (tmp_path / FULL_FILE).write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be read"):
        load_lora(CausalBackbone(copy.deepcopy(far)), tmp_path)
    (tmp_path / FULL_FILE).unlink()
    with pytest.raises(
        UserError, match=r"full_weights.safetensors is missing: far_patch_embedding was trained in full"
    ):
        load_lora(CausalBackbone(copy.deepcopy(far)), tmp_path)
    other = AnyFlowFARTransformer3DModel(**tiny_config, compressed_patch_size=[1, 2, 4], full_chunk_limit=2)
    export_lora(tmp_path, trained(far))
    with pytest.raises(UserError, match=r"far_patch_embedding\.weight differs"):
        load_lora(CausalBackbone(other), tmp_path)
    export_lora(tmp_path, trained(far, LoraSettings(rank=4, alpha=8)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LORA_FILE], "nothing of an earlier export is left"
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / LORA_FILE).unlink()
    with pytest.raises(UserError, match="a run without an adapter: let it finish"):
        load_lora(CausalBackbone(copy.deepcopy(far)), tmp_path)


@torch.no_grad()
def test_merging_takes_what_was_trained(far: Any, question: Any) -> None:
    backbone = trained(far)
    expected = backbone(*question, layout=LAYOUT)
    merged = merged_state(backbone.transformer)
    assert merged.keys() == far.state_dict().keys()
    plain = CausalBackbone(copy.deepcopy(far))
    plain.transformer.load_state_dict(merged)
    torch.testing.assert_close(plain(*question, layout=LAYOUT), expected, atol=1e-5, rtol=1e-5)
    averaged = {n: w * (0.5 if ".lora_" in n else 1) for n, w in backbone.transformer.state_dict().items()}
    own, half = (lora_full_state(backbone, weights=weights) for weights in (None, averaged))
    assert own.keys() == {f"{FAR}.weight", f"{FAR}.bias"} and torch.equal(half[f"{FAR}.bias"] * 2, own[f"{FAR}.bias"])
    assert torch.equal(merged_state(backbone.transformer, weights=averaged)[f"{FAR}.weight"], half[f"{FAR}.weight"])
    assert not any("lora_full" in name or FAR in name for name in lora_state(backbone))
    assert gather_state(backbone) is None


def roles_on(far: Any, checkpointing: bool) -> AdapterRoles:
    """Three adapters; the student trains the patch embedding and a norm of the blocks, which are checkpointed."""
    backbone = CausalBackbone(copy.deepcopy(far), gradient_checkpointing=checkpointing)
    settings = LoraSettings(rank=4, alpha=4, full=(FAR, "attn1.norm_k"))
    add_lora(backbone, settings)
    roles = AdapterRoles(backbone, settings, trains_teacher=True)
    for seed, role in enumerate(ROLES):
        shake([weight for _, weight in roles.parameters(role)], 10 + seed)
    return roles


def alone(far: Any, roles: AdapterRoles, role: Role) -> CausalBackbone:
    network = CausalBackbone(copy.deepcopy(far))
    network.transformer.load_state_dict(merged_state(roles.student.transformer, roles._adapters[role] or "none"))
    return network


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_student_sees_what_it_trains_in_full(far: Any, question: Any, checkpointing: bool) -> None:
    """Answers and gradients of each role are its own network's, asked in one another's way before the backward pass."""
    roles = roles_on(far, checkpointing)
    names = {role: {name for name, _ in roles.parameters(role)} for role in ROLES}
    assert any(FAR in name for name in names["student"])
    assert not any(".lora_full." in name for name in names["critic"] | names["teacher"])
    trained = {name for name, weight in roles.student.named_parameters() if weight.requires_grad}
    answers = {role: roles(role, *question, layout=LAYOUT) for role in ROLES}
    assert trained == {name for name, weight in roles.student.named_parameters() if weight.requires_grad}
    for role in reversed(ROLES):
        with torch.no_grad():
            roles("critic" if role == "student" else "student", *question, layout=LAYOUT)
        answers[role].square().mean().backward()
    for role in ROLES:
        network = alone(far, roles, role)
        expected = network(*question, layout=LAYOUT)
        torch.testing.assert_close(answers[role], expected, atol=1e-5, rtol=1e-5)
        expected.square().mean().backward()
        whole = dict(network.named_parameters())
        for name, weight in roles.parameters(role):
            if ".lora_full." in name:
                plain = whole[name.replace(".lora_full.default", "")]
                torch.testing.assert_close(weight.grad, plain.grad, rtol=1e-4, atol=1e-7)
            elif "lora_B.default" in name or "lora_B.critic" in name or "lora_B.teacher" in name:
                layer, _, rest = name.partition(".lora_B.")
                down = dict(roles.student.named_parameters())[f"{layer}.lora_A.{rest}"]
                torch.testing.assert_close(weight.grad, whole[f"{layer}.weight"].grad @ down.T, rtol=1e-3, atol=1e-7)


def test_a_critic_starts_as_a_teacher_that_was_trained_in_full(far: Any, question: Any, tmp_path: Path) -> None:
    source = trained(far, LoraSettings(rank=2, alpha=2, full=("proj_out",)))
    export_lora(tmp_path, source)
    backbone = CausalBackbone(copy.deepcopy(far))
    add_lora(backbone, SETTINGS)
    load_lora(backbone, tmp_path, adapter="teacher")
    roles = AdapterRoles(backbone, SETTINGS)
    expected = source(*question, layout=LAYOUT)
    for role in ("teacher", "critic"):
        torch.testing.assert_close(roles(role, *question, layout=LAYOUT), expected)  # type: ignore[arg-type]
    assert any("proj_out.lora_full.critic" in name for name, _ in roles.parameters("critic"))
    assert not roles.parameters("teacher")
    start = CausalBackbone(copy.deepcopy(far))(*question, layout=LAYOUT)
    torch.testing.assert_close(roles("student", *question, layout=LAYOUT), start)
    shake([weight for _, weight in roles.parameters("critic")], 3)
    roles.copy("teacher", "critic")
    torch.testing.assert_close(roles("critic", *question, layout=LAYOUT), expected)


def test_a_copy_still_on_meta_is_filled_from_the_teacher_and_not_from_the_files(far: Any) -> None:
    """As in sharded runs: a network that lies in its files fills what is on meta from there, the critic's copy too."""
    backbone = CausalBackbone(copy.deepcopy(far))
    full = LoraSettings(rank=2, alpha=2, full=("proj_out",))
    add_lora(backbone, full)
    add_lora(backbone, full, adapter="teacher")
    roles = AdapterRoles(backbone, full)
    copies = backbone.transformer.proj_out.lora_full
    torch.nn.init.normal_(copies["teacher"].weight)
    copies["critic"].to("meta")
    roles.copy("teacher", "critic")
    assert torch.equal(copies["critic"].weight, copies["teacher"].weight) and copies["critic"].weight.requires_grad


@pytest.mark.parametrize(
    ("full", "sentence"),
    [
        (
            "far_patch",
            r"far_patch, which is no module with weights .* choose from condition_embedder, far_patch_embedd",
        ),
        ("blocks", "blocks, which is no module with weights"),
        ("norm_out", "norm_out, which is no module with weights"),
        ("scale_shift_table", "which is no module"),
        ("time_embedder", r"time_embedder, and lora.targets has adapters in condition_embedder.time_embedder"),
        ("ffn.net.2", "lora.targets has adapters in blocks.0.ffn.net.2"),
    ],
)
def test_what_cannot_be_trained_in_full_is_one_sentence(far: Any, full: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        add_lora(CausalBackbone(far), LoraSettings(rank=4, alpha=8, full=(full,)))


def test_compressed_tokens_start_four_times_as_large(tiny_config: dict[str, Any]) -> None:
    """Of latents that are alike: why the release trains the layer, and that the start is the release's, unscaled."""
    network = new_backbone(tiny_config, 0, "causal").transformer
    flat: Tensor = torch.randn(16, generator=torch.Generator().manual_seed(0))[None, :, None, None, None]
    far, near = (
        embedding(flat.expand(1, 16, 1, 4, 4)) - embedding.bias[None, :, None, None, None]
        for embedding in (network.far_patch_embedding, network.patch_embedding)
    )
    torch.testing.assert_close(far, 4 * near[..., :1, :1])
