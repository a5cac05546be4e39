"""What bfloat16 leaves of the finite difference that a jump is learnt by.

The target of a jump has the term ``(t - r) du/dt``, asked of the network at t + 5 and t - 5: a small difference of two
answers, in which their rounding is large. Told are the term's root mean square in float32 (``signal``), that of what
bfloat16 makes otherwise of it (``error``), and the second over the first (``relative``). ``narrow`` is bfloat16 from
block to block, too (``hardware.residual=compute``).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.bidirectional import BidirectionalBackbone
from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.layout import PUBLISHED
from anyflow.backbone.load import load_backbone, new_backbone
from anyflow.doctor.findings import Findings
from anyflow.doctor.here import Here
from anyflow.doctor.items import TINY
from anyflow.doctor.machine import memory
from anyflow.flowmap.schedule import interpolate

DELTA = 5.0
"""Half width of the difference, in timesteps: the recipes'."""

ENOUGH = 12.0
"""GiB of a CPU's memory that a 1.3B network in float32 and its copy in bfloat16 fit into."""


@dataclass(frozen=True)
class Question:
    """Clips on the path, at times ``t`` and ``r`` ``[B]``, and their texts."""

    clean: Tensor
    noise: Tensor
    t: Tensor
    r: Tensor
    text: Text

    def to(self, device: torch.device) -> Question:
        """On a device."""
        clean, noise, t, r = (part.to(device) for part in (self.clean, self.noise, self.t, self.r))
        return Question(clean, noise, t, r, self.text.to(device))


def examine(found: Findings, here: Here, folder: Any) -> None:
    """The embedded weights on clips, and on a GPU a random network of the 1.3B shape."""
    if TINY.is_dir():
        question = shipped_clips(8).to(here.device)
        _network(found, here, "tiny", lambda: load_backbone(TINY, device=here.device), question)
        relative = found.figures["tiny.mixed.relative"]
        if relative is None or relative > 1:
            found.is_wrong(
                f"bf16-mixed leaves an error of {relative} times the signal in the finite difference: train by "
                "hardware.precision=32-true, or widen stage.delta"
            )
    else:
        found.leave_out("tiny", f"{TINY} is not here: run it in a clone of the project")
    size = memory()
    if not here.is_gpu and not ENOUGH < size["memory_free_gib"] < (size["memory_limit_gib"] or math.inf):
        found.leave_out("1.3b", f"needs {ENOUGH:.0f} GiB of free memory")
        return
    config = PUBLISHED["1.3b"]
    clips = random_clips(config, here, (5, 30, 52) if here.is_gpu else (2, 8, 12))
    _network(found, here, "1.3b", lambda: random_network(config, here), clips)


@torch.no_grad()
def _network(found: Findings, here: Here, name: str, build: Any, question: Question) -> None:
    network = build().eval()
    signal = difference(network, question)
    found.note({"signal": float(signal.square().mean().sqrt())}, name)

    def told(way: str, context: Any) -> None:
        with context:
            error = difference(network, question) - signal
        rms = float(error.square().mean().sqrt())
        found.note({"error": rms, "relative": rms / found.figures[f"{name}.signal"]}, f"{name}.{way}")

    told("mixed", torch.autocast(here.device.type, torch.bfloat16))
    network.residual = "compute"
    told("narrow", torch.autocast(here.device.type, torch.bfloat16))
    network.residual = "auto"
    network.to(torch.bfloat16)
    told("true", nullcontext())


def difference(network: BidirectionalBackbone, question: Question) -> Tensor:
    """The term ``(t - r) du/dt`` of each clip, times in units of 1, float32."""
    velocity = question.noise - question.clean
    z = interpolate(question.clean, question.noise, question.t)
    sides = [
        network(z + side / 1000 * velocity, question.t + side, question.r, Conditions(question.text))
        for side in (DELTA, -DELTA)
    ]
    distance = ((question.t - question.r) / (2 * DELTA))[:, None, None, None, None]
    return (sides[0] - sides[1]).float() * distance


def shipped_clips(count: int) -> Question:
    """Held-out driving clips and their prompts, encoded, at times spread over the path."""
    from anyflow.backbone.codec import Codec
    from anyflow.data.decode import ClipShape
    from anyflow.evaluation.heldout import held_out

    clips = held_out(["driving"], "heldout", ClipShape(17, 64, 96, None), count)
    codec = Codec.from_folder(TINY)
    clean = codec.encode_video(torch.stack([torch.as_tensor(clip.frames) for clip in clips]))
    text = codec.encode_text([clip.caption for clip in clips])
    return Question(clean, _noise(clean), *_times(len(clean)), text)


def random_clips(config: dict[str, Any], here: Here, size: tuple[int, int, int]) -> Question:
    """One random clip of some latent frames, rows and columns, at the network's widths."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(1, size[0], config["in_channels"], *size[1:], generator=generator)
    embeddings = torch.randn(1, 101, config["text_dim"], generator=generator)
    text = Text(embeddings, torch.tensor([100]), 512)
    return Question(clean, _noise(clean), torch.tensor([700.0]), torch.tensor([200.0]), text).to(here.device)


def random_network(config: dict[str, Any], here: Here) -> BidirectionalBackbone:
    """A network of a configuration with random weights; a new one's answer is zero, so its last layer is drawn too."""
    with torch.device(here.device):
        network = new_backbone(config, seed=0)
    torch.nn.init.normal_(network.transformer.proj_out.weight, std=0.02)
    return network.to(here.device)


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def _times(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    drawn = 10 + 980 * torch.rand(2, count, generator=generator)
    return drawn.amax(0), drawn.amin(0)
