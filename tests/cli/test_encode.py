"""``anyflow data encode``: one process and two ranks make the same cache; killed, it goes on; training reads it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from shell import command, environment, run

SHAPE = ("--frames", "5", "--size", "32x32")


def encode(model: Path, out: Path, *more: str) -> list[str]:
    words = ["data", "encode", "driving", "--model", str(model), "--splits", "heldout", "--out", str(out)]
    return [*words, *SHAPE, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone")
    done = run(*encode(small_model, out, "--buckets", "5x32x48", "--json"))
    assert done.returncode == 0, done.stderr
    assert "driving heldout: 40 clips, 36 prompts, about" in done.stderr, "bytes and time come before the work"
    return Path(json.loads(done.stdout)["caches"]["heldout"])


def test_encode_writes_latents_and_each_text_once(alone: Path) -> None:
    facts = json.loads((alone / "cache.json").read_text())
    assert facts["texts"] == 36 and [shape["width"] for shape in facts["shapes"]] == [32, 48]
    assert facts["latent_shapes"] == [None, [2, 16, 4, 6]], "the footage is 3:2: none of it is cropped to a square"
    assert [path.name for path in alone.parent.iterdir()] == [alone.name]


def test_a_model_is_encoded_for_the_precision_that_its_recipe_trains_in(project: Path) -> None:
    """On any device: a cache made on a GPU must not be refused by training in float32 there."""
    import torch

    from anyflow.backbone.codec import codec_dtypes
    from anyflow.evaluation.models import recipe_of, trained_shape

    for name in ("data/models/tiny", f"{project}/data/models/tiny", str(project / "data/../data/models/tiny/")):
        recipe = recipe_of(name)
        assert recipe is not None and recipe.model.name == "tiny", name
        assert codec_dtypes(recipe.hardware.precision) == (torch.float32, torch.float32)
        assert trained_shape(name) == (17, 64, 96, 0), "each domain's own frame rate, not that of the README's example"
    large = recipe_of("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert large is not None and codec_dtypes(large.hardware.precision) == (torch.float32, torch.bfloat16)
    assert recipe_of("somebody/else") is None


def test_an_unknown_precision_is_one_sentence(small_model: Path, tmp_path: Path) -> None:
    done = run(*encode(small_model, tmp_path, "--precision", "fp8"))
    assert done.returncode == 2 and "hardware.precision" in done.stderr and "bf16-mixed" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_make_the_same_cache(small_model: Path, alone: Path, tmp_path: Path) -> None:
    done = run(*encode(small_model, tmp_path, "--buckets", "5x32x48", "--devices", "2"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / alone.name) == contents(alone)


def test_a_worker_encodes_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the last bits of a cache depend on the machine's cores, and workers of a CPU fight for them."""
    import torch

    from anyflow.training import encoding

    seen = []
    monkeypatch.setattr(encoding, "estimate", lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        encoding._do(None, object(), encoding.TimedTexts((), 0))  # type: ignore[arg-type]
        assert seen == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_killed_ranks_go_on_where_they_stopped(small_model: Path, alone: Path, tmp_path: Path) -> None:
    """Two ranks are killed when a shard is whole; one process ends the work and does not touch that shard."""
    words = command(*encode(small_model, tmp_path, "--buckets", "5x32x48", "--devices", "2"))
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (notes := [note for note in tmp_path.rglob("*.done") if ".partial" not in str(note)]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # its ranks die with it
    process.wait()
    time.sleep(0.5)
    if (tmp_path / alone.name).exists():
        pytest.skip("it was faster than the signal")
    before = {note: note.with_suffix(".tar").stat().st_mtime_ns for note in notes}
    done = run(*encode(small_model, tmp_path, "--buckets", "5x32x48"))
    assert done.returncode == 0, done.stderr
    final = tmp_path / alone.name
    assert contents(final) == contents(alone)
    for note, written in before.items():
        place = final / note.relative_to(next(p for p in note.parents if p.name.endswith(".part"))).with_suffix(".tar")
        assert place.stat().st_mtime_ns == written


def test_training_takes_the_cache_and_leaves_the_codec_in_its_files(
    small_model: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from anyflow.recipe import load_recipe
    from anyflow.training.assemble import assemble

    monkeypatch.chdir(project)
    shape = ["data.frames=5", "data.height=32", "data.width=32", "data.split=heldout", "data.heldout=train"]
    footage = shutil.copytree(project / "data/starter/driving", tmp_path / "driving")  # the cache lies beside it
    options = [f"data.card={footage}", f"model.weights={small_model}", "data.num_workers=0", *shape]
    recipe = load_recipe("finetune/driving", overrides=options)
    dry = assemble(recipe, encode=False)
    dry.data.setup()
    assert "frames" in next(iter(dry.data.train_dataloader())), "a dry run encodes nothing"
    parts = assemble(recipe)
    parts.data.setup()
    batch = next(iter(parts.data.train_dataloader()))
    data = parts.stage.batches.prepare(batch, parts.stage.device)
    assert parts.codec.is_stored and all(weight.is_meta for weight in parts.codec.parameters())
    assert data.clean.shape == (8, 2, 16, 4, 4) and data.text.embeddings.isfinite().all()
    with parts.codec.lent("cpu"):
        parts.codec.known_texts = None
        parts.codec._text_cache.clear()
        fresh = parts.codec.encode_text([*batch["caption"], recipe.model.negative_prompt])
    assert torch.equal(fresh.embeddings, data.text.embeddings)
