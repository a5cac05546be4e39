"""A model on an engine's workers: any of them makes a batch of a curve or a sample, the same as one process makes it.

The process that asks loads nothing of the network. What is made comes back to it, and is judged and written there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.guidance import Guidance
from anyflow.backbone.load import read_controls
from anyflow.data.decode import ClipShape
from anyflow.evaluation.curve import CurveResult
from anyflow.evaluation.heldout import Prompts, fitted
from anyflow.evaluation.kept_samples import KeptSamples
from anyflow.evaluation.loaded import LoadedModel
from anyflow.evaluation.measure import Batch, Here, Made, OnProgress, curve_by, sampler_of
from anyflow.evaluation.measurement import Judges, Measurement, SampledModel
from anyflow.evaluation.models import load_model, shift_of
from anyflow.flowmap.samplers import SamplerKind
from anyflow.system.engines import Engine, Staff, Work, hand_out, in_order, values

AGAIN = "free memory on its machine, and start the same command again"


@dataclass(frozen=True)
class Loaded:
    """What a worker keeps."""

    codec: Any
    backbone: Any


@dataclass(frozen=True)
class Facts:
    """What is to be known of a model before work is handed out.

    Attributes:
        fitting: clips of the shape in one pass.
        latent_shape: of one clip.
        calls: network calls of a clip, by steps.
        computed: device and precision.
    """

    fitting: int
    latent_shape: tuple[int, ...]
    calls: Mapping[int, int]
    computed: str


@dataclass(frozen=True)
class Asking:
    """The task of telling :class:`Facts`; ``given`` are pixel frames ``[1, F, H, W, 3]`` that clips begin with."""

    shape: ClipShape
    steps: tuple[int, ...]
    given_frames: int = 0
    given: Tensor | None = None

    def do(self, loaded: Loaded) -> tuple[Facts, Tensor | None]:
        """The facts, and the latents of the given frames."""
        codec, backbone = loaded.codec, loaded.backbone
        latents = codec.latent_shape(self.shape.frames, self.shape.height, self.shape.width)
        given = None if self.given is None else codec.encode_video(self.given).cpu()
        num_given = self.given_frames if given is None else given.shape[1]
        calls = {steps: backbone.calls_of(steps, latents[0], num_given) for steps in self.steps}
        computed = f"on {codec.device.type} in {str(backbone.dtype).removeprefix('torch.')}"
        return Facts(backbone.clips_at_once(latents), tuple(latents), calls, computed), given


@dataclass(frozen=True)
class Coding:
    """The task of encoding clips, and of decoding what came of it."""

    clips: Tensor

    def do(self, loaded: Loaded) -> tuple[Tensor, Tensor]:
        """Latents, and the clips after the codec."""
        return next(_here(loaded, Measurement()).code([self.clips]))


@dataclass(frozen=True)
class Sampling:
    """The task of sampling and decoding a batch, unless its latents are known with the seconds that they took."""

    batch: Batch
    asked: Measurement
    known: tuple[Tensor, float] | None

    def do(self, loaded: Loaded) -> Made:
        """What becomes of it."""
        here = _here(loaded, self.asked)
        return here.decoded(*(self.known or here.sampled(self.batch)))


@dataclass(frozen=True)
class Streaming:
    """The task of sampling some prompts as ``anyflow sample`` does."""

    prompts: tuple[str, ...]
    num_steps: int
    seed: int
    shape: ClipShape
    shift: float
    way: tuple[SamplerKind, Guidance]
    given: Tensor | None
    controls: Tensor | None = None

    def do(self, loaded: Loaded) -> tuple[Tensor, float]:
        """Clips uint8 ``[n, F, H, W, 3]``, and the seconds that they took."""
        begin, prompts, device = time.perf_counter(), self.prompts, loaded.codec.device
        given = None if self.given is None else self.given.expand(len(prompts), -1, -1, -1, -1).to(device)
        controls = None if self.controls is None else self.controls.expand(len(prompts), -1, -1)
        model = LoadedModel(loaded.backbone, loaded.codec, self.shift, *self.way, self.shape)
        parts = model.parts(prompts, prompts, self.num_steps, self.seed, given, controls)
        return torch.cat([part.cpu() for part in parts], dim=1), time.perf_counter() - begin


@dataclass(frozen=True)
class _Loading:
    """A worker's setup."""

    model: str
    precision: str

    def __call__(self) -> Loaded:
        codec, backbone, _ = load_model(self.model, self.precision)
        return Loaded(codec, backbone)


class HandedOut:
    """Makes the batches of a curve on an engine's workers (a :class:`~anyflow.evaluation.measure.Maker`)."""

    def __init__(self, staff: Staff, asked: Measurement, calls: Mapping[int, int], kept: KeptSamples) -> None:
        self.staff, self.asked, self.kept = staff, replace(asked, judges=Judges()), kept
        self._calls = calls

    def code(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents of each batch of clips, and the clips after the codec."""
        return in_order(_results(self.staff, map(Coding, batches)))

    def make(self, batches: Sequence[Batch]) -> Iterator[Made]:
        """What becomes of each batch; what is sampled is kept as it comes."""
        return in_order(self._made(batches))

    def calls(self, num_steps: int, num_frames: int, num_given: int) -> int:
        """Network calls of a clip."""
        return self._calls[num_steps]

    def _made(self, batches: Sequence[Batch]) -> Iterator[tuple[int, Made]]:
        new: dict[int, str] = {}

        def tasks() -> Iterator[Sampling]:
            for number, batch in enumerate(batches):
                name = batch.name(self.kept, self.asked)
                known = self.kept.load(name)
                if known is None:
                    new[number] = name
                yield Sampling(batch, self.asked, known)

        for number, made in _results(self.staff, tasks()):
            if number in new:
                self.kept.save(new[number], made.latents, made.sampling)
            yield number, made


def curve_by_engine(
    engine: Engine,
    model: str,
    precision: str,
    prompts: Prompts,
    asked: Measurement,
    kept: KeptSamples,
    made_by: str,
    on_progress: OnProgress | None = None,
) -> CurveResult:
    """As :func:`anyflow.evaluation.heldout.curve_of`, on an engine's workers.

    ``made_by`` is what is to be told of the model where samples are kept.

    Raises:
        UserError: the split has too few clips, or no worker can do it.
    """
    items, reference, note = prompts.told_to(read_controls(model)).dealt()
    asked = replace(asked, shift=shift_of(model))
    most = len(items) * len(asked.steps) * len(asked.seeds)
    with closing(_staff(engine, model, precision, most)) as staff:
        facts, _ = _ask(staff, Asking(prompts.shape, tuple(asked.steps), asked.given_frames))
        own = kept.of(f"{made_by} {facts.computed}")
        asked = fitted(asked, facts.fitting, note)
        return curve_by(HandedOut(staff, asked, facts.calls, own), items, reference, asked, on_progress)


def sample_by_engine(
    engine: Engine,
    model: str,
    precision: str,
    prompts: Sequence[str],
    steps: Sequence[int],
    seed: int,
    shape: ClipShape,
    way: tuple[SamplerKind, Guidance],
    given: Tensor | None = None,
    controls: Tensor | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[dict[int, float], dict[int, Tensor], dict[int, int]]:
    """Workers' seconds, clips (uint8 ``[n, F, H, W, 3]``) and network calls by step count.

    Args:
        engine: who samples.
        model, precision: what is sampled.
        prompts: one clip each.
        steps: step counts, each from the same noise.
        seed: of the noise.
        shape: of the clips.
        way: how jumps are taken and guided.
        given: pixel frames uint8 ``[1, F, H, W, 3]`` that all begin with.
        controls: numbers of the frames of all, float32 ``[1, F, W]``.
        on_progress: called after each pass.

    Raises:
        UserError: the model cannot make such clips, or no worker can do it.
    """
    with closing(_staff(engine, model, precision, len(prompts) * len(steps))) as staff:
        facts, latents = _ask(staff, Asking(shape, tuple(steps), given=given))
        groups = [tuple(prompts[at : at + facts.fitting]) for at in range(0, len(prompts), facts.fitting)]
        shift, tasks = shift_of(model), []
        for count in sorted(steps, reverse=True):  # the longest first
            tasks += [Streaming(group, count, seed, shape, shift, way, latents, controls) for group in groups]
        made: dict[int, tuple[Tensor, float]] = {}
        for number, value in _results(staff, tasks):
            made[number] = value
            if on_progress is not None:
                on_progress(len(made), len(tasks), "")
    clips: dict[int, Tensor] = {}
    seconds: dict[int, float] = {}
    for place, count in enumerate(sorted(steps, reverse=True)):
        own = [made[place * len(groups) + number] for number in range(len(groups))]
        clips[count], seconds[count] = torch.cat([part for part, _ in own]), sum(took for _, took in own)
    calls = {count: way[1].calls * facts.calls[count] for count in steps}
    return {count: seconds[count] for count in steps}, {count: clips[count] for count in steps}, calls


def _staff(engine: Engine, model: str, precision: str, most: int) -> Staff:
    sees = (Path(model),) if Path(model).is_dir() else ()
    return engine.staff(Work(_do, _Loading(model, precision), gpu=True, sees=sees), most)


def _ask(staff: Staff, task: Asking) -> tuple[Facts, Tensor | None]:
    [(_, answer)] = list(_results(staff, [task]))
    return answer


def _results(staff: Staff, tasks: Any) -> Iterator[tuple[int, Any]]:
    return values(hand_out(staff, tasks), "batch {}".format, AGAIN)


def _do(loaded: Loaded, task: Asking | Coding | Sampling | Streaming) -> Any:
    with torch.no_grad():
        return task.do(loaded)


def _here(loaded: Loaded, asked: Measurement) -> Here:
    sampler = sampler_of(loaded.backbone, loaded.codec, asked.guidance)
    return Here(SampledModel(sampler, loaded.codec, loaded.codec.device), asked)
