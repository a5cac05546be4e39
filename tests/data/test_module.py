"""The DataModule in a real Trainer: position, resumption, prefetching, and the loader's benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from tiny_shards import FRAMES, HEIGHT, WIDTH, MakeShards, clip_parts

from anyflow.data.module import VideoDataModule
from anyflow.errors import UserError
from experiments.bench.loader import loader_benchmark


class Recorder(pl.LightningModule):
    """Notes the keys that it is trained on; may stop itself."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.keys: list[list[str]] = []
        self.fail_at = fail_at

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch["position"] == self.fail_at:
            raise KeyError("power cut")
        self.keys.append(batch["key"])
        return self.layer(batch["frames"].float().mean().reshape(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


class SaveEvery(pl.Callback):
    """A checkpoint at the end of one batch."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


def data(folder: Path | str, steps: int = 12, num_workers: int = 0, **options: Any) -> VideoDataModule:
    shape = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    return VideoDataModule(folder, batch_size=4, steps=steps, num_workers=num_workers, **{**shape, **options})


def fit(
    module: VideoDataModule, stage: Recorder, ckpt_path: Path | None = None, callbacks: list[pl.Callback] | None = None
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=module.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(stage, datamodule=module, ckpt_path=str(ckpt_path) if ckpt_path else None, weights_only=False)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("after", "num_workers"), [(3, 0), (5, 0), (7, 2)])
def test_a_trainer_resumes_exactly(shards: Path, tmp_path: Path, after: int, num_workers: int) -> None:
    """In the middle of an epoch, at its end (five batches) and behind it; workers prefetch beyond the checkpoint."""
    whole, first, second = Recorder(), Recorder(fail_at=after + 1), Recorder()
    fit(data(shards), whole)
    assert len(whole.keys) == 12
    saved = tmp_path / "state.ckpt"
    with pytest.raises(KeyError, match="power cut"):
        fit(data(shards, num_workers=num_workers), first, callbacks=[SaveEvery(saved, after)])
    trainer = fit(data(shards, num_workers=num_workers), second, saved)
    assert first.keys[:after] + second.keys == whole.keys
    assert trainer.datamodule.state_dict()["epoch"] == 2  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_a_batch_that_failed_does_not_count(shards: Path) -> None:
    module = data(shards)
    with pytest.raises(KeyError):
        fit(module, Recorder(fail_at=6))
    state = module.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 1)


@pytest.mark.filterwarnings("ignore")
def test_skipped_clips_reach_the_state_from_a_worker(make_shards: MakeShards) -> None:
    module = data(make_shards({4: clip_parts(4, caption="")}), num_workers=1, error_budget=0.05)
    fit(module, Recorder())
    assert [skip["key"] for skip in module.state_dict()["skipped"]] == ["clip-004"]


def test_state_may_come_before_set_up(shards: Path) -> None:
    module = data(shards)
    module.setup()
    state = {**module.state_dict(), "epoch": 1, "batch": 2}
    early = data(shards)
    early.load_state_dict(state)
    early.setup()
    assert early.state_dict() == state
    assert next(iter(early.train_dataloader()))["position"] == 7


def test_several_data_sets_are_read_as_one(shards: Path, make_shards: MakeShards) -> None:
    module = data([shards, make_shards(name="more")])  # type: ignore[arg-type]
    module.setup()
    assert module.stream is not None and module.stream.dataset.order.num_samples == 46


def test_a_card_gives_its_folder_its_caption_and_its_length(make_shards: MakeShards, tmp_path: Path) -> None:
    make_shards({2: clip_parts(2, caption="")})
    card = {
        "name": "tiny",
        "domain": "driving",
        "description": "brightness",
        "splits": {"train": "train"},
        "frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "fps": 8,
        "licence": "CC0-1.0",
        "caption": "a grey square",
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(card))
    captions = {
        key: caption
        for batch in data(path, steps=5).train_dataloader()
        for key, caption in zip(batch["key"], batch["caption"], strict=True)
    }
    assert captions.get("clip-002", "a grey square") == "a grey square" and len(captions) == 20
    with pytest.raises(UserError, match=r"data.frames=9 needs 9 frames of every clip of 'tiny', which have 5"):
        data(path, frames=9).setup()
    with pytest.raises(UserError, match="has no split 'test': choose one of train"):
        data(path, split="test").setup()


def test_missing_things_are_named_before_training(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        data(tmp_path / "nowhere").setup()
    with pytest.raises(UserError, match="has 23 clips but a global batch needs 40"):
        VideoDataModule(shards, batch_size=40).setup()


def test_the_benchmark_measures_both(shards: Path) -> None:
    result = loader_benchmark(shards, batch_size=4, frames=FRAMES, height=HEIGHT, width=WIDTH, clips=16)
    assert result["clips"] == 16 and result["ratio"] > 0.3
    ours, bare = result["loader_clips_per_second"], result["pyav_clips_per_second"]
    assert result["ratio"] == pytest.approx(ours / bare)


def steps_of(
    folder: Path | list[Path], split: tuple[int, int, int], state: Any = None, steps: int = 6, **options: Any
) -> tuple[list[list[str]], Any]:
    """The clips of each step in their places, of so many (clips, ranks, passes), and a state after the first steps."""
    size, ranks, passes = split
    dealt: list[list[list[str]]] = []
    states: list[Any] = []
    for rank in range(ranks):
        shape = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}
        module = VideoDataModule(
            folder,  # type: ignore[arg-type]
            batch_size=size,
            passes=passes,
            steps=steps * passes,
            **shape,
            **options,
        )
        module.trainer = type("Ranks", (), {"global_rank": rank, "world_size": ranks, "callbacks": []})()  # type: ignore[assignment]
        module.setup()
        module.trainer = None
        assert module.stream is not None
        if state is not None:
            module.load_state_dict(state)
        batches = []
        for batch in module.train_dataloader():
            module.stream.advance(batch)
            batches.append(batch["key"])
            if len(batches) == 3 * passes:
                states.append(module.state_dict())
        dealt.append(batches)
    passed = [
        [clip for clips in zip(*ranks_of, strict=True) for clip in clips] for ranks_of in zip(*dealt, strict=True)
    ]
    merged = [
        [clip for batch in passed[first : first + passes] for clip in batch] for first in range(0, len(passed), passes)
    ]
    return merged, states[0] if states else None


@pytest.mark.parametrize("split", [(1, 1, 8), (2, 1, 4), (2, 2, 2), (1, 8, 1), (4, 2, 1)])
def test_a_step_has_the_same_clips_however_it_is_split(shards: Path, split: tuple[int, int, int]) -> None:
    """Over several epochs, whose ends fall between passes; and a run may go on with another split of its step."""
    expected, state = steps_of(shards, (8, 1, 1))
    found, other = steps_of(shards, split)
    assert found == expected and len({clip for step in expected for clip in step}) > 8
    assert other["plan_hash"] == state["plan_hash"] and other["batch"] == state["batch"]
    assert steps_of(shards, split, state)[0] == expected[3:]
    assert steps_of(shards, (8, 1, 1), other)[0] == expected[3:]


def test_a_step_of_more_clips_than_there_are_goes_through_them_again(shards: Path) -> None:
    count = len({clip for step in steps_of(shards, (1, 1, 1), steps=40)[0] for clip in step})
    merged, _ = steps_of(shards, (4, 1, 8), steps=4)
    assert count < 32 and all(len(step) == 32 for step in merged)


@pytest.mark.parametrize("split", [(4, 1, 8), (2, 1, 16), (16, 1, 2), (2, 4, 4), (1, 1, 32)])
def test_a_step_of_more_clips_than_there_are_goes_on_in_another_split(
    shards: Path, split: tuple[int, int, int]
) -> None:
    """What one does after running out of memory: half the clips a pass, twice the passes, and the very same steps."""
    expected, state = steps_of(shards, (8, 1, 4))
    assert state["clips"] == 32 and state["plan"]["global_batch"] == 8
    state = json.loads(json.dumps(state))
    assert steps_of(shards, split, state)[0] == expected[3:]
    back = steps_of(shards, split, state, steps=6)[1]
    assert back["plan_hash"] == state["plan_hash"] and back["batch"] == steps_of(shards, (8, 1, 4), state)[1]["batch"]


@pytest.mark.parametrize("split", [(8, 1, 3), (4, 1, 4), (8, 1, 1)])
def test_a_step_of_other_clips_does_not_go_on(shards: Path, split: tuple[int, int, int]) -> None:
    """Also where the order is the same: shares and averages are over a step's clips."""
    state = steps_of(shards, (8, 1, 4))[1]
    with pytest.raises(UserError, match=r"global batch \(was 32, is \d+\) changed; set data.global_batch=32"):
        steps_of(shards, split, state)


def test_a_checkpoint_of_before_goes_on_as_it_was_split(shards: Path) -> None:
    expected, state = steps_of(shards, (8, 1, 4))
    del state["clips"]
    assert steps_of(shards, (8, 1, 4), state)[0] == expected[3:]


def test_a_mixture_goes_on_in_another_split(shards: Path, make_shards: MakeShards) -> None:
    """Of 23 and 23 clips, 48 in a step: more than there are."""
    both: list[Path] = [shards, make_shards(name="more")]
    expected, state = steps_of(both, (8, 1, 6), weights=(2.0, 1.0))
    assert state["plan"]["shares"] and state["plan"]["global_batch"] == 8
    for split in ((4, 1, 12), (16, 1, 3), (4, 2, 6)):
        assert steps_of(both, split, state, weights=(2.0, 1.0))[0] == expected[3:]
