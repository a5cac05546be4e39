"""Pixels to latents and back, prompts to embeddings: the numbers of diffusers' own pipeline."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AnyFlowPipeline, AutoencoderKLWan, FlowMapEulerDiscreteScheduler
from small_models import wan22_vae
from torch import Tensor

from anyflow.backbone import codec as module
from anyflow.backbone import fingerprint
from anyflow.backbone.codec import Codec, bytes_from_pixels, clean_prompt, pixels_from_bytes
from anyflow.backbone.embedded import build_vae
from anyflow.backbone.fingerprint import fingerprint_codec
from anyflow.backbone.layout import Layout
from anyflow.errors import UserError


def wan21_vae() -> AutoencoderKLWan:
    """Wan 2.1's kind (no shortcuts, no patches), tiny, and with its statistics."""
    return AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()


VAES = {"embedded": lambda: build_vae(seed=0).eval(), "wan2.1": wan21_vae, "wan2.2": wan22_vae}


def stored_statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


@torch.no_grad()
def decoded_pixels(codec: Codec, latents: Tensor) -> Tensor:
    """Float32 ``[B, 3, F, H, W]`` in [-1, 1], before it becomes bytes."""
    return torch.cat(list(codec._decoded(latents, None)))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 13])
@pytest.mark.parametrize("kind", VAES)
def test_both_ways_equal_the_loops_of_diffusers(kind, frames) -> None:
    vae = VAES[kind]()
    mean, std = stored_statistics(vae)
    video = torch.rand(2, 3, frames, 32, 64) * 2 - 1
    expected = ((vae.encode(video).latent_dist.mode() - mean) / std).transpose(1, 2)
    codec = Codec(copy.deepcopy(vae))
    latents = codec.encode_video(video)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    assert latents.shape[1:] == codec.latent_shape(frames, 32, 64)
    decoded = vae.decode(latents.transpose(1, 2) * std + mean).sample
    torch.testing.assert_close(decoded_pixels(codec, latents), decoded, atol=2e-5, rtol=1e-5)
    streamed = torch.cat(list(codec.decode_parts(latents.split(2, dim=1))), dim=1)
    assert (streamed.int() - bytes_from_pixels(decoded).int()).abs().max() <= 1


def test_large_videos_take_the_loop(codec, monkeypatch) -> None:
    video = torch.randint(0, 256, (1, 9, 32, 48, 3), dtype=torch.uint8)
    latents = codec.encode_video(video)
    pixels = decoded_pixels(codec, latents)
    monkeypatch.setattr(module, "ONE_PASS_PIXELS", 0)
    torch.testing.assert_close(codec.encode_video(video), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded_pixels(codec, latents), pixels, atol=2e-5, rtol=1e-5)


def test_clips_encoded_one_by_one_do_not_depend_on_their_batch(codec) -> None:
    video = torch.randint(0, 256, (3, 5, 32, 48, 3), dtype=torch.uint8)
    together = codec.encode_video(video, clips_per_pass=1)
    assert torch.equal(together[2:], codec.encode_video(video[2:], clips_per_pass=1))


def test_bytes_survive_the_way_to_pixels_and_back() -> None:
    video = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    assert torch.equal(bytes_from_pixels(pixels_from_bytes(video)), video)


def test_decode_gives_bytes_in_the_layout_of_videos(codec) -> None:
    video = codec.decode(torch.zeros(2, 2, 16, 4, 6))
    assert video.shape == (2, 5, 32, 48, 3) and video.dtype == torch.uint8


def test_the_codec_stays_frozen(codec) -> None:
    assert not codec.train().training
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_text_equals_the_pipelines(codec, stock, captions) -> None:
    pipeline = AnyFlowPipeline(
        codec.tokenizer, codec.text_encoder, stock, codec.vae, FlowMapEulerDiscreteScheduler(shift=3.0)
    )
    prompts = [*captions, "", "  two &amp; a   half\n "]
    expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    text = codec.encode_text(prompts)
    assert text.padded_length == 512 and text.lengths.max() + 1 == text.embeddings.shape[1]
    torch.testing.assert_close(text.embeddings, expected[:, : text.embeddings.shape[1]], atol=1e-5, rtol=1e-5)
    assert text.lengths.tolist() == [int(row.any(-1).sum()) for row in expected]


def test_a_captions_embedding_does_not_depend_on_its_batch(codec, captions) -> None:
    fresh = Codec(codec.vae, codec.tokenizer, codec.text_encoder)
    both = codec.encode_text(captions)
    alone = fresh.encode_text(captions[:1])
    assert torch.equal(both.select(torch.tensor([0])).embeddings, alone.embeddings)


def test_known_captions_are_not_encoded_again_and_old_ones_are_forgotten(codec, monkeypatch, captions) -> None:
    calls: list[int] = []

    class Counting(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> object:
            calls.append(1)
            return codec.text_encoder(*inputs)

    counted = Codec(codec.vae, codec.tokenizer, Counting())
    counted.encode_text([captions[0], captions[0]])
    counted.encode_text(captions)
    assert len(calls) == 2
    monkeypatch.setattr(module, "TEXT_CACHE_BYTES", 1)
    counted.encode_text(["new"])  # room for one only
    counted.encode_text([captions[0]])
    assert len(calls) == 4


def test_long_prompts_are_cut(codec) -> None:
    text = codec.encode_text(["word " * 900])
    assert text.lengths.item() == 512 and text.embeddings.shape[1] == 512


def test_prompts_are_cleaned() -> None:
    assert clean_prompt("  a &lt;b&gt;\n\tc ") == "a <b> c"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 64, 96), "frames is 16, but must be 4n \\+ 1: use 13 or 17"),
        ((17, 60, 96), "height is 60 pixels, but must be a multiple of 16: use 48 or 64"),
        ((17, 64, 8), "width is 8 pixels"),
    ],
)
def test_unfit_sizes_are_refused_with_the_nearest_that_fit(shape, message) -> None:
    with pytest.raises(UserError, match=message):
        Layout().check(*shape)
    Layout().check(1, 16, 16)
    Layout().check(17, 64, 96)


def test_no_text_encoder_is_said(codec) -> None:
    with pytest.raises(UserError, match="no text encoder"):
        Codec(codec.vae).encode_text(["a"])


def test_a_stored_codec_is_in_memory_only_while_it_works(small_model: Path) -> None:
    """Before and after, its weights are on no device; what it says is what the loaded one says."""
    stored, loaded = Codec.from_folder(small_model, stored=True), Codec.from_folder(small_model)
    video = torch.randint(0, 256, (1, 5, 32, 32, 3), dtype=torch.uint8)
    assert stored.is_stored and all(weight.is_meta for weight in stored.parameters())
    assert stored.latent_shape(5, 32, 32) == loaded.latent_shape(5, 32, 32) and stored.device.type == "cpu"
    with stored.lent("cpu"):
        assert not stored.is_stored
        assert torch.equal(stored.encode_video(video), loaded.encode_video(video))
        assert torch.equal(stored.embed("a car"), loaded.embed("a car"))
    assert stored.is_stored and all(weight.is_meta for weight in stored.parameters())
    assert stored.remembers(["a car"]) and not stored.remembers(["a bus"])


def test_texts_encoded_beforehand_need_no_encoder(small_model: Path) -> None:
    stored = Codec.from_folder(small_model, stored=True)
    stored.known_texts = {"known": torch.ones(3, 64)}
    assert stored.remembers(["known"])
    text = stored.encode_text(["known"])
    assert stored.is_stored and text.lengths.tolist() == [3] and torch.equal(text.embeddings[0, :3], torch.ones(3, 64))
    assert len(stored.embed("never seen")) > 0, "it loads its encoder for a prompt that nobody foresaw"
    assert stored.is_stored


def test_the_fingerprint_sees_weights_statistics_and_precision(small_model: Path, tmp_path: Path) -> None:
    whole = (torch.float32, torch.float32)
    seen = {fingerprint_codec(small_model, *whole), fingerprint_codec(small_model, torch.float32, torch.bfloat16)}
    copied = shutil.copytree(small_model, tmp_path / "copy")
    assert fingerprint_codec(copied, *whole) in seen, "the same files elsewhere are the same codec"
    config = json.loads((copied / "vae" / "config.json").read_text())
    for change in ({"_diffusers_version": "9"}, {"latents_mean": [1.0] * 16}):
        (copied / "vae" / "config.json").write_text(json.dumps(config | change))
        seen.add(fingerprint_codec(copied, *whole))
    assert len(seen) == 3, "who wrote it says nothing, what latents are normalised by does"
    weights = next((copied / "text_encoder").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint_codec(copied, *whole) not in seen


def test_of_large_files_pieces_are_read(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = shutil.copytree(small_model, tmp_path / "copy")
    monkeypatch.setattr(fingerprint, "WHOLE", 100)
    monkeypatch.setattr(fingerprint, "STRIDE", 2**16)
    monkeypatch.setattr(fingerprint, "PIECE", 2**10)
    before = fingerprint_codec(copied, torch.float32, torch.float32)
    weights = next((copied / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    for place in range(0, len(data), 2**14):
        data[place] ^= 1
    weights.write_bytes(data)
    assert fingerprint_codec(copied, torch.float32, torch.float32) != before


def test_a_parked_codec_is_lent_and_comes_back(codec: Codec) -> None:
    captions = ["a prompt that nobody encoded"]
    assert not codec.remembers(captions)
    codec.is_parked = True
    try:
        with codec.lent("cpu"):
            codec.encode_text(captions)
        assert codec.device.type == "cpu" and codec.remembers(captions)
    finally:
        codec.is_parked = False
