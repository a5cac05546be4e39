"""Prompts divided over ranks: each rank samples its own, and all have the figures of one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks

from anyflow.backbone import parallelize
from anyflow.backbone.parallelize import join_ranks, leave_ranks, own_rows
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.evaluation import heldout as curves
from anyflow.evaluation.heldout import held_out, load_curve
from anyflow.evaluation.told import Told
from anyflow.flowmap.endpoint import Renoise
from anyflow.flowmap.sampling import take_velocity
from anyflow.recipe import load_recipe
from anyflow.system.signals import Terminated
from anyflow.tracking.runs import RunFolder
from anyflow.training.assemble import assemble
from anyflow.training.finish import measure

PROMPTS, STEPS = 3, 2


GUIDED = ("teacher/tiny", "model.init=weights", "sampling.guidance_scale=2")


def measured(model: Path, out: Path, ranks: int, name: str = "finetune/driving", *more: str) -> int:
    """Measure before training, as a run does; returns how many clips the network was asked about."""
    options = {
        "model.weights": model,
        "model.codec": model,
        "data.card": "driving",
        "data.global_batch": 0,
        "data.frames": 5,
        "data.height": 32,
        "data.width": 32,
        "data.num_workers": 0,
        "data.precompute": "false",
        "optimizer.name": "adamw",
        "sampling.prompts": PROMPTS,
        "sampling.steps": f"[{STEPS}]",
        "sampling.given_frames": 1,
        "hardware.devices": ranks,
        "hardware.strategy": "fsdp" if ranks > 1 else "auto",
    }
    recipe = load_recipe(name, overrides=[*(f"{key}={value}" for key, value in options.items()), *more])
    parts, asked = assemble(recipe), [0]

    def count(module: Any, inputs: Any) -> None:
        asked[0] += len(inputs[0])

    parts.backbone.register_forward_pre_hook(count)
    measure(recipe, RunFolder(out), parts, None, label="before")
    return asked[0]


def _rank(rank: int, port: int, model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_ranks("cpu")
    assert measured(model, out, 2) == STEPS * 2, "three prompts: two, and one with a filler, in one batch"
    assert measured(model, out / "guided", 2, *GUIDED) == STEPS * 2 * 2, "each asked for both prompts"
    shared = ("finetune/driving", "hardware.context=2")
    assert measured(model, out / "shared", 2, *shared) == STEPS * PROMPTS, "all prompts, of each half the tokens"
    leave_ranks()


def test_two_ranks_measure_what_one_process_measures(small_model: Path, tmp_path: Path) -> None:
    port = 31500 + os.getpid() % 1000
    on_ranks(_rank, (port, small_model, tmp_path / "two"))
    assert measured(small_model, tmp_path / "one", 1) == STEPS * PROMPTS
    assert measured(small_model, tmp_path / "one" / "guided", 1, *GUIDED) == STEPS * PROMPTS * 2
    for part, nfe in ((".", STEPS), ("guided", 2 * STEPS)):
        _are_alike(tmp_path / "one" / part, tmp_path / "two" / part, nfe)
    _are_alike(tmp_path / "one", tmp_path / "two" / "shared", STEPS)


def _are_alike(first_run: Path, second_run: Path, nfe: int) -> None:
    one, two = (load_curve(run / "curves", "before") for run in (first_run, second_run))
    assert one is not None and two is not None
    assert one.curve.rows[0].nfe == two.curve.rows[0].nfe == nfe
    assert [item.key for item in one.shown] == [item.key for item in two.shown]
    off = (one.samples[STEPS].int() - two.samples[STEPS].int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.01, "rounding to a grey level"
    for first, second in ((one.curve.rows[0], two.curve.rows[0]), (one.curve.codec, two.curve.codec)):
        assert second.sliced_w1 == pytest.approx(first.sliced_w1, rel=1e-3)
        assert second.frame_frechet == pytest.approx(first.frame_frechet, rel=1e-3), "each clip counts once"
        assert second.motion_energy == pytest.approx(first.motion_energy, rel=1e-2)


def _stopped_rank(rank: int, port: int, model: Path, out: Path) -> None:
    """Measure on one of two ranks, the second of which alone is told to stop; then again."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_ranks("cpu")
    sample = FlowMapBackbone.sample

    def told_to_stop(self: Any, *inputs: Any, **options: Any) -> Any:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, *inputs, **options)

    FlowMapBackbone.sample = told_to_stop  # type: ignore[method-assign]
    with pytest.raises(Terminated) as stop:
        measured(model, out, 2)
    assert stop.value.received is signal.SIGTERM and load_curve(out / "curves", "before") is None
    FlowMapBackbone.sample = sample  # type: ignore[method-assign]
    assert measured(model, out, 2) == STEPS * 2, "both went to the same place: no collective is left half-way"
    leave_ranks()


def test_a_signal_to_one_rank_stops_sampling_on_both(small_model: Path, tmp_path: Path) -> None:
    """A rank that stopped by itself would leave the other one in a collective until that times out."""
    port = 32500 + os.getpid() % 1000
    on_ranks(_stopped_rank, (port, small_model, tmp_path))


def test_a_single_held_out_clip_gives_no_curve_and_stops_nothing(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first look at a little footage of one's own."""
    monkeypatch.setattr(curves, "held_out", lambda *asked: held_out(*asked[:3], 1))
    assert measured(small_model, tmp_path, 1) == 0
    assert "no curve (before): 3 prompts need 6 clips of the heldout split" in capsys.readouterr().err
    assert not (tmp_path / "curves").exists()


@pytest.mark.parametrize("count, size, context", [(1, 2, 1), (3, 2, 1), (8, 8, 1), (9, 4, 1), (3, 4, 2), (5, 4, 4)])
def test_rows_are_dealt_out_once_and_equally(
    count: int, size: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt = []
    for rank in range(size):
        monkeypatch.setattr(parallelize, "rank_and_size", lambda rank=rank: (rank, size))
        dealt.append(own_rows(count, context))
        assert dealt[rank] == dealt[rank - rank % context], "neighbours do the same"
    dealt = dealt[::context]
    assert len({len(rows) for rows in dealt}) == 1
    in_turn = [row for turn in zip(*dealt, strict=True) for row in turn]
    assert in_turn[:count] == list(range(count)) and set(in_turn[count:]) <= {count - 1}


def test_a_curve_of_another_guidance_is_measured_again(small_model: Path, tmp_path: Path) -> None:
    """Catches a resumed run that takes the curve of another scale for its own, and one that measures twice."""
    clips = STEPS * PROMPTS * 2
    assert [measured(small_model, tmp_path, 1, *GUIDED) for _ in range(2)] == [clips, 0]
    assert measured(small_model, tmp_path, 1, *GUIDED, "sampling.guidance_scale=3") == clips
    assert measured(small_model, tmp_path, 1, *GUIDED, "sampling.guidance_scale=1") == clips // 2


def test_a_rank_takes_the_jumps_that_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a divided teacher that is sampled as a flow map, and re-noising that is divided in spite of its draws."""
    seen: list[tuple[int, Any]] = []

    def sampler(told: Told, noise: torch.Tensor, *rest: Any, **way: Any) -> torch.Tensor:
        seen.append((len(told.captions), way.get("take")))
        return noise

    monkeypatch.setattr(curves, "own_rows", lambda count, context=1: [0])
    monkeypatch.setattr(curves, "join_rows", lambda own, count, context=1: own)
    divided, renoise = curves._divided(sampler), Renoise(torch.randn_like)
    for way in ({}, {"take": take_velocity}, {"take": renoise}):
        divided(Told(["a", "b"]), torch.zeros(2, 1), 2, 3.0, **way)
    assert seen == [(1, None), (1, take_velocity), (2, renoise)]
