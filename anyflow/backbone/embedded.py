"""The tiny model that ships with the project: its configuration, and its parts that are never trained.

It has the same four parts as Wan and loads through the same classes, so whatever runs on it runs on Wan: a T5 tokenizer
and UMT5 encoder (random, fixed), Wan's autoencoder, AnyFlow's transformer. 64 x 96 pixels, 17 frames, 7 M parameters.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from anyflow.backbone.codec import clean_prompt

TEXT_DIM = 64
SHIFT = 3.0
"""120 tokens carry less redundancy than Wan's 32,760, so noise hides less: a smaller shift than Wan's 5."""

_SPELLED = [chr(code) for code in range(33, 127)]


def transformer_config(channels: int = 16) -> dict[str, Any]:
    """Arguments of ``AnyFlowTransformer3DModel``: 192 wide, 6 layers, 4 M parameters, 120 tokens a clip.

    Args:
        channels: of the codec's latents.
    """
    return {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": TEXT_DIM,
        "freq_dim": 64,
        "ffn_dim": 768,
        "num_layers": 6,
    }


def build_vae(seed: int) -> AutoencoderKLWan:
    """An untrained autoencoder: 16 channels at 1/4 of the frames and 1/8 of the sides, 2.7 M parameters.

    The log-variance starts at -5: at 0 the posterior's noise drowns the first thousand steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=32,
            z_dim=16,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True, True],
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
        )
    with torch.no_grad():
        vae.quant_conv.bias[16:] = -5.0
    return vae


def build_tokenizer(captions: Iterable[str], vocab_size: int = 1024) -> T5Tokenizer:
    """A T5 tokenizer of the captions' words; other words, and all numbers, are spelled out.

    Numbers are spelled so that one never seen is still made of known digits. The same captions always give the
    same tokenizer. Padding is 0, end 1, unknown 2.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        for chunk in clean_prompt(caption).split(" "):
            for run in re.finditer(r"[A-Za-z]{2,}", chunk):
                counts[("▁" if run.start() == 0 else "") + run.group()] += 1
    special = ["<pad>", "</s>", "<unk>", "▁"]
    room = vocab_size - len(special) - len(_SPELLED)
    words = sorted(counts, key=lambda word: (-counts[word], word))[: max(room, 0)]
    total = sum(counts.values())
    # Any word known as a whole beats spelling it: every spelled letter costs more than the rarest word.
    spelled_score = -math.log(total + 1) - 5.0
    vocabulary = [(piece, 0.0) for piece in special[:3]] + [("▁", spelled_score)]
    vocabulary += [(word, math.log(counts[word] / total)) for word in words]
    vocabulary += [(letter, spelled_score) for letter in _SPELLED]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def build_text_encoder(vocab_size: int, seed: int) -> UMT5EncoderModel:
    """A small random UMT5 encoder, to be kept fixed: width 64, 2 layers, 4 heads.

    Its output has unit variance (the last layer norm). A token's own vector dominates; attention, sharpened towards
    near neighbours by its position bias, adds what stands beside it, so that word order is not lost.
    """
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UMT5EncoderModel(config)
        with torch.no_grad():
            for block in encoder.encoder.block:
                attention = block.layer[0].SelfAttention
                attention.relative_attention_bias.weight.normal_(std=3.0)
                attention.o.weight.mul_(0.7)
                block.layer[1].DenseReluDense.wo.weight.mul_(0.5)
    return encoder.eval().requires_grad_(False)
