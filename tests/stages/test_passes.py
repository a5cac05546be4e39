"""A step is a step: split in passes, ranks and uneven batches it draws, weighs and averages as in one pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_stage import CAPTIONS, NETWORK, onpolicy_stage, quiet, settings, stage_of

from anyflow.backbone.codec import Codec
from anyflow.backbone.embedded import build_vae
from anyflow.backbone.load import new_backbone
from anyflow.backbone.roles import SeparateRoles
from anyflow.flowmap.intervals import IntervalShares
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.stages import baselines, forward, onpolicy, update
from anyflow.stages.base import Training
from anyflow.stages.baselines import ConsistencyStage, DmdStage
from anyflow.stages.batch import Conditioning
from anyflow.stages.codec import CodecObjective, CodecStage
from anyflow.stages.ema import EmaSettings
from anyflow.stages.forward import ForwardStage, draw_times
from anyflow.stages.onpolicy import OnPolicySettings
from anyflow.stages.optimizers import OptimizerSettings
from anyflow.stages.teacher import TeacherStage

CLIPS = 8
CAUSAL = {**NETWORK, "chunk_partition": [1, 1, 2], "full_chunk_limit": 2}
CONDITIONS = Conditioning(text_drop=0.4, i2v_prob=0.5, bidirectional_prob=1.0)

Build = Callable[[Codec, int], Any]
"""A stage with so many passes an update."""


def _forward(codec: Codec, passes: int) -> Any:
    return stage_of(ForwardStage, codec, objective=FlowMapObjective(), conditioning=CONDITIONS, passes=passes)


def _causal(codec: Codec, passes: int) -> Any:
    backbone = new_backbone(CAUSAL, 0, "causal")
    torch.manual_seed(3)
    torch.nn.init.normal_(backbone.transformer.proj_out.weight, std=0.1)
    options = settings(conditioning=CONDITIONS, passes=passes)
    return quiet(ForwardStage(backbone, codec, objective=FlowMapObjective(), **options))


def _consistency(codec: Codec, passes: int) -> Any:
    student, teacher = new_backbone(NETWORK, 0), new_backbone(NETWORK, 1)
    torch.manual_seed(3)
    for network in (student, teacher):
        torch.nn.init.normal_(network.transformer.proj_out.weight, std=0.1)
    roles = SeparateRoles(student, teacher, has_critic=False)
    options = settings(conditioning=CONDITIONS, passes=passes)
    return quiet(ConsistencyStage(roles, codec, objective=FlowMapObjective(), **options))


def _codec(codec: Codec, passes: int) -> Any:
    objective = CodecObjective(crop_frames=5, crop_height=16, crop_width=16)
    training = Training(OptimizerSettings(), EmaSettings(0.0), total_steps=10, seed=0, passes=passes)
    return quiet(CodecStage(build_vae(0).requires_grad_(True), objective, training))


def _onpolicy(codec: Codec, passes: int) -> Any:
    return onpolicy_stage(codec, conditioning=CONDITIONS, passes=passes, ema=EmaSettings(0.0))


def _dmd(codec: Codec, passes: int) -> Any:
    budgets = OnPolicySettings(budgets=(4,))
    return onpolicy_stage(codec, DmdStage, settings=budgets, passes=passes, ema=EmaSettings(0.0))


STAGES: dict[str, Build] = {
    "teacher": lambda codec, passes: stage_of(TeacherStage, codec, conditioning=CONDITIONS, passes=passes),
    "forward": _forward,
    "causal forward": _causal,
    "consistency": _consistency,
    "codec": _codec,
    "onpolicy": _onpolicy,
    "dmd": _dmd,
}


def clips(chosen: Sequence[int], **more: Any) -> dict[str, Any]:
    """Some of a step's clips, whoever has them."""
    drawn = torch.Generator().manual_seed(1)
    latents = torch.randn(CLIPS, 4, 16, 4, 4, generator=drawn)
    frames = torch.randint(0, 255, (CLIPS, 9, 24, 24, 3), generator=drawn, dtype=torch.uint8)
    captions = [CAPTIONS[clip % len(CAPTIONS)] for clip in chosen]
    return {"latents": latents[chosen], "frames": frames[chosen], "caption": captions, **more}


def gradient(stage: Any, batches: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """What an update's passes leave behind, in the order of the trained weights; the critic's after the student's."""
    found: list[torch.Tensor] = []

    def collect(*_: Any) -> None:
        weights = [weight for weight in stage.parameters() if weight.requires_grad]
        found.extend(weight.grad.clone() for weight in weights if weight.grad is not None)
        stage.zero_grad()

    stage.move = collect
    for batch in batches:
        stage.on_train_batch_start(batch, 0)
        loss = stage.training_step(batch, 0)
        if stage.automatic_optimization:
            (loss / stage.update.passes).backward()  # as Lightning does
    if stage.automatic_optimization:
        collect()
    return found


@contextmanager
def ranks(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], Any]], list[Any]]]:
    """Threads that play ranks: each has its number, and sums are exchanged."""
    own, meet = threading.local(), threading.Barrier(count)
    shared: list[Any] = [None] * count

    def world() -> tuple[int, int]:
        return getattr(own, "rank", 0), count

    def total(values: torch.Tensor) -> torch.Tensor:
        shared[own.rank] = values
        meet.wait()
        result = torch.stack(shared).sum(dim=0)
        meet.wait()
        return result

    def together(work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * count

        def run(rank: int) -> None:
            own.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException:
                meet.abort()
                raise

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(result is not None for result in results)
        return results

    for module in (update, baselines, forward, onpolicy):
        monkeypatch.setattr(module, "world", world)
    monkeypatch.setattr(forward, "sum_over_ranks", total)
    yield together


def assert_alike(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    size = torch.stack([part.norm() for part in expected]).norm()
    apart = torch.stack([(ours - theirs).norm() for ours, theirs in zip(found, expected, strict=True)]).norm()
    assert float(apart) < 1e-5 * float(size)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("split", [(1, 8), (1, 2), (2, 1), (2, 4)], ids=lambda split: f"{split[0]}x{split[1]}")
def test_a_split_step_is_the_step_in_one_pass(
    name: str, split: tuple[int, int], codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of ranks x passes is that of one rank and pass: draws, rebalancing and average go over the step.

    Wrong codes it catches: shares or draws by pass or rank, a mean of means of uneven weight, a diffusion mean of one
    pass, layouts or budgets drawn anew in each pass.
    """
    build, (count, passes) = STAGES[name], split
    updates = 2 if name in ("onpolicy", "dmd") else 1
    expected = gradient(build(codec, 1), [clips(range(CLIPS))] * updates)
    size = CLIPS // passes

    def work(rank: int) -> list[torch.Tensor]:
        own = [clips(range(first + rank, first + size, count)) for first in range(0, CLIPS, size)]
        return gradient(stages[rank], own * updates)

    stages = [build(codec, passes) for _ in range(count)]
    with ranks(count, monkeypatch) as together:
        of_ranks = together(work)
    assert_alike([torch.stack(parts).mean(dim=0) for parts in zip(*of_ranks, strict=True)], expected)


@pytest.mark.parametrize("name", ["teacher", "forward", "onpolicy"])
def test_uneven_passes_weigh_their_clips(name: str, codec: Codec) -> None:
    """Passes of buckets have other numbers of clips; every clip counts alike."""
    build, updates = STAGES[name], 2 if name == "onpolicy" else 1
    expected = gradient(build(codec, 1), [clips(range(CLIPS))] * updates)
    parts = [range(3), range(3, 4), range(4, 8)]
    batches = [clips(part, place=(part.start, CLIPS)) for part in parts]
    assert_alike(gradient(build(codec, len(parts)), batches * updates), expected)


def test_a_step_without_diffusion_samples_is_weighed_by_the_last_that_had_some(codec: Codec) -> None:
    """Steps of one clip: a jump's loss alone has the size of the last velocity's, and not its own."""
    stage = stage_of(ForwardStage, codec, objective=FlowMapObjective(guidance_scale=1.0), shares=IntervalShares())
    last, seen = None, set()
    for _ in range(8):
        stage.on_train_batch_start(clips([0]), 0)
        data = stage.batches.prepare(clips([0]), torch.device("cpu"))
        is_diffusion = bool(draw_times(stage.update, data, stage.shares, 5.0).is_diffusion)
        loss = float(stage.training_step(clips([0]), 0).detach())
        if is_diffusion:
            last = loss
        elif last is not None:
            assert loss == pytest.approx(last, rel=1e-3)
        seen.add(is_diffusion)
    assert seen == {True, False}


def test_a_checkpoint_in_the_middle_of_an_update_is_of_its_beginning(codec: Codec) -> None:
    """Gradients are not saved: the passes that they came from are still to come, with the draws they had."""
    stage = _onpolicy(codec, 3)
    batches = [clips(range(2)) for _ in range(3)]
    for batch in batches:
        stage.on_train_batch_start(batch, 0)
        stage.training_step(batch, 0)
    whole: dict[str, Any] = {}
    stage.on_save_checkpoint(whole)
    assert whole["anyflow"]["turn"] == 1 and stage.update.is_complete
    for batch in batches[:2]:
        stage.on_train_batch_start(batch, 0)
        stage.training_step(batch, 0)
    cut: dict[str, Any] = {}
    stage.on_save_checkpoint(cut)
    assert not stage.update.is_complete and stage.update.position == whole["anyflow"]["position"] + 1
    assert str(cut["anyflow"]) == str(whole["anyflow"])
