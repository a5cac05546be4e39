"""Latents computed beforehand: the same numbers as on the fly, whole or absent, refused when stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_shards import CLIPS, FRAMES, HEIGHT, WIDTH, MakeShards, clip_parts
from torch import Tensor, nn

from anyflow.data import cache
from anyflow.data.cache import CACHE_FILE, codec_fingerprint, encode_dataset, estimate_cost, load_cache
from anyflow.data.decode import ClipShape
from anyflow.data.module import VideoDataModule
from anyflow.data.shards import check_folder, load_index
from anyflow.errors import UserError


class MeanCodec:
    """Latents of 2 channels: means over blocks of 8 x 8 pixels, of every 4th frame, times a weight."""

    def __init__(self, weight: float = 1.0) -> None:
        self.vae = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.vae.weight, weight)
        self.calls: list[int] = []

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        self.calls.append(len(video))
        blocks = video[:, ::4].float().unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).mean((3, 5)) / 255
        return (blocks * self.vae.weight.item()).movedim(-1, 2)[:, :, :2]


def encode(folder: Path, codec: MeanCodec, **options: object) -> Path:
    shape = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    return encode_dataset(folder, "train", codec, **{**shape, **options})  # type: ignore[arg-type]


def module(folder: Path, **options: object) -> VideoDataModule:
    shape = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    data = VideoDataModule(folder, batch_size=4, steps=6, **{**shape, **options})  # type: ignore[arg-type]
    data.setup()
    return data


def test_latents_come_back_as_they_would_on_the_fly(shards: Path) -> None:
    codec, seen = MeanCodec(), []
    folder = encode(shards, codec, progress=lambda done, total: seen.append((done, total)))
    assert set(codec.calls) == {1}, "each clip by itself"
    assert seen == [(done, CLIPS) for done in range(1, CLIPS + 1)]
    assert check_folder(folder) == []
    frames = module(shards)
    latents = module(shards, cache=folder, codec_hash=codec_fingerprint(codec.vae))
    for fresh, cached in zip(frames.train_dataloader(), latents.train_dataloader(), strict=True):
        assert cached["latents"].shape == (4, 2, 2, 4, 6) and cached["latents"].dtype == torch.float32
        expected = {
            key: codec.encode_video(row[None])[0] for key, row in zip(fresh["key"], fresh["frames"], strict=True)
        }
        for key, caption, row in zip(cached["key"], cached["caption"], cached["latents"], strict=True):
            assert caption == f"clip {int(key[-3:])}"
            if key in expected:
                assert torch.equal(row, expected[key].half().float())


def test_encoding_twice_gives_the_same_bytes_and_does_the_work_once(shards: Path, tmp_path: Path) -> None:
    first = encode(shards, MeanCodec(), out=tmp_path / "a")
    second = encode(shards, MeanCodec(), out=tmp_path / "b")
    assert first.name == second.name and load_index(first) == load_index(second)
    again = MeanCodec()
    assert encode(shards, again, out=tmp_path / "a") == first and not again.calls


def test_the_cost_is_told_beforehand(shards: Path) -> None:
    """Tar members are padded to blocks and a tar ends with some: the estimate is within a block or two a clip."""
    cost = estimate_cost(shards, "train", MeanCodec(), ClipShape(FRAMES, HEIGHT, WIDTH))
    made = load_index(encode(shards, MeanCodec()))
    assert cost.clips == CLIPS and cost.seconds > 0
    assert abs(cost.bytes - made.bytes) < CLIPS * 1024 + 10_240


def test_other_facts_make_another_folder(shards: Path, make_shards: MakeShards) -> None:
    other = make_shards({0: clip_parts(1)}, name="other")
    out = shards / "cache"
    folders = {
        encode(shards, MeanCodec(), out=out),
        encode(shards, MeanCodec(2.0), out=out),
        encode(shards, MeanCodec(), out=out, frames=1),
        encode(shards, MeanCodec(), out=out, height=16),
        encode(shards, MeanCodec(), out=out, fps=4.0, frames=1),
        encode(other, MeanCodec(), out=out),
    }
    assert len(folders) == 6 and sorted(path.name for path in out.iterdir()) == sorted(f.name for f in folders)


def test_a_cache_that_does_not_fit_is_refused(shards: Path) -> None:
    folder = encode(shards, MeanCodec())
    with pytest.raises(UserError, match="encoded by another autoencoder"):
        module(shards, cache=folder, codec_hash=codec_fingerprint(MeanCodec(2.0).vae))
    with pytest.raises(UserError, match=r"holds ClipShape\(frames=5.* not ClipShape\(frames=1"):
        module(shards, cache=folder, frames=1)
    with pytest.raises(UserError, match=r"no cache\.json"):
        module(shards, cache=shards)
    (folder / CACHE_FILE).write_text("{")
    with pytest.raises(UserError, match=r"cache\.json is damaged"):
        load_cache(folder)


def test_a_damaged_cache_is_rebuilt(shards: Path) -> None:
    folder = encode(shards, MeanCodec())
    before = load_index(folder)
    next(folder.glob("*.tar")).unlink()
    codec = MeanCodec()
    assert encode(shards, codec) == folder and len(codec.calls) == CLIPS and load_index(folder) == before


def test_a_broken_encoding_shows_nothing_and_goes_on(
    make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 5 clips, the 4th bad; broken off at the 12th call: two shards are whole, and are not made again."""

    class Interrupted(MeanCodec):
        def encode_video(self, video: Tensor) -> Tensor:
            if len(self.calls) == 12:
                raise KeyboardInterrupt
            return super().encode_video(video)

    monkeypatch.setattr(cache, "CLIPS_PER_SHARD", 5)
    folder = make_shards({3: clip_parts(3, caption="")})
    whole = encode(folder, MeanCodec(), out=tmp_path / "whole", error_budget=0.1)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, Interrupted(), out=tmp_path / "out", error_budget=0.1)
    assert all(path.name.startswith(".") for path in (tmp_path / "out").iterdir())
    codec = MeanCodec()
    made = encode(folder, codec, out=tmp_path / "out", error_budget=0.1)
    assert len(codec.calls) == CLIPS - 10
    assert [path.name for path in (tmp_path / "out").iterdir()] == [made.name]
    assert {p.name: p.read_bytes() for p in made.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_folder_that_cannot_be_written_is_one_sentence(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        encode(shards, MeanCodec(), out=tmp_path / "file")


def test_bad_clips_are_left_out_named_and_budgeted(make_shards: MakeShards) -> None:
    folder = make_shards({3: clip_parts(3, caption=""), 5: {**clip_parts(5), "mp4": b"x"}})
    with pytest.raises(UserError, match=r"1 of 23 clips cannot be used.*clip-003 \(no caption\)"):
        encode(folder, MeanCodec())
    made = encode(folder, MeanCodec(), error_budget=0.1)
    assert [skip.key for skip in load_cache(made).skipped] == ["clip-003", "clip-005"]
    data = module(folder, cache=made, error_budget=0.1)
    keys = [key for batch in data.train_dataloader() for key in batch["key"]]
    assert "clip-003" not in keys and len(data.state_dict()["skipped"]) == 2


def test_the_fingerprint_sees_weights_precision_and_configuration() -> None:
    base, same = MeanCodec().vae, MeanCodec().vae
    assert codec_fingerprint(base) == codec_fingerprint(same)
    other = [MeanCodec(1.001).vae, MeanCodec().vae.bfloat16(), MeanCodec().vae]
    other[2].config = {"latents_mean": [0.0], "_name_or_path": "a"}  # type: ignore[assignment]
    assert len({codec_fingerprint(vae) for vae in [base, *other]}) == 4
    moved = MeanCodec().vae
    moved.config = {"latents_mean": [0.0], "_name_or_path": "b"}  # type: ignore[assignment]
    assert codec_fingerprint(moved) == codec_fingerprint(other[2])


def test_latents_of_another_shape_are_bad_clips(shards: Path) -> None:
    folder = encode(shards, MeanCodec())
    document = json.loads((folder / CACHE_FILE).read_text())
    document["latent_shape"] = [3, 2, 4, 6]
    (folder / CACHE_FILE).write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"latents of shape \[2, 2, 4, 6\] where \[3, 2, 4, 6\] is needed"):
        next(iter(module(shards, cache=folder).train_dataloader()))
    assert load_cache(folder).shape == ClipShape(FRAMES, HEIGHT, WIDTH)
