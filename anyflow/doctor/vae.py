"""Wan's autoencoder, with random weights: seconds and peak to encode and decode a clip, and how many fit at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from anyflow.backbone.codec import Codec
from anyflow.backbone.embedded import build_vae
from anyflow.doctor.findings import Findings
from anyflow.doctor.here import GIB, Here, is_out_of_memory


@dataclass(frozen=True)
class Clip:
    """A size of clips: frames, rows, columns; and whether the autoencoder is Wan's or the embedded one."""

    name: str
    size: tuple[int, int, int]
    is_wan: bool


GPU_CLIP = Clip("wan", (81, 480, 832), is_wan=True)
CPU_CLIP = Clip("tiny", (17, 64, 96), is_wan=False)


def examine(found: Findings, here: Here, folder: Any) -> None:
    """Encode and decode one clip, then two at once: what the second takes more is what a clip takes."""
    clip = GPU_CLIP if here.is_gpu else CPU_CLIP
    if not here.is_gpu:
        found.leave_out("Wan's autoencoder", "81 x 480 x 832 take a CPU many minutes: the embedded one stands for it")
        found.leave_out("peaks", "a CPU's are not counted")
    vae = AutoencoderKLWan() if clip.is_wan else build_vae(0)
    codec = Codec(vae.to(here.device))
    found.note({"clip": "x".join(map(str, clip.size)), "weights_gib": _weights_gib(vae)}, clip.name)
    frames, height, width = clip.size
    small = torch.zeros(1, 5, min(height, 64), min(width, 96), 3, dtype=torch.uint8)
    codec.decode(codec.encode_video(small))  # what is set up once is not counted
    video = torch.randint(256, (2, frames, height, width, 3), dtype=torch.uint8)
    latents = torch.randn(2, *codec.latent_shape(*clip.size))
    for name, work in (
        ("encode", lambda count: codec.encode_video(video[:count], clips_per_pass=count)),
        ("decode", lambda count: codec.decode(latents[:count], clips_per_pass=count)),
    ):
        _work(found, here, f"{clip.name}.{name}", work)


def _work(found: Findings, here: Here, name: str, work: Callable[[int], Any]) -> None:
    """Clips one by one, then by twos where two seem to fit."""
    lying = here.allocated_gib()
    peaks: list[float] = []
    for count in (1, 2):
        if peaks and 2 * (peaks[0] - lying) > here.free_gib():
            break
        try:
            seconds, peak = here.weighed(partial(work, count))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            here.tidy()
            break
        peaks.append(peak)
        found.note({f"seconds_{count}": seconds, **({f"peak_gib_{count}": peak} if here.is_gpu else {})}, name)
    if not peaks:
        found.is_wrong(f"{name}: one clip does not fit {here.free_gib():.0f} GiB: take fewer frames, or smaller ones")
    elif here.is_gpu:
        each = peaks[1] - peaks[0] if len(peaks) == 2 else peaks[0] - lying
        more = (here.free_gib() - (peaks[-1] - lying)) // max(each, 0.01)
        found.note({"gib_a_clip": each, "clips_at_once": len(peaks) + max(0, int(more))}, name)


def _weights_gib(vae: AutoencoderKLWan) -> float:
    return sum(weight.nbytes for weight in vae.parameters()) / GIB
