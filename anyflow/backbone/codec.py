"""The frozen ends of the network: pixels to latents and back, prompts to embeddings.

Latents are ``[B, F, C, H, W]``, normalised with the autoencoder's own statistics; frames before channels, as the
network takes them. Videos are ``[B, F, H, W, 3]`` uint8, or ``[B, 3, F, H, W]`` in [-1, 1].
"""

from __future__ import annotations

import html
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from anyflow.backbone.conditions import Text
from anyflow.backbone.layout import Layout
from anyflow.backbone.wan_vae import StreamingDecoder, decode_latents, encode_moments
from anyflow.errors import UserError

MAX_TEXT_TOKENS = 512
"""Wan's prompt length: longer prompts are cut, shorter ones padded with zero vectors."""

ONE_PASS_PIXELS = 2**21
"""Up to so many pixels (frames x height x width x clips) the autoencoder takes all frames at once; above, diffusers'
loop over chunks of four frames bounds the memory. 20 clips of 17 x 96 x 64, or 5 frames of 480 x 832."""

PIXELS_AT_ONCE = 2**25
"""Up to so many pixels go through the autoencoder in one pass, and at least one clip. One of 81 x 480 x 832 fills it (8
GiB to decode in float32), and occupies a GPU by itself: more at once are no faster."""

TEXT_CACHE_BYTES = 2**30

log = logging.getLogger(__name__)


class KnownTexts(Protocol):
    """Embeddings of prompts that were encoded beforehand."""

    def __contains__(self, prompt: str) -> bool: ...

    def get(self, prompt: str) -> Tensor | None:
        """``[length, D]``, without padding, on the CPU; None if it is not there or cannot be read."""
        ...


def codec_dtypes(precision: str) -> tuple[torch.dtype, torch.dtype]:
    """Of autoencoder and text encoder (``dtype``, ``text_dtype``) for training in a precision of Lightning's.

    Under ``bf16-mixed`` the autoencoder stays in float32: what it encodes is stored and trained on for good.
    """
    latents = torch.bfloat16 if precision == "bf16-true" else torch.float32
    return latents, torch.float32 if precision == "32-true" else torch.bfloat16


class Codec(nn.Module):
    """Autoencoder, tokenizer and text encoder of a pipeline folder; frozen, in evaluation mode, without gradient.

    Keep it out of a trained module's parameters (a checkpoint need not carry it), for instance in a tuple.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        tokenizer: Any = None,
        text_encoder: nn.Module | None = None,
        source: Path | None = None,
    ) -> None:
        super().__init__()
        self.vae = vae
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.source = source
        """The folder that the parts came from; an export copies them from there."""
        self.is_parked = False
        """Whether it lies in host memory and comes to the GPU only while it works (:meth:`lent`)."""
        self.known_texts: KnownTexts | None = None
        """Prompts that were encoded beforehand."""
        self._dtypes = (torch.float32, torch.float32)
        self._text_cache: OrderedDict[str, Tensor] = OrderedDict()
        self._text_cache_bytes = 0
        self._cut_prompts = CutPrompts()
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        text: bool = True,
        dtype: torch.dtype = torch.float32,
        text_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        stored: bool = False,
    ) -> Codec:
        """Load the parts of a diffusers pipeline folder (or Hub name).

        Args:
            path: a folder with ``vae``, ``tokenizer`` and ``text_encoder``, or a Hub name.
            text: False leaves the tokenizer and text encoder out (captions already encoded).
            dtype: precision of the autoencoder.
            text_dtype: precision of the text encoder, ``dtype`` if None.
            device: where to put them.
            stored: leave the weights in their files; the codec is in memory only while it works (:meth:`lent`).

        Raises:
            UserError: a part is missing or cannot be read.
        """
        from anyflow.backbone.files import empty_codec_parts, load_codec_parts, resolve_folder

        parts = ("vae", "tokenizer", "text_encoder") if text else ("vae",)
        folder = resolve_folder(path, parts)
        dtypes = dtype, text_dtype or dtype
        if stored:
            codec = cls(*empty_codec_parts(folder, *dtypes), source=folder)
            codec.is_parked = True
        else:
            codec = cls(*load_codec_parts(folder, text, *dtypes), source=folder).to(device)
        codec._dtypes = dtypes
        return codec

    @property
    def is_stored(self) -> bool:
        """Whether its weights are in their files alone at the moment."""
        return self.vae.post_quant_conv.weight.is_meta

    @property
    def fingerprint(self) -> str:
        """What its files and precisions hash to (:func:`anyflow.backbone.fingerprint.fingerprint_codec`)."""
        from anyflow.backbone.fingerprint import fingerprint_codec

        assert self.source is not None
        return fingerprint_codec(self.source, *self._dtypes)

    @contextmanager
    def lent(self, device: torch.device | str) -> Iterator[None]:
        """Within the block the codec is on a device; afterwards back where it was if it is parked or stored."""
        from anyflow.backbone.files import load_codec_parts

        empty = (self.vae, self.text_encoder) if self.is_stored else None
        if empty:
            assert self.source is not None
            self.vae, _, self.text_encoder = load_codec_parts(self.source, True, *self._dtypes)
        parked = self.parameters() if self.is_parked and not empty else ()
        at_home = [(weight, weight.data) for weight in parked if weight.device.type == "cpu"]
        self.to(device)
        try:
            yield
        finally:
            if empty:
                self.vae, self.text_encoder = empty
            elif self.is_parked:
                for weight, data in at_home:
                    weight.data = data  # frozen: what lies in host memory need not be copied back
                self.to("cpu")

    def remembers(self, captions: Iterable[str]) -> bool:
        """Whether all these prompts are encoded already."""
        known = self.known_texts
        return all(caption in self._text_cache or (known is not None and caption in known) for caption in captions)

    def train(self, mode: bool = True) -> Codec:
        """Stays in evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        device = self.vae.post_quant_conv.weight.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.post_quant_conv.weight.dtype

    # Video ------------------------------------------------------------------------------------------------------------

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``(F, C, H, W)`` of the latents of one clip.

        Raises:
            UserError: the clip's size does not fit (:meth:`anyflow.backbone.layout.Layout.check`).
        """
        self.layout.check(frames, height, width)
        return self.layout.latents(frames, height, width)

    @property
    def layout(self) -> Layout:
        """How pixels become latents; a token has 2 x 2 of them, as all of Wan's have."""
        return Layout.of(self.vae.config, {})

    @property
    def temporal_factor(self) -> int:
        """Pixel frames that a latent frame covers, but the first, which covers one."""
        return self.vae.config.scale_factor_temporal

    @torch.no_grad()
    def encode_video(self, video: Tensor, clips_per_pass: int | None = None) -> Tensor:
        """Normalised latents ``[B, F, C, H, W]`` float32: the posterior's mean.

        Args:
            video: uint8 ``[B, F, H, W, 3]``, or float ``[B, 3, F, H, W]`` in [-1, 1].
            clips_per_pass: 1: a clip's latents do not depend on its batch at all; None: :meth:`clips_at_once`.

        Raises:
            UserError: the clip's size does not fit (:meth:`anyflow.backbone.layout.Layout.check`).
        """
        is_bytes, (mean, std), latents = video.dtype == torch.uint8, _statistics(self), []
        shape = video.shape[1:4] if is_bytes else video.shape[2:]
        self.layout.check(*shape)
        for part in video.split(clips_per_pass or self.clips_at_once(*shape)):
            clips = (pixels_from_bytes(part.to(self.device)) if is_bytes else part.to(self.device)).to(self.dtype)
            one_pass = clips[:, 0].numel() <= ONE_PASS_PIXELS and not self.vae.use_tiling
            with _own_precision(self):
                moments = encode_moments(self.vae, clips) if one_pass else self.vae._encode(clips)
            latents.append((moments.chunk(2, dim=1)[0].float() - mean) / std)
        return torch.cat(latents).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor, clips_per_pass: int | None = None) -> Tensor:
        """Video uint8 ``[B, F, H, W, 3]`` of normalised latents ``[B, F, C, H, W]``."""
        return torch.cat([bytes_from_pixels(video) for video in self._decoded(latents, clips_per_pass)])

    def _decoded(self, latents: Tensor, clips_per_pass: int | None) -> Iterator[Tensor]:
        """Float32 ``[B, 3, F, H, W]`` in [-1, 1] pass by pass; None: as many clips as fit (:meth:`clips_at_once`)."""
        mean, std = _statistics(self)
        stored = latents.to(self.device).float().transpose(1, 2) * std + mean
        temporal, spatial = self.vae.config.scale_factor_temporal, self.vae.config.scale_factor_spatial
        frames, height, width = stored.shape[2:]
        at_once = self.clips_at_once(temporal * (frames - 1) + 1, spatial * height, spatial * width)
        for clips in stored.to(self.dtype).split(clips_per_pass or at_once):
            one_pass = clips[:, 0].numel() * temporal * spatial**2 <= ONE_PASS_PIXELS and not self.vae.use_tiling
            with _own_precision(self):
                video = decode_latents(self.vae, clips) if one_pass else self.vae.decode(clips, return_dict=False)[0]
            yield video.float().clamp(-1, 1)

    @torch.no_grad()
    def decode_parts(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Video uint8 ``[B, f, H, W, 3]`` of each part of a video's normalised latents, as it comes."""
        decoder = StreamingDecoder(self.vae)
        mean, std = _statistics(self)
        for part in parts:
            stored = part.to(self.device).float().transpose(1, 2) * std + mean
            with _own_precision(self):
                video = decoder(stored.to(self.dtype))
            yield bytes_from_pixels(video.float().clamp(-1, 1))

    def clips_at_once(self, frames: int, height: int, width: int) -> int:
        """Clips of a size in pixels that go through the autoencoder in one pass; at least one."""
        return max(1, PIXELS_AT_ONCE // (frames * height * width))

    # Text -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Text:
        """Embeddings of prompts, cleaned and cut as diffusers' pipeline does.

        Each caption is encoded alone, so its embedding never depends on its batch, and remembered.

        Raises:
            UserError: this codec was loaded without its text encoder.
        """
        encoded = [self.embed(caption) for caption in captions]
        lengths = torch.tensor([len(embedding) for embedding in encoded])
        tokens = min(int(lengths.max()) + 1, MAX_TEXT_TOKENS)
        padded = torch.stack([nn.functional.pad(one, (0, 0, 0, tokens - len(one))) for one in encoded])
        return Text(padded, lengths, MAX_TEXT_TOKENS).to(self.device)

    @torch.no_grad()
    def embed(self, caption: str) -> Tensor:
        """A prompt's embedding ``[length, D]``, without padding, on the CPU; remembered.

        Raises:
            UserError: this codec was loaded without its text encoder.
        """
        if caption in self._text_cache:
            self._text_cache.move_to_end(caption)
            return self._text_cache[caption]
        embedding = self.known_texts.get(caption) if self.known_texts is not None else None
        if embedding is None:
            embedding = self._embed(caption)
        self._text_cache[caption] = embedding
        self._text_cache_bytes += embedding.nbytes
        while self._text_cache_bytes > TEXT_CACHE_BYTES and len(self._text_cache) > 1:
            self._text_cache_bytes -= self._text_cache.popitem(last=False)[1].nbytes
        return embedding

    def _embed(self, caption: str) -> Tensor:
        if self.is_stored:  # a known text that cannot be read any more
            with self.lent("cpu"):
                return self._embed(caption)
        if self.tokenizer is None or self.text_encoder is None:
            raise UserError("This codec has no text encoder: load it with text=True, or train on encoded captions.")
        prompt = clean_prompt(caption)
        self._cut_prompts.see(prompt, self.tokenizer)
        tokens = self.tokenizer(
            prompt,
            max_length=MAX_TEXT_TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        with _own_precision(self):
            output = self.text_encoder(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device))
        return output.last_hidden_state[0].cpu()


class CutPrompts:
    """Warns of prompts that are read in part: of the first one, the tenth, the hundredth ..."""

    def __init__(self) -> None:
        self.count = 0

    def see(self, prompt: str, tokenizer: Any) -> None:
        """Count a prompt, if it has more tokens than are read."""
        if len(prompt.encode()) < MAX_TEXT_TOKENS:  # a token is a byte at least
            return
        length = len(tokenizer(prompt, add_special_tokens=True).input_ids)
        if length > MAX_TEXT_TOKENS:
            self.count += 1
            if str(self.count).strip("0") == "1":
                log.warning(
                    "prompts longer than the %d tokens that are read of one: %d so far; %r ... has %d",
                    *(MAX_TEXT_TOKENS, self.count, prompt[:60], length),
                )


def _own_precision(codec: Codec) -> torch.autocast:
    """Within the block a codec computes in the precision of its weights, whatever a training step around it does: what
    is encoded while training is what ``anyflow data encode`` makes of it."""
    return torch.autocast(codec.device.type, enabled=False)


def _statistics(codec: Codec) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of stored latents, ``[1, C, 1, 1, 1]`` float32."""
    config = codec.vae.config
    both = torch.tensor([config.latents_mean, config.latents_std], dtype=torch.float32, device=codec.device)
    mean, std = both[:, None, :, None, None, None]
    return mean, std


def clean_prompt(prompt: str) -> str:
    """What diffusers' pipeline does to a prompt: ftfy if installed, HTML unescaped, single spaces."""
    try:
        import ftfy  # type: ignore[import-not-found]

        prompt = ftfy.fix_text(prompt)
    except ImportError:
        pass
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def pixels_from_bytes(video: Tensor) -> Tensor:
    """uint8 ``[B, F, H, W, 3]`` to float32 ``[B, 3, F, H, W]`` in [-1, 1]."""
    return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def bytes_from_pixels(video: Tensor) -> Tensor:
    """``[B, 3, F, H, W]`` in [-1, 1] to uint8 ``[B, F, H, W, 3]``."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).contiguous()
