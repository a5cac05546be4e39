"""Measuring the any-step curve: the same prompts from the same noise at every number of steps.

Two rows of a curve, or two curves, compare because everything but the number of steps (or the model) is the same: the
prompts, their initial noise, the real clips, the projections. The noise of a prompt follows the seed and the prompt's
key alone, so neither the batch size nor the selection changes it.

Shapes: latents ``[B, F, C, H, W]`` float32 normalised; clips uint8 ``[B, F, H, W, 3]``; timestep = 1000 * sigma.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.conditions import Conditions
from anyflow.backbone.guidance import UNGUIDED, Guidance
from anyflow.evaluation.curve import Curve, CurveResult, CurveRow, HeldOut, Marks, over_seeds
from anyflow.evaluation.judge import Judge
from anyflow.evaluation.kept_samples import KeptSamples
from anyflow.evaluation.measurement import Measurement, SampledModel, Sampler
from anyflow.flowmap.endpoint import Renoise
from anyflow.flowmap.samplers import SamplerKind
from anyflow.flowmap.sampling import Take, take_jump, take_velocity

OnProgress = Callable[[int, int, str], None]
"""``(done, total, what)``: called after each batch, in network calls."""

CODEC_CALLS = 4
"""Network calls that decoding (or encoding) a batch takes about as long as; the estimate of the time left needs it."""


def prompt_noise(shape: Sequence[int], keys: Sequence[str], seed: int) -> Tensor:
    """Draw each prompt's initial noise from the seed and its key alone.

    Args:
        shape: of one clip's latents ``(F, C, H, W)``.
        keys: one a prompt.
        seed: of the whole curve.
    Returns:
        float32 ``[len(keys), F, C, H, W]`` on the CPU.
    """
    return torch.stack([torch.randn(tuple(shape), generator=_generator(seed, key)) for key in keys])


def take_of(kind: SamplerKind, keys: Sequence[str], seed: int) -> Take:
    """How a model takes the jumps of one sampling; re-noising draws, like the first noise, from seed and key alone."""
    plain: dict[SamplerKind, Take] = {"flowmap": take_jump, "euler": take_velocity}
    if kind in plain:
        return plain[kind]
    generators = [_generator(seed, f"{key}\nfresh") for key in keys]

    def draw(like: Tensor) -> Tensor:
        return torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators]).to(like)

    return Renoise(draw)


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sampler_of(backbone: Any, codec: Any, guidance: Guidance = UNGUIDED) -> Sampler:
    """The sampler of a ``FlowMapBackbone`` with the ``Codec`` whose text encoder it was trained with."""

    def sample(
        captions: list[str], noise: Tensor, num_steps: int, shift: float, first_frames: Tensor | None, **way: Take
    ) -> Tensor:
        guided = guidance.way(backbone, codec)
        conditions = Conditions(codec.encode_text(captions), first_frames)
        return backbone.sample(conditions, noise, num_steps, shift, **way, **guided)

    return sample


@torch.no_grad()
def measure_curve(
    model: SampledModel,
    items: Sequence[HeldOut],
    reference: Sequence[HeldOut],
    asked: Measurement,
    *,
    kept: KeptSamples | None = None,
    on_progress: OnProgress | None = None,
) -> CurveResult:
    """Sample the same prompts from the same noise at each step count and measure what comes out.

    Args:
        model: what samples (``sampler_of``).
        items: the prompts, with their own real clips.
        reference: other real clips, to which distances are taken; at least as many as items (the first are used).
        asked: how they are sampled and judged.
        kept: where samples are kept, and taken from if this was measured in part before.
        on_progress: called after each batch.
    Raises:
        ValueError: if there are no items or seeds, or fewer reference clips than items.
    """
    if not items or not asked.seeds or len(reference) < len(items):
        raise ValueError(f"{len(items)} prompts need as many reference clips, got {len(reference)}, and a seed")
    counts = sorted(set(asked.steps))
    work = len(asked.seeds) * sum(_work(asked.guidance.calls * num_steps) for num_steps in counts) + 2 * _work(0)
    progress = _Progress(work * -(-len(items) // asked.batch_size), on_progress)
    runner = _Runner(model, asked, progress, kept)
    reference = reference[: len(items)]
    real_clips, other_clips = _stack(items), _stack(reference)
    real_latents, decoded = runner.encode_and_decode(real_clips)
    other_latents, _ = runner.encode_and_decode(other_clips, decode=False)
    judge = Judge(items, reference, other_clips, other_latents, asked)
    rows, shown = _rows(asked, partial(runner.sample, items, real_latents), partial(judge, real=real_clips))
    curve = Curve(
        label=asked.label,
        domain="+".join(sorted({item.domain for item in items})),
        clips=len(items),
        seed=asked.seeds[0],
        seeds=tuple(asked.seeds),
        given_frames=asked.given_frames,
        left_out=judge.left_out,
        sampler=asked.sampler,
        guidance_scale=asked.guidance.scale,
        notes=(*asked.judges.notes, *filter(None, [asked.guidance.told])),
        shift=asked.shift,
        size=(real_clips.shape[1], real_clips.shape[2], real_clips.shape[3]),
        rows=tuple(rows),
        real=judge.of_real(real_clips, real_latents),
        codec=judge.of_codec(decoded, real_latents, real_clips),
    )
    return CurveResult(curve, tuple(items[: asked.show]), shown)


def _rows(
    asked: Measurement,
    sample: Callable[[int, int], tuple[Tensor, Tensor, dict[str, float]]],
    judge: Callable[..., Marks],
) -> tuple[list[CurveRow], dict[int, Tensor]]:
    """Sample and judge each step count with each seed, and keep the first seed's samples.

    The most steps come first: they are what the previews of the same noise are compared with.
    """
    rows: list[CurveRow] = []
    kept: dict[int, Tensor] = {}
    finals: dict[int, Tensor] = {}
    for num_steps in sorted(set(asked.steps), reverse=True):
        of_seeds = []
        for seed in asked.seeds:
            clips, latents, cost = sample(num_steps, seed)
            marks = judge(clips, latents, finals=finals.setdefault(seed, latents)).to_json()
            of_seeds.append(CurveRow.from_json({**marks, "num_steps": num_steps, **cost}))
            kept.setdefault(num_steps, clips[: asked.show].clone())
        rows.insert(0, over_seeds(of_seeds))
    return rows, dict(sorted(kept.items()))


def _work(calls: int) -> int:
    """What a batch costs, in network calls: those of its steps, and the codec's share."""
    return calls + CODEC_CALLS


class _Progress:
    """Counts what is done of all batches, in network calls."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def __call__(self, what: str, work: int) -> None:
        self.done += work
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, what)


@dataclass(frozen=True)
class _Runner:
    """Runs codec and sampler batch by batch; what comes out lies on the CPU."""

    model: SampledModel
    asked: Measurement
    progress: _Progress
    kept: KeptSamples | None

    def encode_and_decode(self, clips: Tensor, decode: bool = True) -> tuple[Tensor, Tensor]:
        """Return the clips' latents, and the clips after the codec (as given, if they are not to be decoded)."""
        latents, decoded = [], []
        for batch in clips.split(self.asked.batch_size):
            encoded = self.model.codec.encode_video(batch.to(self.model.device))
            latents.append(encoded.float().cpu())
            decoded.append(self.model.codec.decode(encoded).cpu() if decode else batch)
            self.progress("real clips through the codec" if decode else "reference clips", _work(0))
        return torch.cat(latents), torch.cat(decoded)

    def sample(
        self, items: Sequence[HeldOut], like: Tensor, num_steps: int, seed: int
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Sample every prompt; return clips, latents, and what a clip costs.

        ``like`` are the prompts' real latents, which the samples are shaped as and begin with where frames are given.
        """
        clips, all_latents = [], []
        sampling = decoding = 0.0
        for start in range(0, len(items), self.asked.batch_size):
            batch = items[start : start + self.asked.batch_size]
            given = like[start : start + self.asked.batch_size, : self.asked.given_frames].to(self.model.device)
            first_frames = given if self.asked.given_frames else None
            latents, seconds = self._latents(batch, like.shape[1:], first_frames, num_steps, seed)
            begin = _now(self.model.device)
            clips.append(self.model.codec.decode(latents).cpu())
            sampling, decoding = sampling + seconds, decoding + _now(self.model.device) - begin
            all_latents.append(latents.float().cpu())
            work = _work(self.asked.guidance.calls * num_steps)
            self.progress(f"{num_steps} step{'s' if num_steps > 1 else ''}", work)
        nfe = self.asked.guidance.calls * self.model.calls(num_steps, like.shape[1], self.asked.given_frames)
        cost = {"nfe": nfe, "sampling_seconds": sampling / len(items), "decoding_seconds": decoding / len(items)}
        return torch.cat(clips), torch.cat(all_latents), cost

    def _latents(
        self, batch: Sequence[HeldOut], shape: Sequence[int], first_frames: Tensor | None, num_steps: int, seed: int
    ) -> tuple[Tensor, float]:
        """A batch's latents and the seconds that they take, or took if they are kept."""
        asked, shift = self.asked, self.asked.shift
        captions, keys = [item.caption for item in batch], [item.key for item in batch]
        noise, name = prompt_noise(shape, keys, seed), ""
        if self.kept is not None:
            given = None if first_frames is None else first_frames.cpu()
            guided = () if asked.guidance.scale == 1 else (asked.guidance,)
            name = self.kept.name((noise, given), (captions, keys, seed, num_steps, shift, asked.sampler, *guided))
            found = self.kept.load(name)
            if found is not None:
                return found[0].to(self.model.device), found[1]
        way = {} if asked.sampler == "flowmap" else {"take": take_of(asked.sampler, keys, seed)}
        noise = noise.to(self.model.device)
        begin = _now(self.model.device)
        latents = self.model.sampler(captions, noise, num_steps, shift, first_frames, **way)
        seconds = _now(self.model.device) - begin
        if self.kept is not None:
            self.kept.save(name, latents, seconds)
        return latents, seconds


def _stack(items: Sequence[HeldOut]) -> Tensor:
    return torch.stack([torch.as_tensor(item.frames) for item in items])


def _now(device: torch.device | str) -> float:
    """Read the clock once the device has finished what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
