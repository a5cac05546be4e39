"""Measuring the any-step curve: the same prompts from the same noise at every number of steps.

Two rows of a curve, or two curves, compare because everything but the number of steps (or the model) is the same: the
prompts, their initial noise, the real clips, the projections. The noise of a prompt follows the seed and the prompt's
key alone, so neither the batch size nor the selection changes it.

Shapes: latents ``[B, F, C, H, W]`` float32 normalised; clips uint8 ``[B, F, H, W, 3]``; timestep = 1000 * sigma.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow.backbone.conditions import Conditions
from anyflow.backbone.controls import by_latent_frame
from anyflow.backbone.guidance import UNGUIDED, Guidance
from anyflow.evaluation.curve import Curve, CurveResult, CurveRow, HeldOut, Marks, over_seeds
from anyflow.evaluation.judge import Judge
from anyflow.evaluation.kept_samples import KeptSamples
from anyflow.evaluation.measurement import Measurement, SampledModel, Sampler
from anyflow.evaluation.obedience import swap_partners
from anyflow.evaluation.told import Told
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

    def sample(told: Told, noise: Tensor, num_steps: int, shift: float, **way: Take) -> Tensor:
        guided = guidance.way(backbone, codec)
        controls = None if told.controls is None else by_latent_frame(told.controls, codec.temporal_factor)
        conditions = Conditions(codec.encode_text(told.captions), told.first_frames, controls)
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
    return curve_by(Here(model, asked, kept), items, reference, asked, on_progress)


@torch.no_grad()
def curve_by(
    maker: Maker,
    items: Sequence[HeldOut],
    reference: Sequence[HeldOut],
    asked: Measurement,
    on_progress: OnProgress | None = None,
) -> CurveResult:
    """The same (:func:`measure_curve`) of what a maker makes."""
    if not items or not asked.seeds or len(reference) < len(items):
        raise ValueError(f"{len(items)} prompts need as many reference clips, got {len(reference)}, and a seed")
    reference = reference[: len(items)]
    partners = swap_partners(items)
    if partners is None and asked.judges.controls is not None:
        partners = asked.judges.controls.partners(items)
    swapped = None
    if partners is not None:
        swapped = [replace(item, controls=items[other].controls) for item, other in zip(items, partners, strict=True)]
    runner = _Runner(maker, asked, BatchProgress(asked, len(items), on_progress, sets=1 if swapped is None else 2))
    real_clips, other_clips = _stack(items), _stack(reference)
    real_latents, decoded = runner.encode_and_decode(real_clips, "real clips through the codec")
    coded = runner.encode_and_decode(other_clips, "reference clips")
    judge = Judge(items, reference, other_clips, *coded, asked, partners)
    samples = runner.samples(items, real_latents, swapped)
    rows, shown = _rows(samples, partial(judge, real=real_clips), asked.show)
    curve = Curve(
        label=asked.label,
        domain="+".join(sorted({item.domain for item in items} - {""})),
        clips=len(items),
        seed=asked.seeds[0],
        seeds=tuple(asked.seeds),
        given_frames=asked.given_frames,
        left_out=judge.left_out,
        sampler=asked.sampler,
        guidance_scale=asked.guidance.scale,
        control_guidance_scale=asked.guidance.control if judge.is_told else 1.0,
        notes=(*asked.judges.notes, *filter(None, [asked.guidance.told])),
        shift=asked.shift,
        size=(real_clips.shape[1], real_clips.shape[2], real_clips.shape[3]),
        rows=tuple(rows),
        real=judge.of_real(real_clips, real_latents),
        codec=judge.of_codec(decoded, real_latents, real_clips),
    )
    return CurveResult(curve, tuple(items[: asked.show]), shown)


def _rows(
    samples: Iterable[tuple[int, int, Tensor, Tensor, dict[str, float], Tensor | None]],
    judge: Callable[..., Marks],
    show: int,
) -> tuple[list[CurveRow], dict[int, Tensor]]:
    """Judge the samples of each step count and seed, and keep ``show`` of the first seed's.

    The most steps come first: they are what the previews of the same noise are compared with.
    """
    rows: dict[int, list[CurveRow]] = {}
    kept: dict[int, Tensor] = {}
    finals: dict[int, Tensor] = {}
    for num_steps, seed, clips, latents, cost, swapped in samples:
        marks = judge(clips, latents, finals=finals.setdefault(seed, latents), swapped=swapped).to_json()
        rows.setdefault(num_steps, []).append(CurveRow.from_json({**marks, "num_steps": num_steps, **cost}))
        kept.setdefault(num_steps, clips[:show].clone())
    return [over_seeds(of_seeds) for _, of_seeds in sorted(rows.items())], dict(sorted(kept.items()))


@dataclass(frozen=True)
class Batch:
    """Prompts that are sampled in one pass.

    Attributes:
        told: what they are made by, on the CPU.
        keys: of the prompts.
        shape: of one clip's latents ``(F, C, H, W)``.
    """

    told: Told
    keys: list[str]
    shape: tuple[int, ...]
    num_steps: int
    seed: int

    def noise(self) -> Tensor:
        """What sampling begins with."""
        return prompt_noise(self.shape, self.keys, self.seed)

    def name(self, kept: KeptSamples, asked: Measurement) -> str:
        """What its samples are kept by."""
        guided = () if asked.guidance.calls == 1 else (asked.guidance,)
        facts = (self.told.captions, self.keys, self.seed, self.num_steps, asked.shift, asked.sampler, *guided)
        controls = () if self.told.controls is None else (self.told.controls,)
        return kept.name((self.noise(), self.told.first_frames, *controls), facts)


@dataclass(frozen=True)
class Made:
    """What became of a batch: latents, clips on the CPU, and the seconds that both took."""

    latents: Tensor
    clips: Tensor
    sampling: float
    decoding: float


class Maker(Protocol):
    """Runs codec and sampler, here or elsewhere."""

    def code(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents of each batch of clips, and the clips after the codec."""
        ...

    def make(self, batches: Sequence[Batch]) -> Iterator[Made]:
        """What becomes of each batch."""
        ...

    def calls(self, num_steps: int, num_frames: int, num_given: int) -> int:
        """Network calls of a clip."""
        ...


@dataclass(frozen=True)
class Here:
    """Runs them in this process; of several ranks, on all."""

    model: SampledModel
    asked: Measurement
    kept: KeptSamples | None = None

    def code(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents of each batch of clips, and the clips after the codec."""
        for batch in batches:
            encoded = self.model.codec.encode_video(batch.to(self.model.device))
            yield encoded.float().cpu(), self.model.codec.decode(encoded).cpu()

    def make(self, batches: Sequence[Batch]) -> Iterator[Made]:
        """What becomes of each batch, or became of it if it is kept."""
        for batch in batches:
            if self.kept is None:
                yield self.decoded(*self.sampled(batch))
                continue
            name = batch.name(self.kept, self.asked)
            known = self.kept.load(name)
            if known is None:
                known = self.sampled(batch)
                self.kept.save(name, *known)
            yield self.decoded(*known)

    def sampled(self, batch: Batch) -> tuple[Tensor, float]:
        """A batch's latents, and the seconds that they take."""
        asked, device = self.asked, self.model.device
        way = {} if asked.sampler == "flowmap" else {"take": take_of(asked.sampler, batch.keys, batch.seed)}
        noise = batch.noise().to(device)
        begin = _now(device)
        latents = self.model.sampler(batch.told.to(device), noise, batch.num_steps, asked.shift, **way)
        return latents, _now(device) - begin

    def decoded(self, latents: Tensor, sampling: float) -> Made:
        """A batch that is sampled, decoded."""
        begin = _now(self.model.device)
        clips = self.model.codec.decode(latents.to(self.model.device)).cpu()
        return Made(latents.cpu(), clips, sampling, _now(self.model.device) - begin)

    def calls(self, num_steps: int, num_frames: int, num_given: int) -> int:
        """Network calls of a clip."""
        return self.model.calls(num_steps, num_frames, num_given)


class BatchProgress:
    """Counts what is done of all batches, in network calls: those of its steps, and the codec's share."""

    def __init__(self, asked: Measurement, items: int, on_progress: OnProgress | None, sets: int = 1) -> None:
        self.asked, self.done, self.on_progress = asked, 0, on_progress
        works = [sets * self._work(num_steps) for num_steps in set(asked.steps)]
        self.total = (len(asked.seeds) * sum(works) + 2 * self._work(0)) * -(-items // asked.batch_size)

    def __call__(self, what: str, num_steps: int) -> None:
        """A batch is done: sampled in so many steps (0: real clips), and decoded."""
        self.done += self._work(num_steps)
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, what)

    def sampled(self, num_steps: int) -> None:
        """A batch is sampled and decoded."""
        self(f"{num_steps} step{'s' if num_steps > 1 else ''}", num_steps)

    def _work(self, num_steps: int) -> int:
        return self.asked.guidance.calls * num_steps + CODEC_CALLS


@dataclass(frozen=True)
class _Runner:
    """Goes through a curve's batches; what comes out lies on the CPU."""

    maker: Maker
    asked: Measurement
    progress: BatchProgress

    def encode_and_decode(self, clips: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Return the clips' latents, and the clips after the codec."""
        coded = []
        for pair in self.maker.code(clips.split(self.asked.batch_size)):
            coded.append(pair)
            self.progress(what, 0)
        latents, decoded = zip(*coded, strict=True)
        return torch.cat(latents), torch.cat(decoded)

    def samples(
        self, items: Sequence[HeldOut], like: Tensor, swapped: Sequence[HeldOut] | None = None
    ) -> Iterator[tuple[int, int, Tensor, Tensor, dict[str, float], Tensor | None]]:
        """(steps, seed, clips, latents, what a clip costs, swapped clips) of every prompt, the most steps first.

        ``like`` are the prompts' real latents, which the samples are shaped as and begin with where frames are given.
        ``swapped`` are the prompts with another's controls each; their clips have the same noise.
        """
        rows = [(steps, seed) for steps in sorted(set(self.asked.steps), reverse=True) for seed in self.asked.seeds]
        sets = (items,) if swapped is None else (items, swapped)
        made = self.maker.make([batch for row in rows for one in sets for batch in self._batches(one, like, *row)])
        for num_steps, seed in rows:
            own, *others = (self._take(made, len(items), num_steps) for _ in sets)
            nfe = self.asked.guidance.calls * self.maker.calls(num_steps, like.shape[1], self.asked.given_frames)
            seconds = {
                "sampling_seconds": sum(batch.sampling for batch in own) / len(items),
                "decoding_seconds": sum(batch.decoding for batch in own) / len(items),
            }
            latents = torch.cat([batch.latents.float() for batch in own])
            clips, *more = (torch.cat([batch.clips for batch in of]) for of in (own, *others))
            yield num_steps, seed, clips, latents, {"nfe": nfe, **seconds}, more[0] if more else None

    def _take(self, made: Iterator[Made], count: int, num_steps: int) -> list[Made]:
        """The next batches, of so many prompts."""
        own = []
        for batch in islice(made, -(-count // self.asked.batch_size)):
            own.append(batch)
            self.progress.sampled(num_steps)
        return own

    def _batches(self, items: Sequence[HeldOut], like: Tensor, num_steps: int, seed: int) -> Iterator[Batch]:
        for start in range(0, len(items), self.asked.batch_size):
            batch = items[start : start + self.asked.batch_size]
            given = like[start : start + self.asked.batch_size, : self.asked.given_frames]
            controls = [item.controls for item in batch if item.controls is not None]
            told = Told(
                [item.caption for item in batch],
                given if self.asked.given_frames else None,
                torch.stack(controls) if controls else None,
            )
            yield Batch(told, [item.key for item in batch], tuple(like.shape[1:]), num_steps, seed)


def _stack(items: Sequence[HeldOut]) -> Tensor:
    return torch.stack([torch.as_tensor(item.frames) for item in items])


def _now(device: torch.device | str) -> float:
    """Read the clock once the device has finished what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
