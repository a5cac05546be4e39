"""Roles: three adapters on one base are, to the last gradient, three separate networks."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from torch import Tensor

from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.export import export_lora
from anyflow.backbone.load import new_backbone
from anyflow.backbone.lora import LoraSettings, add_lora, load_lora, merged_state
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.roles import ROLES, AdapterRoles, Role, Roles, SeparateRoles

NETWORK = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
LORA = LoraSettings(rank=4, alpha=4)


def network(seed: int = 0) -> FlowMapBackbone:
    backbone = new_backbone(NETWORK, seed)
    shake(backbone.transformer.named_parameters(), 1)
    return backbone


@torch.no_grad()
def shake(named: Any, seed: int, size: float = 0.1) -> None:
    """Move weights off their start: fresh adapters change nothing, and a fresh network answers zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, weight in named:
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=size)


def shared(*, checkpointing: bool = False, trains_teacher: bool = False, settings: LoraSettings = LORA) -> AdapterRoles:
    backbone = network()
    add_lora(backbone, settings)
    if checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    roles = AdapterRoles(backbone, settings, trains_teacher=trains_teacher)
    for seed, role in enumerate(ROLES):
        shake(roles.parameters(role), 10 + seed)
    return roles


def apart(roles: AdapterRoles, role: Role) -> FlowMapBackbone:
    """A network of its own for one role: the base with that role's adapter merged in, all of it trainable."""
    adapter = roles._adapters[role]
    merged = network()
    if adapter is not None:
        merged.transformer.load_state_dict(merged_state(roles.student.transformer, adapter))
    return merged


def question(seed: int = 5, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Conditions]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 3, 16, 4, 4, generator=generator)
    embeddings = torch.randn(batch, 6, 16, generator=generator)
    timestep = 1000 * torch.rand(batch, generator=generator)
    return latents, timestep, timestep * 0.5, Conditions(Text(embeddings, torch.full((batch,), 4), 8))


@pytest.mark.parametrize("trains_teacher", [False, True])
def test_each_role_answers_as_its_own_network(trains_teacher: bool) -> None:
    roles = shared(trains_teacher=trains_teacher)
    latents, timestep, r_timestep, told = question()
    answers = {}
    for role in (*ROLES, "student"):
        answers[role] = roles(role, latents, timestep, r_timestep, told)
        torch.testing.assert_close(answers[role], apart(roles, role)(latents, timestep, r_timestep, told))
    assert not torch.allclose(answers["student"], answers["critic"], atol=1e-3)
    assert torch.equal(roles.student(latents, timestep, r_timestep, told), answers["student"])  # at rest
    same = roles("teacher", latents, timestep, timestep, told)
    assert trains_teacher or torch.equal(same, network()(latents, timestep, timestep, told))


def gradients(roles: Roles, *, interrupt: bool) -> dict[str, Tensor]:
    """Those of student and critic, with other roles speaking while the student's graph is alive."""
    latents, timestep, r_timestep, told = question()
    answer = roles("student", latents, timestep, r_timestep, told)
    if interrupt:
        with torch.no_grad():
            roles("teacher", latents, timestep, timestep, told)
        critic = roles("critic", latents, timestep, timestep, told).square().mean()
        roles("student", latents, timestep, r_timestep, told).sum().backward()
        for _, weight in roles.parameters("student"):
            weight.grad = None
        answer.square().mean().backward()
    else:
        answer.square().mean().backward()
        critic = roles("critic", latents, timestep, timestep, told).square().mean()
    critic.backward()
    return {name: weight.grad for role in ROLES for name, weight in roles.parameters(role) if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("more", [(), ("proj_out",)])
def test_gradients_are_those_of_separate_networks(more: tuple[str, ...], checkpointing: bool) -> None:
    """Caught: a part that is run again in the backward pass, blocks or read-out, with another role's adapter."""
    settings = replace(LORA, targets=(*LORA.targets, *more))
    found = gradients(shared(checkpointing=checkpointing, settings=settings), interrupt=True)
    roles = shared(settings=settings)
    expected: dict[str, Tensor] = {}
    for role in ("student", "critic"):  # each on a copy of the whole, so that nothing is ever switched
        alone = copy.deepcopy(roles.student)
        for layer in alone.modules():
            if hasattr(layer, "_active_adapter"):
                layer._active_adapter = [roles._adapters[role]]
        latents, timestep, r_timestep, told = question()
        end = r_timestep if role == "student" else timestep
        alone(latents, timestep, end, told).square().mean().backward()
        named = dict(alone.named_parameters())
        expected |= {name: named[name].grad for name, _ in roles.parameters(role)}
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_the_merged_network_has_the_chain_rules_gradient() -> None:
    """An adapter's gradient follows from the merged weight's: B' = G A^T, A' = B^T G, scaled."""
    roles = shared()
    latents, timestep, r_timestep, told = question()
    roles("student", latents, timestep, r_timestep, told).square().mean().backward()
    merged = apart(roles, "student")
    merged(latents, timestep, r_timestep, told).square().mean().backward()
    weights = dict(roles.student.named_parameters())
    layer = "transformer.blocks.1.attn1.to_v"
    whole = merged.get_submodule(layer).weight.grad
    down, up = weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
    torch.testing.assert_close(up.grad, whole @ down.T, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(down.grad, up.T @ whole, rtol=1e-4, atol=1e-7)


def test_requires_grad_is_set_once() -> None:
    roles = shared(trains_teacher=True)
    trained = {name for name, weight in roles.student.named_parameters() if weight.requires_grad}
    latents, timestep, r_timestep, told = question()
    for role in ROLES:
        roles(role, latents, timestep, r_timestep, told)
        assert {name for name, weight in roles.student.named_parameters() if weight.requires_grad} == trained
    of_roles = [{name for name, _ in roles.parameters(role)} for role in ROLES]
    assert set.union(*of_roles) == trained
    assert sum(map(len, of_roles)) == len(trained)
    assert any("delta_embedder" in name for name in of_roles[0])
    assert not any("_embedder" in name for name in of_roles[1] | of_roles[2])


@pytest.mark.parametrize("kind", ["adapters", "networks"])
def test_a_critic_starts_as_its_teacher(kind: str) -> None:
    if kind == "adapters":
        roles: Roles = shared(trains_teacher=True)
    else:
        roles = SeparateRoles(network(), network(7), trains_teacher=True)
        shake(roles.parameters("teacher"), 3)
    latents, timestep, _, told = question()
    teacher = roles("teacher", latents, timestep, timestep, told)
    assert not torch.allclose(roles("critic", latents, timestep, timestep, told), teacher, atol=1e-3)
    roles.copy("teacher", "critic")
    assert torch.equal(roles("critic", latents, timestep, timestep, told), teacher)
    if kind == "adapters":
        roles = shared()
        roles.copy("teacher", "critic")
        base = network()(latents, timestep, timestep, told)
        assert torch.equal(roles("critic", latents, timestep, timestep, told), base)


def test_a_teacher_stages_adapter_teaches(tmp_path: Path) -> None:
    trained = network()
    add_lora(trained, LoraSettings(rank=2, alpha=2))
    shake(((n, w) for n, w in trained.named_parameters() if ".lora_" in n), 4)
    export_lora(tmp_path, trained)
    backbone = network()
    add_lora(backbone, LORA)
    load_lora(backbone, tmp_path, adapter="teacher")
    roles = AdapterRoles(backbone, LORA)
    latents, timestep, _, told = question()
    expected = trained(latents, timestep, timestep, told)
    for role in ("teacher", "critic"):
        torch.testing.assert_close(roles(role, latents, timestep, timestep, told), expected)
    assert not roles.parameters("teacher")
    torch.testing.assert_close(
        roles("student", latents, timestep, timestep, told), network()(latents, timestep, timestep, told)
    )


def test_separate_networks_share_nothing() -> None:
    roles = SeparateRoles(network(0), network(7))
    assert roles.frozen is not None and not roles.parameters("teacher")
    critic, student = roles.parameters("critic"), roles.parameters("student")
    assert not {id(weight) for _, weight in critic} & {id(weight) for _, weight in student}
    found = gradients(roles, interrupt=True)
    assert len(found) == len(student)  # one name for both: full networks have the same names
    assert all(weight.grad is None for weight in roles.frozen.parameters())


def test_memory_of_one_base_and_of_three_copies() -> None:
    one, three = shared(), SeparateRoles(network(), network())
    base = sum(weight.numel() for weight in network().parameters())
    added = sum(weight.numel() for role in ROLES for _, weight in one.parameters(role))
    assert one.weight_bytes == 4 * (base + added)
    assert three.weight_bytes == 4 * 3 * base


def _rank(rank: int, rendezvous: str, checkpointing: bool, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    roles = shared(checkpointing=checkpointing)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = roles.student

        def forward(self, role: Role, *asked: Any) -> Tensor:
            return roles(role, *asked)

    step = torch.nn.parallel.DistributedDataParallel(Step(), find_unused_parameters=True)
    latents, timestep, r_timestep, told = question(batch=4)
    mine = torch.arange(rank, 4, 2)
    latents, timestep, r_timestep, told = latents[mine], timestep[mine], r_timestep[mine], told.select(mine)
    answer = step("student", latents, timestep, r_timestep, told)
    with torch.no_grad():
        roles("teacher", latents, timestep, timestep, told)
        roles("critic", latents, timestep, timestep, told)
    answer.square().mean().backward()
    step("critic", latents, timestep, timestep, told).square().mean().backward()
    if rank == 0:
        found = {name: weight.grad for role in ROLES for name, weight in roles.parameters(role)}
        torch.save(found, out)
    torch.distributed.barrier()
    os._exit(0)  # gloo's destructor waits, holding the interpreter, for a thread that wants the interpreter


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_ranks_make_the_gradients_of_one(tmp_path: Path, checkpointing: bool) -> None:
    out = tmp_path / "gradients.pt"
    on_ranks(_rank, (str(tmp_path / "meet"), checkpointing, str(out)))
    found = torch.load(out, weights_only=True)
    roles = shared()
    latents, timestep, r_timestep, told = question(batch=4)
    roles("student", latents, timestep, r_timestep, told).square().mean().backward()
    roles("critic", latents, timestep, timestep, told).square().mean().backward()
    expected = {name: weight.grad for role in ROLES for name, weight in roles.parameters(role)}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
