"""The any-step curve: the quality of one model's samples against the number of steps.

What makes two rows of a curve, or two curves, comparable is that everything but the number of steps (or the model) is
the same: the prompts, the initial noise of each prompt (from the seed and the prompt's key alone, so neither the batch
size nor the selection changes it), the real clips, the projections. Every figure stands beside what real clips get
from the same measure: ``Curve.real`` (the floor of a distance, the ceiling of an accuracy) and ``Curve.codec`` (the
same clips encoded and decoded: what a perfect generator would get through this codec).

Shapes: latents ``[B, F, C, H, W]`` float32 normalised; clips uint8 ``[B, F, H, W, 3]``; timestep = 1000 * sigma.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow.evaluation.distance import PROJECTIONS, frame_frechet, motion_energy, sliced_wasserstein
from anyflow.evaluation.motion import motion_accuracy

STEPS = (1, 2, 4, 8, 16, 32)

Sampler = Callable[[list[str], Tensor, int, float, Tensor | None], Tensor]
"""``(captions, noise, num_steps, shift, first_frames)`` to clean latents: a model's own sampler, text encoder included.

``first_frames`` are given clean latents ``[B, k, C, H, W]``, or None.
"""

OnProgress = Callable[[int, int, str], None]
"""``(done, total, what)``: called after each batch."""


class CurveCodec(Protocol):
    """The part of the codec that a curve needs."""

    def encode_video(self, video: Tensor) -> Tensor:
        """Map uint8 clips ``[B, F, H, W, 3]`` to latents ``[B, f, C, h, w]``."""

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents to uint8 clips."""


@dataclass(frozen=True)
class HeldOut:
    """A real clip that no training saw, and the prompt that asks for one like it.

    Attributes:
        key: the clip's name in its shard; with the seed it decides the initial noise.
        caption: the prompt.
        frames: uint8 ``[F, H, W, 3]``.
        domain: whose motion probe reads it.
        attributes: what the simulator measured; the motion asked for is among it.
    """

    key: str
    caption: str
    frames: Tensor
    domain: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Marks:
    """What one set of clips gets. Distances are to the reference clips; lower is better.

    Attributes:
        sliced_w1: sliced Wasserstein-1 distance of the latents.
        frame_frechet: Frechet distance on fixed frame features (see ``distance.py``: not FVD).
        motion_accuracy: share of clips whose motion, read from pixels, is the one asked for; ``None`` without a probe.
        motion_unread: share in which the probe found nothing to follow (they count as wrong).
        motion_energy: mean absolute change from frame to frame in grey levels.
    """

    sliced_w1: float
    frame_frechet: float
    motion_accuracy: float | None
    motion_unread: float | None
    motion_energy: float


@dataclass(frozen=True)
class CurveRow(Marks):
    """One step count.

    Attributes:
        num_steps: steps of the sampler.
        nfe: network evaluations a clip (one a step: guidance is fused into the model).
        sampling_seconds: wall time a clip, noise to latents.
        decoding_seconds: wall time a clip, latents to frames.
    """

    num_steps: int
    nfe: int
    sampling_seconds: float
    decoding_seconds: float


@dataclass(frozen=True)
class Curve:
    """An any-step curve with what is needed to read it.

    Attributes:
        label: for example ``before`` or ``after``.
        domain: the prompts' domain, or several joined by ``+``.
        clips: how many prompts each row is measured on.
        seed: of the initial noise.
        shift: of the inference schedule.
        size: frames, height, width of the clips.
        rows: one a step count, ascending.
        real: the same measures of the prompts' own real clips: the floor and the ceiling.
        codec: the same of these clips after encoding and decoding.
        given_frames: latent frames given from each prompt's own clip; 0 is text-to-video.
    """

    label: str
    domain: str
    clips: int
    seed: int
    shift: float
    size: tuple[int, int, int]
    rows: tuple[CurveRow, ...]
    real: Marks
    codec: Marks
    given_frames: int = 0

    def row(self, num_steps: int) -> CurveRow:
        """Return the row of a step count; ``KeyError`` if it was not measured."""
        for row in self.rows:
            if row.num_steps == num_steps:
                return row
        raise KeyError(num_steps)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that ``from_json`` takes back."""
        return {"version": 1, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Curve:
        """Build a curve from ``to_json``'s dictionary (or the parsed file)."""
        plain = {name: value for name, value in content.items() if name != "version"}
        plain["size"] = tuple(plain["size"])
        plain["rows"] = tuple(CurveRow(**row) for row in plain["rows"])
        plain["real"], plain["codec"] = Marks(**plain["real"]), Marks(**plain["codec"])
        return cls(**plain)

    def save(self, path: Path) -> None:
        """Write the curve as JSON."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class CurveResult:
    """A curve and the samples that a picture shows: ``samples[num_steps]`` is uint8 ``[n, F, H, W, 3]``."""

    curve: Curve
    shown: tuple[HeldOut, ...]
    samples: Mapping[int, Tensor]


def prompt_noise(shape: Sequence[int], keys: Sequence[str], seed: int) -> Tensor:
    """Draw each prompt's initial noise from the seed and its key alone.

    Args:
        shape: of one clip's latents ``(F, C, H, W)``.
        keys: one a prompt.
        seed: of the whole curve.
    Returns:
        float32 ``[len(keys), F, C, H, W]`` on the CPU.
    """
    rows = []
    for key in keys:
        digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows)


def sampler_of(backbone: Any, codec: Any) -> Sampler:
    """The sampler of a ``FlowMapBackbone`` with the ``Codec`` whose text encoder it was trained with."""

    def sample(captions: list[str], noise: Tensor, num_steps: int, shift: float, first_frames: Tensor | None) -> Tensor:
        return backbone.sample(codec.encode_text(captions), noise, num_steps, shift, first_frames)

    return sample


@torch.no_grad()
def measure_curve(
    sampler: Sampler,
    codec: CurveCodec,
    items: Sequence[HeldOut],
    reference: Sequence[HeldOut],
    *,
    label: str = "after",
    steps: Sequence[int] = STEPS,
    shift: float = 5.0,
    seed: int = 0,
    given_frames: int = 0,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    show: int = 6,
    projections: int = PROJECTIONS,
    on_progress: OnProgress | None = None,
) -> CurveResult:
    """Sample the same prompts from the same noise at each step count and measure what comes out.

    Args:
        sampler: the model's (``sampler_of``).
        codec: encodes and decodes; frozen.
        items: the prompts, with their own real clips.
        reference: other real clips, to which distances are taken; at least as many as items (the first are used:
            sets of one size have one floor). Real clips against them give the floor.
        label: names the curve in tables and plots.
        steps: step counts.
        shift: of the inference schedule.
        seed: of the initial noise.
        given_frames: latent frames that are given from each prompt's own clip: 1 is image-to-video.
        batch_size: clips a pass; changes speed and memory, not the draws.
        device: where the model runs.
        show: of how many prompts (the first) the samples are kept for the picture.
        projections: random directions of the sliced distance.
        on_progress: called after each batch.
    Raises:
        ValueError: if there are no items or fewer reference clips than items.
    """
    if not items or len(reference) < len(items):
        raise ValueError(f"{len(items)} prompts need as many reference clips, got {len(reference)}")
    counts = sorted(set(steps))
    runner = _Runner(
        codec,
        batch_size,
        device,
        _Progress((len(counts) + 2) * -(-len(items) // batch_size), on_progress),
        given_frames,
    )
    real_clips, other_clips = _stack(items), _stack(reference[: len(items)])
    real_latents, decoded = runner.encode_and_decode(real_clips)
    other_latents, _ = runner.encode_and_decode(other_clips, decode=False)
    judge = _Judge(items, other_clips, other_latents, projections)

    rows, kept = [], {}
    for num_steps in counts:
        clips, latents, sampling, decoding = runner.sample(sampler, items, real_latents, num_steps, shift, seed)
        cost = {"sampling_seconds": sampling / len(items), "decoding_seconds": decoding / len(items)}
        rows.append(CurveRow(**asdict(judge(clips, latents)), num_steps=num_steps, nfe=num_steps, **cost))
        kept[num_steps] = clips[:show].clone()
    curve = Curve(
        label=label,
        domain="+".join(sorted({item.domain for item in items})),
        clips=len(items),
        seed=seed,
        given_frames=given_frames,
        shift=shift,
        size=(real_clips.shape[1], real_clips.shape[2], real_clips.shape[3]),
        rows=tuple(rows),
        real=judge(real_clips, real_latents),
        codec=judge(decoded, real_latents),
    )
    return CurveResult(curve, tuple(items[:show]), kept)


@dataclass(frozen=True)
class _Judge:
    """Measures a set of clips (one for each item, in order) against the reference."""

    items: Sequence[HeldOut]
    reference_clips: Tensor
    reference_latents: Tensor
    projections: int

    def __call__(self, clips: Tensor, latents: Tensor) -> Marks:
        motion = motion_accuracy(
            clips.numpy(), [item.attributes for item in self.items], [item.domain for item in self.items]
        )
        return Marks(
            sliced_w1=sliced_wasserstein(latents, self.reference_latents, projections=self.projections),
            frame_frechet=frame_frechet(clips, self.reference_clips),
            motion_accuracy=motion.accuracy,
            motion_unread=motion.unread,
            motion_energy=motion_energy(clips),
        )


class _Progress:
    """Counts batches."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def __call__(self, what: str) -> None:
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, what)


@dataclass(frozen=True)
class _Runner:
    """Runs codec and sampler batch by batch; what comes out lies on the CPU."""

    codec: CurveCodec
    batch_size: int
    device: torch.device | str
    progress: _Progress
    given_frames: int = 0

    def encode_and_decode(self, clips: Tensor, decode: bool = True) -> tuple[Tensor, Tensor]:
        """Return the clips' latents, and the clips after the codec (as given, if they are not to be decoded)."""
        latents, decoded = [], []
        for batch in clips.split(self.batch_size):
            encoded = self.codec.encode_video(batch.to(self.device))
            latents.append(encoded.float().cpu())
            decoded.append(self.codec.decode(encoded).cpu() if decode else batch)
            self.progress("real clips through the codec" if decode else "reference clips")
        return torch.cat(latents), torch.cat(decoded)

    def sample(
        self,
        sampler: Sampler,
        items: Sequence[HeldOut],
        like: Tensor,
        num_steps: int,
        shift: float,
        seed: int,
    ) -> tuple[Tensor, Tensor, float, float]:
        """Sample every prompt; return clips, latents, and the seconds of sampling and decoding.

        ``like`` are the prompts' real latents, which the samples are shaped as and begin with where frames are given.
        """
        clips, all_latents = [], []
        sampling = decoding = 0.0
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            given = like[start : start + self.batch_size, : self.given_frames].to(self.device)
            first_frames = given if self.given_frames else None
            noise = prompt_noise(like.shape[1:], [item.key for item in batch], seed).to(self.device)
            begin = _now(self.device)
            latents = sampler([item.caption for item in batch], noise, num_steps, shift, first_frames)
            middle = _now(self.device)
            clips.append(self.codec.decode(latents).cpu())
            sampling, decoding = sampling + middle - begin, decoding + _now(self.device) - middle
            all_latents.append(latents.float().cpu())
            self.progress(f"{num_steps} step{'s' if num_steps > 1 else ''}")
        return torch.cat(clips), torch.cat(all_latents), sampling, decoding


def _stack(items: Sequence[HeldOut]) -> Tensor:
    return torch.stack([torch.as_tensor(item.frames) for item in items])


def _now(device: torch.device | str) -> float:
    """Read the clock once the device has finished what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
