"""Ranks started by one command: a dead one ends all with one report; what they saved goes on, on one rank or two."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from anyflow.cli.main import app
from anyflow.errors import EXIT_PREEMPTED, UserError
from anyflow.stages import update
from anyflow.system.ranks import _Rank, _report, needs_watcher, watch
from anyflow.tracking.checkpoints import damage, latest_checkpoint
from anyflow.training.callbacks.sharded import is_sharded_checkpoint, read_checkpoint

STEPS = 8
ROOT = Path(__file__).parents[2]
NO_CACHE = shutil.ignore_patterns("cache")


def training(model: Path, out: Path, *more: str, ranks: int = 2) -> list[str]:
    """LoRA on ``ranks`` ranks, a few seconds; every step is a checkpoint."""
    options = {
        "model.weights": model,
        "model.lora.enabled": "true",
        "model.lora.rank": 4,
        "stage.steps": STEPS,
        "data.frames": 5,
        "data.height": 32,
        "data.width": 32,
        "data.global_batch": 2,
        "data.num_workers": 0,
        "data.precompute": "false",
        "optimizer.name": "adamw",
        "checkpoint.every_steps": 1,
        "sampling.prompts": 0,
        "run.tracking_uri": "",
        "hardware.devices": ranks,
        "hardware.strategy": "fsdp" if ranks > 1 else "auto",
    }
    return [
        "train",
        "finetune/driving",
        *(f"{key}={value}" for key, value in options.items()),
        "--out",
        str(out),
        *more,
    ]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "anyflow", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def finish(words: list[str]) -> None:
    process = start(words)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors.decode()


def after_first_checkpoint(process: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + 240
    while latest_checkpoint(out / "checkpoints") is None:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


def rank_of(watcher: int, rank: int) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{watcher}/task/{watcher}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    return next(int(pid) for pid in children if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def weights(out: Path) -> dict[str, Any]:
    path = latest_checkpoint(out / "checkpoints")
    assert path is not None
    whole = read_checkpoint(path)
    assert whole["anyflow"]["step"] == STEPS
    assert not any(".base_layer." in name for name in whole["state_dict"]), "a frozen base is not saved"
    return whole["state_dict"]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_ranks_find_their_clips_encoded(small_model: Path, tmp_path: Path) -> None:
    """By as many processes as there are ranks, once all else was found right; not by the first while others wait."""
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "data" / "starter" / "driving", folder / "starter" / "driving", ignore=NO_CACHE)
    shutil.copy(ROOT / "data" / "driving.yaml", folder)
    card = (f"data.card={folder / 'driving.yaml'}", "data.precompute=true", "hardware.accelerator=cpu", "stage.steps=2")
    wrong = start(training(small_model, tmp_path / "wrong", *card, "model.lora.targets=[nothing]"))
    assert b"nothing" in wrong.communicate(timeout=300)[1] and wrong.returncode == 2
    caches = folder / "starter" / "driving" / "cache"
    assert not list(folder.rglob("cache.json"))
    right = start(training(small_model, tmp_path / "right", *card))
    words = right.communicate(timeout=300)[1].decode()
    assert right.returncode == 0, words
    assert len(list(folder.rglob("cache.json"))) == 1, caches
    assert words.count(" prompts, about ") == 1 and words.index(" prompts, about ") < words.index("step 1/2")


@pytest.fixture(scope="module")
def killed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, int]:
    """A run whose second rank was killed: its folder, exit code, words, and the first rank's process."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    process = start(training(small_model, out))
    after_first_checkpoint(process, out)
    first = rank_of(process.pid, 0)
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    errors = process.communicate(timeout=60)[1].decode()
    return out, process.returncode, errors, first


def test_a_killed_rank_ends_all_with_one_report(killed: tuple[Path, int, str, int]) -> None:
    _, code, errors, first = killed
    assert code == 128 + signal.SIGKILL
    assert errors.count("anyflow: rank 1 of 2") == 1 and "SIGKILL" in errors and "--resume auto" in errors
    assert "Traceback" not in errors, "the other rank's complaint is not the report"
    assert not alive(first)


def test_the_sums_beside_each_ranks_files_find_one_changed_bit(
    killed: tuple[Path, int, str, int], tmp_path: Path
) -> None:
    """safetensors has no sums of its own, and torch leaves a weight as it is where a rank's file is not there."""
    path = latest_checkpoint(killed[0] / "checkpoints")
    assert path is not None and damage(path.parent) == ""
    assert len(list(path.parent.glob("shard-*-of-00002.sha256"))) == 2
    copied = tmp_path / path.parent.name
    shutil.copytree(path.parent, copied)
    last = sorted(copied.glob("*.safetensors"))[-1]
    content = bytearray(last.read_bytes())
    content[-3] ^= 1
    last.write_bytes(content)
    assert damage(copied) == f"{last} is damaged (its bytes have changed)"
    last.unlink()
    assert damage(copied) == f"{last} is missing"


def test_one_process_exports_what_two_ranks_saved(
    killed: tuple[Path, int, str, int], small_model: Path, tmp_path: Path
) -> None:
    """The average of the newest checkpoint, merged, in one file; neither ranks nor data are there."""
    from anyflow.backbone.load import load_backbone
    from anyflow.backbone.lora import LoraSettings, add_lora

    out, target = killed[0], tmp_path / "exported"
    words = ["export", str(out), "--to", str(target), "--single-file", "--precision", "float32"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert len(list((target / "transformer").glob("*.safetensors"))) == 1
    path = latest_checkpoint(out / "checkpoints")
    assert path is not None and is_sharded_checkpoint(path)
    saved = read_checkpoint(path)["state_dict"]
    adapted = load_backbone(small_model)
    add_lora(adapted, LoraSettings(4, 256.0))
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    average = {name: saved[f"ema.shadow_{index}"] for index, name in enumerate(names)}
    layer = "transformer.blocks.0.attn1.to_q"
    down, up = (average[f"{layer}.lora_{part}.default.weight"] for part in "AB")
    scale = 256 / 4  # alpha over rank
    base, exported = (load_backbone(place).transformer.blocks[0].attn1.to_q.weight for place in (small_model, target))
    torch.testing.assert_close(exported, base + scale * (up @ down), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_what_two_ranks_saved_goes_on_bitwise_on_two_and_closely_on_one(
    killed: tuple[Path, int, str, int], small_model: Path, tmp_path: Path
) -> None:
    out, alone = killed[0], tmp_path / "alone"
    shutil.copytree(out, alone)
    finish(training(small_model, out, "--resume", "auto"))
    finish(training(small_model, alone, "--resume", "auto", ranks=1))
    finish(training(small_model, tmp_path / "whole", "checkpoint.background=true"))  # written behind, and the same
    whole, resumed, on_one = weights(tmp_path / "whole"), weights(out), weights(alone)
    assert not is_sharded_checkpoint(latest_checkpoint(alone / "checkpoints"))  # type: ignore[arg-type]
    assert whole.keys() == resumed.keys() == on_one.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]
    for name in whole:
        torch.testing.assert_close(on_one[name], whole[name], rtol=1e-3, atol=2e-4)


APART, SHARED = (2, ()), (2, ("hardware.context=2",))
"""Two ranks with clips of their own, and two that share each clip."""


@pytest.fixture(scope="module")
def undisturbed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank computes without a stop."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(training(small_model, out, ranks=1))
    return weights(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after", [(SHARED, (1, ())), ((1, ()), SHARED), (SHARED, APART), (APART, SHARED), (SHARED, SHARED)]
)
def test_a_killed_run_goes_on_with_clips_shared_otherwise(
    before: tuple[int, tuple[str, ...]],
    after: tuple[int, tuple[str, ...]],
    undisturbed: dict[str, Any],
    small_model: Path,
    tmp_path: Path,
) -> None:
    """Caught: other clips, noise or learning rates after the kill; gradients of another scale."""
    out = tmp_path / "run"
    process = start(training(small_model, out, *before[1], ranks=before[0]))
    after_first_checkpoint(process, out)
    os.kill(rank_of(process.pid, 1) if before[0] > 1 else process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode
    process = start(training(small_model, out, *after[1], "--resume", "auto", ranks=after[0]))
    told = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, told
    assert ("taken up by" in told) == (before != after), told
    for name, weight in weights(out).items():
        torch.testing.assert_close(weight, undisturbed[name], rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_a_preempted_run_of_one_process_goes_on_with_two_ranks(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(training(small_model, out, ranks=1))
    after_first_checkpoint(process, out)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == EXIT_PREEMPTED
    process = start(training(small_model, out, "--resume", "auto", "checkpoint.every_steps=100"))
    while "running" not in (out / "status.json").read_text():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)  # the ranks get it through their watcher
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode in (EXIT_PREEMPTED, 0), errors
    finish(training(small_model, out, "--resume", "auto"))
    assert weights(out)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1, 3, 8])
def test_two_ranks_that_are_stopped_before_they_train_say_start_me_again(
    seconds: float, small_model: Path, tmp_path: Path
) -> None:
    """While they import, meet, or load: it was 143, or a report of the rank that lost the other."""
    out = tmp_path / "run"
    process = start(training(small_model, out))
    while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode == EXIT_PREEMPTED and "Traceback" not in errors, errors
    status = out / "status.json"
    assert not status.exists() or "running" not in status.read_text()


def test_a_mistake_on_one_rank_is_one_sentence(small_model: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("nothing: here\n")
    process = start([*training(small_model, tmp_path / "out"), f"data.card={card}"])
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 2 and errors.startswith("anyflow: ") and errors.count("\n") == 1, errors


def test_only_the_first_process_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert needs_watcher(2) and not needs_watcher(1)
    monkeypatch.setenv("RANK", "0")  # as under torchrun
    assert not needs_watcher(2)


def test_many_nodes_need_to_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        watch(8, 2)


def test_the_report_names_the_rank_and_repeats_its_last_words(tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.write_text("Traceback ...\nRuntimeError: no luck\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    process.wait()
    rank = _Rank(3, process, report, tmp_path / "log")
    text = _report(rank, 8, rank.last_words(), "do it again")
    assert (
        "rank 3 of 8" in text
        and "failed" in text
        and "stopped. Do it again" in text
        and text.endswith("RuntimeError: no luck")
    )


@pytest.mark.parametrize(
    "bad, words",
    [([False, True], "it began on rank 1 of 2"), ([True, True], "on all ranks"), ([False, False], "finite")],
)
def test_a_loss_that_is_no_number_names_its_rank(bad: list[bool], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "world", lambda: (0, 2))
    monkeypatch.setattr(update, "gather", lambda value: bad)
    assert words in update.Update(0).where_it_began()


@pytest.mark.slow
def test_torchrun_starts_the_ranks_too(small_model: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "anyflow",
    ]
    done = subprocess.run(
        [*words, *training(small_model, tmp_path / "run")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run")
