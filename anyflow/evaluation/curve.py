"""The any-step curve: the quality of one model's samples against the number of steps, and how sure it is.

Every figure stands beside what real clips get from the same measure: ``Curve.real`` (the floor of a distance, the
ceiling of an accuracy) and ``Curve.codec`` (the same clips encoded and decoded: what a perfect generator would get
through this codec). Measured with several seeds of the noise, a figure is their mean, and its interval says where the
mean of many seeds lies (95 %, Student's t); the clips stay the same, so it says nothing of other prompts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from anyflow.errors import UserError
from anyflow.evaluation.intervals import half_interval
from anyflow.system.files import write_atomically

STEPS = (1, 2, 4, 8, 16, 32)

VERSION = 2
"""Of the measures: curves of other versions do not compare. Since 2 all real clips are of the split asked for."""

_Kind = TypeVar("_Kind", bound="Marks")


@dataclass(frozen=True)
class HeldOut:
    """A real clip that no training saw, and the prompt that asks for one like it.

    Attributes:
        key: the clip's name in its shard; with the seed it decides the initial noise.
        caption: the prompt.
        frames: uint8 ``[F, H, W, 3]``.
        domain: whose motion probe reads it.
        attributes: what the simulator measured; the motion asked for is among it.
        controls: what a model is told of its frames, float32 ``[F, W]``; None: nothing.
    """

    key: str
    caption: str
    frames: Tensor
    domain: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    controls: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What one set of clips gets. Distances are to the reference clips; lower is better.

    Attributes:
        sliced_w1: sliced Wasserstein-1 distance of the latents.
        frame_frechet: Frechet distance on fixed frame features (see ``distance.py``: not FVD).
        decoded_frechet: the same to reference clips after the codec, whose loss no network can mend.
        motion_accuracy: share of clips whose motion, read from pixels, is the one asked for; ``None`` without a probe.
        motion_unread: share in which the probe found nothing to follow (they count as wrong).
        motion_clips: of how many clips these are shares: those whose prompt asks for a motion.
        motion_energy: mean absolute change from frame to frame in grey levels.
        frame_kernel: kernel distance (squared MMD) on the same frame features.
        spread: how much the clips differ among each other, in units of the reference's (``distance.py``).
        temporal_consistency: mean SSIM of successive frames.
        path_error: mean distance of the path read from the pixels to that of the prompt's own clip, in pixels; of real
            clips that of others in which the same motion was asked for.
        path_end_error: distance of the last places of both paths, in pixels, where samples are told controls.
        path_right: share of clips whose path ends where it was asked to, within a tolerance (``obedience.py``).
        swap_gap: how much farther from that path a sample goes that is given another clip's controls, in pixels: what
            controls do. Of real clips how far that other clip's path leads, begun at the same place. 0: they are
            ignored.
        obedience: the swap gap as a share of that of real clips: 1 is an obedient model's.
        given_frame_psnr: of given frames to the real ones, in decibels.
        preview_error: how far a sample lies from the one of the same noise at the most steps (``distance.py``).
        more: figures that only some sets have, by name.
    """

    sliced_w1: float
    frame_frechet: float
    motion_accuracy: float | None
    motion_unread: float | None
    motion_energy: float
    motion_clips: int | None = None
    decoded_frechet: float | None = None
    frame_kernel: float | None = None
    spread: float | None = None
    temporal_consistency: float | None = None
    path_error: float | None = None
    path_end_error: float | None = None
    path_right: float | None = None
    swap_gap: float | None = None
    obedience: float | None = None
    given_frame_psnr: float | None = None
    preview_error: float | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    def figure(self, name: str) -> float | None:
        """The figure of a name, None if this set has none."""
        return self.more[name] if name in self.more else getattr(self, name, None)

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary: all figures by name."""
        plain = asdict(self)
        more = plain.pop("more")
        return {**plain, **more}

    @classmethod
    def from_json(cls: type[_Kind], content: Mapping[str, Any]) -> _Kind:
        """Build from ``to_json``'s dictionary."""
        known = {item.name for item in fields(cls)} - {"more"}
        more = {name: value for name, value in content.items() if name not in known}
        return cls(**{name: value for name, value in content.items() if name in known}, more=more)


@dataclass(frozen=True, kw_only=True)
class CurveRow(Marks):
    """One step count; the mean over the seeds.

    Attributes:
        num_steps: steps of the sampler.
        nfe: network calls a clip: one a step, of each chunk if it is made in chunks; all twice where samples are guided
            because the network has no guidance in its weights.
        sampling_seconds: wall time a clip, noise to latents.
        decoding_seconds: wall time a clip, latents to frames.
        interval: of several seeds, half the width of each figure's 95 % interval.
        each: of several seeds, each figure's values in the order of the seeds.
    """

    num_steps: int
    nfe: int
    sampling_seconds: float
    decoding_seconds: float
    interval: Mapping[str, float] = field(default_factory=dict)
    each: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """An any-step curve with what is needed to read it.

    Attributes:
        label: for example ``before`` or ``after``.
        domain: the prompts' domain, or several joined by ``+``.
        clips: how many prompts each row is measured on.
        seed: of the initial noise; the first one.
        shift: of the inference schedule.
        size: frames, height, width of the clips.
        rows: one a step count, ascending.
        real: the same measures of the prompts' own real clips: the floor and the ceiling.
        codec: the same of these clips after encoding and decoding.
        given_frames: latent frames given from each prompt's own clip; 0 is text-to-video.
        left_out: latent frames that comparisons left out, those that were given at least.
        seeds: all seeds of the noise; empty: ``seed`` alone.
        sampler: how jumps were taken: ``flowmap``, ``euler`` or ``renoise``.
        guidance_scale: of the samples; 1: the network was asked once a step.
        control_guidance_scale: of the samples by their controls; 1: none.
        notes: what stands beside the figures: how far a probe can be trusted.
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
    left_out: int = 0
    seeds: tuple[int, ...] = ()
    sampler: str = "flowmap"
    guidance_scale: float = 1.0
    control_guidance_scale: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of the noise, also of a curve that names one alone."""
        return self.seeds or (self.seed,)

    def row(self, num_steps: int) -> CurveRow:
        """Return the row of a step count; ``KeyError`` if it was not measured."""
        for row in self.rows:
            if row.num_steps == num_steps:
                return row
        raise KeyError(num_steps)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that ``from_json`` takes back; the figures of a row are its numbers."""
        marks = {"real": self.real.to_json(), "codec": self.codec.to_json()}
        return {"version": VERSION, **asdict(self), **marks, "rows": [row.to_json() for row in self.rows]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Curve:
        """Build a curve from ``to_json``'s dictionary (or the parsed file)."""
        plain = {name: value for name, value in content.items() if name != "version"}
        plain["size"] = tuple(plain["size"])
        plain.setdefault("left_out", plain.get("given_frames", 0))  # curves from before it was recorded
        plain |= {name: tuple(plain.get(name, ())) for name in ("seeds", "notes")}
        plain["rows"] = tuple(CurveRow.from_json(row) for row in plain["rows"])
        plain["real"], plain["codec"] = Marks.from_json(plain["real"]), Marks.from_json(plain["codec"])
        return cls(**plain)

    def save(self, path: Path) -> None:
        """Write the curve as JSON."""
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")


@dataclass(frozen=True)
class CurveResult:
    """A curve and the samples that a picture shows: ``samples[num_steps]`` is uint8 ``[n, F, H, W, 3]``."""

    curve: Curve
    shown: tuple[HeldOut, ...]
    samples: Mapping[int, Tensor]


def pixel_frames(latent_frames: int) -> int:
    """Frames behind a video's first latent frames: 1, then 4 for each further one (Wan's codec)."""
    return max(0, 4 * latent_frames - 3)


def check_given(latent_frames: int, frames: int, where: str, whose: str = "clips") -> None:
    """Refuse more given frames than leave something to be made; ``where`` says how many, and ``whose`` clips they are.

    Raises:
        UserError: the given frames are all of the ``frames`` of a clip, or more.
    """
    given = pixel_frames(latent_frames)
    if given >= frames:
        raise UserError(
            f"{where}{latent_frames} are {given} frames, and {whose} have {frames}: give at most {(frames - 1) // 4}, "
            "so that something is left to be made"
        )


def over_seeds(rows: Sequence[CurveRow]) -> CurveRow:
    """The row of several seeds: each figure's mean, its values and its interval; of one seed, its row as it is.

    A figure that a seed has none of (no clip could be read) is the mean of the others, and has no interval.
    """
    if len(rows) == 1:
        return rows[0]
    tables = [row.to_json() for row in rows]
    names = [name for name in tables[0] if name not in ("num_steps", "nfe", "motion_clips", "interval", "each")]
    names += [name for table in tables[1:] for name in table if name not in tables[0] and name not in names]
    found = {name: [table[name] for table in tables if table.get(name) is not None] for name in names}
    means = {name: statistics.fmean(values) if values else None for name, values in found.items()}
    whole = {name: values for name, values in found.items() if len(values) == len(rows)}
    interval = {name: half_interval(values) for name, values in whole.items()}
    return CurveRow.from_json({**tables[0], **means, "interval": interval, "each": whole})
