"""Wan's causal video autoencoder over all frames in one pass.

diffusers walks a clip in chunks of four frames and carries a cache from convolution to convolution, which bounds the
memory of a long, large clip. For short, small clips the same numbers (to 2e-6) come much faster from one pass, and a
pass without a mutable cache can be differentiated, which the codec stage needs. Three places treat the first frame
apart in the chunked walk, and so they do here:

* a temporal downsampling leaves frame 0 as it is and strides over the rest;
* a temporal upsampling leaves frame 0 single, and its convolution does not see frame 0 at all;
* the parameter-free shortcuts pad (down) or drop (up) at the front.

All tensors are ``[B, C, F, H, W]``, as the autoencoder's own.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanUpBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn


def encode_moments(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Mean and log-variance of the posterior, unnormalised.

    Args:
        video: ``[B, 3, F, H, W]`` in [-1, 1] with ``F = 4n + 1``.

    Returns:
        ``[B, 2 * z_dim, (F - 1) / 4 + 1, H / s, W / s]``, the mean first.
    """
    if vae.config.patch_size is not None:
        video = patchify(video, patch_size=vae.config.patch_size)
    return vae.quant_conv(_encoder(vae.encoder, _fast_layout(video)))


def decode_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Pixels ``[B, 3, F, H, W]`` of unnormalised latents ``[B, z_dim, f, h, w]``; not clamped."""
    video = _decoder(vae.decoder, vae.post_quant_conv(_fast_layout(latents)))
    return video if vae.config.patch_size is None else unpatchify(video, patch_size=vae.config.patch_size)


class StreamingDecoder:
    """Decodes the latents of one video part by part; the parts' pixels joined are those of the whole.

    It walks frame by frame as diffusers does, and keeps the cache from part to part.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self._features: list[Tensor | str | None] = [None] * vae._cached_conv_counts["decoder"]
        self._is_first = True

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels ``[B, 3, F, H, W]`` of the next unnormalised latents ``[B, z_dim, f, h, w]``; not clamped."""
        frames = []
        for latent in self.vae.post_quant_conv(latents).split(1, dim=2):
            position = [0]
            frames.append(self.vae.decoder(latent, self._features, position, first_chunk=self._is_first))
            self._is_first = False
        video = torch.cat(frames, dim=2)
        patch = self.vae.config.patch_size
        return video if patch is None else unpatchify(video, patch_size=patch)


def _fast_layout(hidden: Tensor) -> Tensor:
    return hidden.contiguous(memory_format=torch.channels_last_3d)


def _encoder(encoder: WanEncoder3d, hidden: Tensor) -> Tensor:
    hidden = encoder.conv_in(hidden)
    for layer in encoder.down_blocks:
        hidden = _down(layer, hidden)
    hidden = encoder.mid_block(hidden)
    return encoder.conv_out(encoder.nonlinearity(encoder.norm_out(hidden)))


def _down(layer: nn.Module, hidden: Tensor) -> Tensor:
    if isinstance(layer, WanResample):
        return _resample(layer, hidden)
    if not isinstance(layer, WanResidualDownBlock):
        return layer(hidden)
    shortcut = layer.avg_shortcut(hidden.contiguous())
    for resnet in layer.resnets:
        hidden = resnet(hidden)
    if layer.downsampler is not None:
        hidden = _resample(layer.downsampler, hidden)
    return hidden + shortcut


def _decoder(decoder: WanDecoder3d, hidden: Tensor) -> Tensor:
    hidden = decoder.mid_block(decoder.conv_in(hidden))
    for block in decoder.up_blocks:
        hidden = _up(block, hidden)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(hidden)))


def _up(block: WanResidualUpBlock | WanUpBlock, hidden: Tensor) -> Tensor:
    residual = isinstance(block, WanResidualUpBlock)
    shortcut = hidden
    for resnet in block.resnets:
        hidden = resnet(hidden)
    upsampler = block.upsampler if residual else (block.upsamplers or [None])[0]
    if upsampler is not None:
        hidden = _resample(upsampler, hidden)
    if residual and block.avg_shortcut is not None:
        hidden = hidden + block.avg_shortcut(shortcut.contiguous(), first_chunk=True)
    return hidden


def _resample(layer: WanResample, hidden: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and hidden.shape[2] > 1:
        first, rest = hidden[:, :, :1], hidden[:, :, 1:]
        pairs = layer.time_conv(rest).unflatten(1, (2, -1))  # [B, 2, C, F - 1, H, W]: two frames for each
        rest = torch.stack(pairs.unbind(1), dim=3).flatten(2, 3)
        hidden = torch.cat([first, rest], dim=2)
    hidden = _per_frame(layer.resample, hidden)
    if layer.mode == "downsample3d" and hidden.shape[2] > 1:
        hidden = torch.cat([hidden[:, :, :1], layer.time_conv(hidden)], dim=2)
    return hidden


def _per_frame(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Apply an image layer to every frame."""
    batch = hidden.shape[0]
    frames = hidden.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return _fast_layout(layer(frames).unflatten(0, (batch, -1)).transpose(1, 2))
