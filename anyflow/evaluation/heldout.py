"""The any-step curve of a model on a data set's held-out clips: what training and ``evaluate`` both ask."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.controls import ControlSettings, controls_of
from anyflow.backbone.parallelize import join_rows, own_rows, rank_and_size
from anyflow.data.batches import ClipDataset
from anyflow.data.controls import Control
from anyflow.data.decode import ClipShape, DecodeError
from anyflow.data.order import Order
from anyflow.data.reader import ShardReader, find_split
from anyflow.data.wanted import learnt_controls
from anyflow.errors import UserError, first_line
from anyflow.evaluation.curve import CurveResult, HeldOut
from anyflow.evaluation.kept_samples import KeptSamples
from anyflow.evaluation.measure import OnProgress, measure_curve, sampler_of
from anyflow.evaluation.measurement import BATCH_SIZE, CurveCodec, Measurement, SampledModel, Sampler
from anyflow.evaluation.told import Told
from anyflow.flowmap.endpoint import Renoise
from anyflow.flowmap.sampling import Take
from anyflow.system.data_ranks import data_rank
from anyflow.system.files import replacing


class TooFewClips(UserError):
    """A split has not enough clips for a curve."""


def held_out(
    cards: Sequence[str],
    split: str,
    shape: ClipShape,
    count: int | None = None,
    controls: Mapping[str, Control] | None = None,
) -> list[HeldOut]:
    """The first ``count`` clips that can be read, of every card's split in turn (all, if None), decoded.

    They come with the ``controls``, if any are named.
    """
    per_card = [list(islice(_clips(card, split, shape, controls), count)) for card in cards]
    dealt = [clips[i] for i in range(max(map(len, per_card))) for clips in per_card if i < len(clips)]
    return dealt[:count]


def as_asked(clips: Sequence[HeldOut]) -> list[HeldOut]:
    """Leave out the attributes that a caption leaves open: a sample of that prompt cannot show them wrongly.

    They are those in which two clips of one caption differ: all of them where one caption stands for the whole data
    set, and the like of a seed or a measured speed where captions tell what happens.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for clip in clips:
        for name, value in clip.attributes.items():
            values.setdefault((clip.caption, name), set()).add(json.dumps(value, sort_keys=True, default=str))
    return [
        replace(
            clip,
            attributes={name: value for name, value in clip.attributes.items() if len(values[clip.caption, name]) == 1},
        )
        for clip in clips
    ]


def _clips(card: str, split: str, shape: ClipShape, controls: Mapping[str, Control] | None) -> Iterator[HeldOut]:
    """One card's clips in the shards' order; clips that cannot be read are left out."""
    found = find_split(card, split)
    reader = ShardReader([found.folder], [found.caption])
    dataset = ClipDataset(reader, Order(reader.identities(), seed=0, global_batch=1), shape, controls=controls)
    samples = [(number, sample) for number, (_, shard) in enumerate(reader.shards) for sample in shard.samples]
    for number, sample in samples:
        frames = np.empty((shape.frames, shape.height, shape.width, 3), dtype=np.uint8)
        try:
            facts = dataset.load(0, number, sample, frames)
        except DecodeError as error:
            print(f"{split} clip {sample.key} of {card} is left out: {error}", file=sys.stderr)
            continue
        domain, attributes = facts.get("domain", ""), facts.get("attributes") or {}
        told = torch.from_numpy(facts["control_values"]) if controls else None
        yield HeldOut(sample.key, facts["caption"], torch.from_numpy(frames), domain, attributes, told)


def clips_a_pass(fitting: int, ranks: int, batch_size: int = BATCH_SIZE) -> int:
    """Clips that all ranks together sample in one pass, where ``fitting`` fit on each."""
    return min(max(batch_size, ranks), fitting * ranks)


@dataclass(frozen=True)
class Prompts:
    """The first clips of a split, whose captions are sampled, and as many behind them to compare with.

    Attributes:
        cards: the data sets.
        shape: of the clips.
        count: prompts.
        split: where the clips come from.
        or_fewer: take fewer where the split has too few clips, and say so.
        controls: what the model is told of each frame, as its clips have them; None: nothing.
    """

    cards: Sequence[str]
    shape: ClipShape
    count: int
    split: str = "heldout"
    or_fewer: bool = False
    controls: Mapping[str, Control] | None = None

    def told_to(self, controls: ControlSettings | None) -> Prompts:
        """For a model that knows these controls.

        Raises:
            UserError: a card has another control of that name.
        """
        return (
            self
            if controls is None
            else replace(self, controls=learnt_controls(controls.controls, self.cards, self.split))
        )

    def dealt(self) -> tuple[list[HeldOut], list[HeldOut], list[str]]:
        """The clips whose prompts are sampled, as many others, and what is to be said of their number.

        Raises:
            TooFewClips: The split has too few clips.
        """
        clips = as_asked(held_out(self.cards, self.split, self.shape, 2 * self.count, self.controls))
        half = len(clips) // 2
        if half == self.count:
            return clips[:half], clips[half:], []
        if not half or not self.or_fewer:
            raise TooFewClips(_too_few(self.cards, self.split, self.count, len(clips)))
        found = f"the {self.split} split has {len(clips)} clips, and half are compared with"
        return clips[:half], clips[half : 2 * half], [f"{half} prompts instead of {self.count}: {found}"]


def curve_of(
    backbone: Any,
    codec: Codec,
    prompts: Prompts,
    asked: Measurement,
    *,
    device: torch.device,
    kept: KeptSamples | None = None,
    divide: bool = False,
    on_progress: OnProgress | None = None,
) -> CurveResult:
    """Measure a model on prompts, against as many other clips: no clip is both.

    What is sampled goes to ``kept``, and comes from there if it was sampled before. Network and codec are on
    ``device``; they take fewer clips a pass than asked where clips are large. ``divide`` deals each batch out to the
    ranks, all of which must come here: every one does its clips, and has the whole. Ranks that share the network's
    calls sample the same clips; the codec's work is dealt out to all.

    Raises:
        TooFewClips: The split has too few clips.
    """
    items, reference, note = prompts.told_to(controls_of(backbone.transformer)).dealt()
    model = SampledModel(sampler_of(backbone, codec, asked.guidance), codec, device, backbone.calls_of)
    ranks, context = 1, 1
    if divide:
        context = backbone.context.size
        ranks = data_rank(*rank_and_size(), context)[1]
        model = replace(model, sampler=_divided(model.sampler, context), codec=_DividedCodec(codec))
    shape = prompts.shape
    fitting = backbone.clips_at_once(codec.latent_shape(shape.frames, shape.height, shape.width))
    asked = fitted(asked, fitting, note, ranks)
    return measure_curve(model, items, reference, asked, kept=kept, on_progress=on_progress)


def fitted(asked: Measurement, fitting: int, note: Sequence[str] = (), ranks: int = 1) -> Measurement:
    """What is asked, in passes of as many clips as fit on each of so many ranks, with what else is to be said."""
    judges = replace(asked.judges, notes=[*asked.judges.notes, *note])
    return replace(asked, batch_size=clips_a_pass(fitting, ranks, asked.batch_size), judges=judges)


def check_held_out(cards: Sequence[str], split: str, prompts: int, where: str = "prompts") -> None:
    """Tell by the shards' index alone, before anything is loaded, whether a split has clips for so many prompts.

    ``where`` is the option or field that says how many, for the message.

    Raises:
        UserError: it has not.
    """
    found = [find_split(card, split) for card in cards]
    readers = [ShardReader([one.folder], [one.caption]) for one in found]
    count = sum(len(shard.samples) for reader in readers for _, shard in reader.shards)
    if count < 2 * prompts:
        raise UserError(f"{where} {prompts}: {_too_few(cards, split, prompts, count)}")


def _too_few(cards: Sequence[str], split: str, prompts: int, count: int) -> str:
    remedy = f"ask for {count // 2} prompts, or hold more clips out" if count > 1 else "hold more clips out"
    return (
        f"{prompts} prompts need {2 * prompts} clips of the {split} split, {prompts} that ask and {prompts} others to "
        f"compare with, and {' and '.join(map(str, cards))} has {count}: {remedy}"
    )


def _divided(sampler: Sampler, context: int = 1) -> Sampler:
    """Every rank samples its rows of a batch, ``context`` ranks the same. What a row becomes depends on its own prompt
    and noise alone.

    Re-noising draws for the batch as it stands: then every rank samples all of it.
    """

    def sample(told: Told, noise: Tensor, num_steps: int, shift: float, **way: Take) -> Tensor:
        if isinstance(way.get("take"), Renoise):
            return sampler(told, noise, num_steps, shift, **way)
        rows = own_rows(len(noise), context)
        own = sampler(told.of_rows(rows), noise[rows], num_steps, shift, **way)
        return join_rows(own, len(noise), context)

    return sample


@dataclass(frozen=True)
class _DividedCodec:
    """Every rank encodes or decodes its rows of a batch."""

    codec: CurveCodec

    def encode_video(self, video: Tensor) -> Tensor:
        return join_rows(self.codec.encode_video(video[own_rows(len(video))]), len(video))

    def decode(self, latents: Tensor) -> Tensor:
        return join_rows(self.codec.decode(latents[own_rows(len(latents))]), len(latents))


def load_curve(folder: Path, label: str, asked: Mapping[str, Any] | None = None) -> CurveResult | None:
    """A curve and its samples saved by :func:`save_curve`, or None: also if another one was ``asked`` for then.

    One that is damaged is told, and as good as none: it is measured again.
    """
    path = folder / f"{label}.pt"
    if not path.exists():
        return None
    from anyflow.evaluation.curve import Curve

    try:
        saved = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds
        print(f"{path} is damaged ({first_line(error)[:80]}) and does not count", file=sys.stderr)
        return None
    if asked is not None and saved.get("asked", asked) != asked:
        return None
    shown = tuple(HeldOut(**item) for item in saved["shown"])
    return CurveResult(Curve.from_json(saved["curve"]), shown, saved["samples"])


def save_curve(folder: Path, result: CurveResult, asked: Mapping[str, Any] | None = None) -> None:
    """Keep a curve with the samples that a picture shows, atomically: a resumed run does not measure twice.

    ``asked`` are the settings (plain values) that it was measured by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = [
        {
            "key": item.key,
            "caption": item.caption,
            "frames": torch.as_tensor(item.frames),
            "domain": item.domain,
            "attributes": dict(item.attributes),
        }
        for item in result.shown
    ]
    saved: dict[str, Any] = {"curve": result.curve.to_json(), "shown": shown, "samples": dict(result.samples.items())}
    saved |= {} if asked is None else {"asked": dict(asked)}
    with replacing(folder / f"{result.curve.label}.pt") as partial, open(partial, "wb") as file:
        torch.save(saved, file)
