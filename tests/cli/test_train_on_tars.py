"""Training on somebody else's tars through the real command line: killed, gone on with, on one rank and on two."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from shell import command, environment, run, state_after

from anyflow.data.reader import ShardReader, split_folders
from anyflow.tracking.checkpoints import latest_checkpoint
from anyflow.tracking.runs import RunFolder

STEPS = 7
CLIPS, TARS = 24, 4


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first driving clips as WebDataset's own writer puts them into tars, with a member that nobody asks for."""
    folder = tmp_path_factory.mktemp("footage") / "drives"
    folder.mkdir()
    reader = ShardReader(split_folders("driving", "train"))
    samples = [(number, sample) for number, (_, shard) in enumerate(reader.shards) for sample in shard.samples][:CLIPS]
    for tar in range(TARS):
        with webdataset.TarWriter(str(folder / f"{tar:06d}.tar")) as writer:
            for place, (number, sample) in enumerate(samples[tar::TARS]):
                caption = reader.describe(number, sample)["caption"]
                parts = {"mp4": reader.read(number, sample, "mp4"), "txt": caption, "cls": 3}
                writer.write({"__key__": f"{place:06d}", **parts})
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLOW_CACHE", str(tmp_path / "cache"))


def training(model: Path, card: str, out: Path, *more: str) -> list[str]:
    options: dict[str, Any] = {
        "data.card": card,
        "model.weights": model,
        "stage.steps": STEPS,
        "data.global_batch": 2,
        "data.num_workers": 1,
        "data.precompute": "false",
        "optimizer.warmup_steps": 2,
        "ema.start_step": 2,
        "checkpoint.every_steps": 2,
        "sampling.prompts": 0,
        "run.tracking_uri": "",
    }
    return ["train", "finetune/driving", *(f"{k}={v}" for k, v in options.items()), "--out", str(out), *more]


def kill_after_first_checkpoint(words: list[str], out: Path) -> None:
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    deadline = time.monotonic() + 240
    while latest_checkpoint(out / "checkpoints") is None:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return state_after(out, STEPS)


@pytest.mark.parametrize("streaming", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_killed_run_on_tars_goes_on_bitwise(streaming: str, tars: Path, small_model: Path, tmp_path: Path) -> None:
    card = f"{tars}/{{000000..{TARS - 1:06d}}}.tar"
    more = [f"data.streaming={streaming}", "data.shuffle_buffer=4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished = run(*training(small_model, card, whole, *more))
    assert finished.returncode == 0, finished.stderr
    assert "held out of drives: 1 of 4 tars (000003.tar)" in finished.stderr
    assert ("members that are not used: .cls" if streaming == "true" else "not used: 18 .cls") in finished.stderr
    assert not (whole / "skipped.json").exists()
    kill_after_first_checkpoint(training(small_model, card, cut, *more), cut)
    resumed = run(*training(small_model, card, cut, *more, "--resume", "auto"))
    assert resumed.returncode == 0, resumed.stderr
    expected, found = weights(whole), weights(cut)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_two_ranks_on_tars(streaming: str, tars: Path, small_model: Path, tmp_path: Path) -> None:
    """Killed and gone on with: the weights of an uninterrupted run; streamed, another number of ranks is refused."""
    more = [f"data.streaming={streaming}", "data.shuffle_buffer=4", "data.num_workers=0", "checkpoint.every_steps=1"]
    two = [*more, "hardware.devices=2", "hardware.strategy=ddp"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished = run(*training(small_model, str(tars), whole, *two))
    assert finished.returncode == 0, finished.stderr
    kill_after_first_checkpoint(training(small_model, str(tars), cut, *two), cut)
    if streaming == "true":
        one = run(*training(small_model, str(tars), cut, *more, "--resume", "auto"))
        assert one.returncode == 2 and "ranks x workers (was 2 x 1, is 1 x 1) changed; set it back" in one.stderr
    resumed = run(*training(small_model, str(tars), cut, *two, "--resume", "auto"))
    assert resumed.returncode == 0, resumed.stderr
    expected, found = weights(whole), weights(cut)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_fewer_tars_than_workers_are_refused_before_anything_is_loaded(tars: Path, tmp_path: Path) -> None:
    words = training(tmp_path / "no-model", str(tars), tmp_path / "out", "data.streaming=true", "data.num_workers=4")
    refused = run(*(word for word in words if not word.startswith("model.weights")))
    assert refused.returncode == 2 and "1 ranks with 4 workers are more than 3 tars" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_held_out_tars_that_are_not_there_are_refused_before_anything_is_loaded(
    tars: Path, tmp_path: Path, more: list[str]
) -> None:
    """Not when the first curve is due, after all clips are encoded."""
    card = tmp_path / "card.yaml"
    splits = f"{{train: '{tars}/000000.tar', heldout: '{tars}/000009.tar'}}"
    card.write_text(f"{{name: d, domain: video, description: D, licence: MIT, splits: {splits}}}")
    words = training(tmp_path / "no-model", str(card), tmp_path / "out", "sampling.prompts=2", *more)
    refused = run(*(word for word in words if not word.startswith("model.weights")))
    assert refused.returncode == 2 and "none of the 1 tars is there" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_bad_clips_of_a_stream_are_named_and_stop_the_run(tars: Path, small_model: Path, tmp_path: Path) -> None:
    """A tar that is cut off: within the budget it is named, beyond it the run ends in a sentence."""
    import shutil

    folder = tmp_path / "drives"
    shutil.copytree(tars, folder)
    last = folder / "000001.tar"
    last.write_bytes(last.read_bytes()[:30_000])
    more = ["data.streaming=true", "data.shuffle_buffer=4"]
    stopped = run(*training(small_model, str(folder), tmp_path / "stopped", *more))
    assert stopped.returncode == 2 and "1 of 3 tars cannot be read, more than error_budget 0.01" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert RunFolder(tmp_path / "stopped").status["state"] == "failed"
    named = (tmp_path / "stopped" / "skipped.json").read_text()
    assert '"000001.tar"' in named and "cannot be read to its end" in named
