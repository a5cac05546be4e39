"""Latents computed beforehand: the same numbers as on the fly, whole or absent, refused when stale."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_shards import CLIPS, FRAMES, HEIGHT, WIDTH, MakeShards, clip_parts
from torch import Tensor

from anyflow.data import encode as encoding
from anyflow.data.cache import CACHE_FILE, TextStore, load_cache
from anyflow.data.decode import ClipShape
from anyflow.data.encode import Encoding, estimate
from anyflow.data.module import VideoDataModule
from anyflow.data.shards import check_folder, load_index
from anyflow.errors import UserError

SHAPE = ClipShape(FRAMES, HEIGHT, WIDTH)


class MeanCodec:
    """Latents of 2 channels: means over blocks of 8 x 8 pixels, of every 4th frame, times a weight.

    A prompt's embedding is its letters' numbers.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.calls: list[int] = []
        self.prompts: list[str] = []

    @property
    def fingerprint(self) -> str:
        return f"{self.weight:08.3f}" * 8

    def encode_video(self, video: Tensor) -> Tensor:
        self.calls.append(len(video))
        blocks = video[:, ::4].float().unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).mean((3, 5)) / 255
        return (blocks * self.weight).movedim(-1, 2)[:, :, :2]

    def embed(self, prompt: str) -> Tensor:
        self.prompts.append(prompt)
        return torch.tensor([[float(ord(letter))] for letter in prompt], dtype=torch.bfloat16).reshape(-1, 1)


def encode(folder: Path, codec: MeanCodec, shapes: Sequence[ClipShape] = (SHAPE,), **options: object) -> Path:
    progress = options.pop("progress", None)
    encoding = Encoding(folder, "train", codec, shapes, **options)  # type: ignore[arg-type]
    if not encoding.is_whole():
        encoding.all(progress)  # type: ignore[arg-type]
    return encoding.folder


def module(folder: Path, **options: object) -> VideoDataModule:
    shape = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    data = VideoDataModule(folder, **{**shape, "batch_size": 4, "steps": 6, **options})  # type: ignore[arg-type]
    data.setup()
    return data


def test_latents_come_back_as_they_would_on_the_fly(shards: Path) -> None:
    codec, seen = MeanCodec(), []
    folder = encode(shards, codec, progress=lambda done, total: seen.append((done, total)))
    assert set(codec.calls) == {1}, "each clip by itself"
    assert seen == [(done, CLIPS) for done in range(1, CLIPS + 1)]
    assert check_folder(folder) == []
    frames = module(shards)
    latents = module(shards, cache=folder, codec_hash=codec.fingerprint)
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


def test_a_run_goes_on_where_its_cache_was_computed_again(shards: Path, tmp_path: Path) -> None:
    """On other threads or another machine latents differ by rounding, so the shards have other bytes."""

    class Rounding(MeanCodec):
        def encode_video(self, video: Tensor) -> Tensor:
            return super().encode_video(video) * 1.001

    first, second = encode(shards, MeanCodec(), out=tmp_path / "a"), encode(shards, Rounding(), out=tmp_path / "b")
    assert load_index(first).shards[0].sha256 != load_index(second).shards[0].sha256
    codec_hash = MeanCodec().fingerprint
    here, there = (module(shards, cache=folder, codec_hash=codec_hash) for folder in (first, second))
    second_batch = [batch["key"] for batch in here.train_dataloader()][1]
    there.load_state_dict({**here.state_dict(), "epoch": 0, "batch": 1})
    assert next(iter(there.train_dataloader()))["key"] == second_batch


def test_the_cost_is_told_beforehand(shards: Path) -> None:
    """Tar members are padded to blocks and a tar ends with some: the estimate is within a block or two a clip."""
    cost = estimate(Encoding(shards, "train", MeanCodec(), [SHAPE]))
    folder = encode(shards, MeanCodec())
    made = load_index(folder).bytes + load_index(folder / "texts").bytes
    assert cost.clips == cost.texts == CLIPS and cost.seconds > 0
    assert abs(cost.bytes - made) < 2 * CLIPS * 1024 + 20_480


def test_other_facts_make_another_folder(shards: Path, make_shards: MakeShards) -> None:
    other = make_shards({0: clip_parts(1)}, name="other")
    out = shards / "cache"
    folders = {
        encode(shards, MeanCodec(), out=out),
        encode(shards, MeanCodec(2.0), out=out),
        encode(shards, MeanCodec(), [ClipShape(1, HEIGHT, WIDTH)], out=out),
        encode(shards, MeanCodec(), [ClipShape(FRAMES, 16, WIDTH)], out=out),
        encode(shards, MeanCodec(), [ClipShape(1, HEIGHT, WIDTH, 4.0)], out=out),
        encode(other, MeanCodec(), out=out),
    }
    assert len(folders) == 6 and sorted(path.name for path in out.iterdir()) == sorted(f.name for f in folders)


def test_a_cache_that_does_not_fit_is_refused(shards: Path) -> None:
    folder = encode(shards, MeanCodec())
    with pytest.raises(UserError, match="encoded by another autoencoder or text encoder"):
        module(shards, cache=folder, codec_hash=MeanCodec(2.0).fingerprint)
    with pytest.raises(UserError, match=r"holds .*ClipShape\(frames=5.* not .*ClipShape\(frames=1"):
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

    monkeypatch.setattr(encoding, "CLIPS_PER_SHARD", 5)
    folder = make_shards({3: clip_parts(3, caption="")})
    whole = encode(folder, MeanCodec(), out=tmp_path / "whole", error_budget=0.1)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, Interrupted(), out=tmp_path / "out", error_budget=0.1)
    assert all(path.name.startswith(".") for path in (tmp_path / "out").iterdir())
    codec = MeanCodec()
    made = encode(folder, codec, out=tmp_path / "out", error_budget=0.1)
    assert len(codec.calls) == CLIPS - 10
    assert [path.name for path in (tmp_path / "out").iterdir()] == [made.name]
    assert contents(made) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    with pytest.raises(UserError, match=r"2 of 23 clips cannot be used, more than error_budget 0\.05"):
        module(folder, cache=made, error_budget=0.05)
    data = module(folder, cache=made, error_budget=0.1)
    keys = [key for batch in data.train_dataloader() for key in batch["key"]]
    assert "clip-003" not in keys and len(data.state_dict()["skipped"]) == 2


def test_latents_of_another_shape_are_bad_clips(shards: Path) -> None:
    folder = encode(shards, MeanCodec())
    document = json.loads((folder / CACHE_FILE).read_text())
    document["latent_shapes"] = [[3, 2, 4, 6]]
    (folder / CACHE_FILE).write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"latents of shape \[2, 2, 4, 6\] where \[3, 2, 4, 6\] is needed"):
        next(iter(module(shards, cache=folder).train_dataloader()))
    assert load_cache(folder).shapes == (SHAPE,)


def test_each_caption_is_embedded_once_and_trimmed(make_shards: MakeShards) -> None:
    same = {number: clip_parts(number, caption="the same") for number in range(2, CLIPS)}
    codec = MeanCodec()
    folder = encode(make_shards(same), codec, prompts=["", "blurry"])
    assert codec.prompts == ["", "blurry", "clip 0", "clip 1", "the same"] and load_cache(folder).texts == 5
    texts = TextStore([folder])
    for prompt in codec.prompts:
        stored = texts.get(prompt)
        assert stored is not None and stored.dtype == torch.bfloat16
        assert torch.equal(stored, MeanCodec().embed(prompt)), "to its own length, as the encoder gave it"
    assert "clip 7" not in texts and texts.get("clip 7") is None


def test_an_embedding_that_cannot_be_read_is_as_if_it_were_not_there(shards: Path) -> None:
    folder = encode(shards, MeanCodec())
    tar = next((folder / "texts").glob("*.tar"))
    tar.write_bytes(b"\0" * tar.stat().st_size)
    assert TextStore([folder]).get("clip 3") is None


def test_clips_of_several_shapes_are_encoded_together_and_come_back_by_shape(shards: Path) -> None:
    """5 frames of 48 x 32 fit the first shape best; without enough frames for 9 x 32 x 48 nobody takes that."""
    shapes = [ClipShape(1, 16, 16), ClipShape(5, HEIGHT, WIDTH), ClipShape(9, HEIGHT, WIDTH)]
    folder = encode(shards, MeanCodec(), shapes)
    assert load_cache(folder).latent_shapes == (None, (2, 2, 4, 6), None)
    own = {"frames": 1, "height": 16, "width": 16}
    data = module(shards, cache=folder, batch_size=24, buckets=[(5, HEIGHT, WIDTH), (9, HEIGHT, WIDTH)], **own)
    assert all(batch["latents"].shape == (2, 2, 2, 4, 6) for batch in data.train_dataloader())
