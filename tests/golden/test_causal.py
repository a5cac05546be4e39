"""The causal network against the golden cases: one training step after compressed context, and rollouts by chunks."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from diffusers import AnyFlowFARTransformer3DModel
from torch import Tensor

from anyflow.backbone.causal import CausalBackbone
from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.segments import AttentionKind
from anyflow.flowmap.chunks import PathBatch, in_chunks, layout_of
from anyflow.flowmap.intervals import draw_intervals
from anyflow.flowmap.objective import FlowMapObjective, diffusion_statistics, flow_map_loss, rebalance
from anyflow.flowmap.rollout import BackwardSimulation

from .reference import HERE, load_case, relative_error

CASE, ROLLOUT, INPUTS = load_case("far_pretrain_compressed"), load_case("far_rollout"), load_case("inputs_far")
STORED = json.loads((HERE / "far_rollout.json").read_text())["cases"]
CLEAN = INPUTS["in/latents"].transpose(1, 2)
TOLD = Conditions(Text(torch.cat([INPUTS["in/prompt_embeds"], INPUTS["in/negative_embedding"]]), None, 6))
CHUNKS = (1, 2, 2, 1)


def golden_network(attention: AttentionKind = "segments", *, checkpointing: bool = False) -> CausalBackbone:
    stored = json.loads((HERE / "weights.json").read_text())
    taken = inspect.signature(AnyFlowFARTransformer3DModel.__init__).parameters
    config = {key: value for key, value in stored["reference_config"].items() if key in taken}
    times = {key: stored[key] for key in ("gate_value", "deltatime_type")}
    network = AnyFlowFARTransformer3DModel(**config, **times, chunk_partition=stored["far_chunk_partition"])
    network.load_state_dict(load_case("weights_student_far"))
    return CausalBackbone(network, checkpointing, attention)


def gradient_norm(backbone: CausalBackbone) -> float:
    gradients = [weight.grad for weight in backbone.parameters() if weight.grad is not None]
    return float(torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt())


@pytest.mark.parametrize("attention", ["segments", "dense"])
def test_forward_step_after_compressed_context(attention: AttentionKind) -> None:
    backbone = golden_network(attention)
    intervals = draw_intervals(torch.stack([CASE["draw/u1"], CASE["draw/u2"]], dim=1))
    layout = layout_of(CHUNKS, full_limit=3)
    noise = torch.cat([torch.zeros_like(CLEAN[:, :1]), CASE["draw/noise"]], dim=1)  # frame 0 is context
    on_path = in_chunks(layout, PathBatch(CLEAN, noise, intervals.timestep, intervals.r_timestep))
    trained = slice(layout.context_frames, layout.context_frames + layout.full_frames)
    torch.testing.assert_close(on_path.timestep[:, trained], CASE["out/t"], rtol=1e-6, atol=1e-4)
    answers: list[Tensor] = []

    def velocity(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        answers.append(backbone(z, t, r, TOLD.select(rows.clamp(max=4)), layout=layout))
        return answers[-1]

    found = flow_map_loss(
        FlowMapObjective(),
        velocity,
        on_path.clean,
        on_path.noise,
        on_path.timestep,
        on_path.r_timestep,
        torch.arange(4),
        on_path.loss_frames,
    )
    assert torch.equal(found.is_diffusion, CASE["out/is_diffusion"])
    assert relative_error(answers[-1][:, trained].detach(), CASE["out/pred_cond"]) < 1e-4
    interval = (CASE["out/t"] - CASE["out/r"])[..., None, None, None]
    target = CASE["draw/noise"] - CLEAN[:, 1:] - interval * CASE["out/dF_dt"]
    assert relative_error(found.target[:, trained], target) < 1e-4
    total, count = diffusion_statistics(found.per_sample, found.is_diffusion)
    loss = rebalance(found.per_sample, found.is_diffusion, total / count).mean()
    torch.testing.assert_close(loss, CASE["out/loss"], rtol=1e-5, atol=0)
    loss.backward()
    assert gradient_norm(backbone) == pytest.approx(float(CASE["out/grad_norm"]), rel=1e-5)
    stored = [key for key in CASE if key.startswith("grad/")]
    assert stored
    for key in stored:
        gradient = backbone.transformer.get_parameter(key.removeprefix("grad/")).grad
        assert relative_error(gradient, CASE[key]) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", STORED)
def test_rollout(name: str, checkpointing: bool) -> None:
    backbone = golden_network(checkpointing=checkpointing)
    plan = BackwardSimulation(*map(int, name.split("_")), 5.0)
    asked: list[list[float | bool]] = []

    def ask(z: Tensor, t: Tensor, r: Tensor, told: Conditions, **view: object) -> Tensor:
        asked.append([float(t[0]), float(r[0]), "record" in view])
        return backbone(z, t, r, told, **view)

    noise = ROLLOUT["in/init_noise"].transpose(1, 2)
    parts = list(backbone.generate(TOLD.select(torch.arange(2)), noise, plan.jumps, ask=ask))
    assert [part.shape[1] for part in parts] == list(CHUNKS)
    samples = torch.cat(parts, dim=1).transpose(1, 2)
    assert relative_error(samples, ROLLOUT[f"out/rollout/{name}"]) < 1e-4
    expected = [[*call[:2], float(call[2])] for call in STORED[name]["model_calls_t_r_iscache"]]
    torch.testing.assert_close(torch.tensor(asked), torch.tensor(expected), rtol=1e-6, atol=0)
    (samples * ROLLOUT["in/grad_probe"]).sum().backward()
    assert gradient_norm(backbone) == pytest.approx(STORED[name]["grad_norm_of_sum_out_times_probe"], rel=1e-5)


def test_sampler() -> None:
    noise = ROLLOUT["in/init_noise"].transpose(1, 2)
    samples = golden_network().sample(TOLD.select(torch.arange(2)), noise, 4, 5.0)
    assert relative_error(samples.transpose(1, 2), ROLLOUT["out/sampler_full/4"]) < 1e-4
