"""What a set of clips gets: every figure of the table, against the prompts and against other real clips.

The reference is encoded, featured and read once. The figures of the prompts' own real clips are the floor: distances to
the reference of the same size, and the path error of reference clips in which the same motion was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from anyflow.evaluation.curve import HeldOut, Marks, pixel_frames
from anyflow.evaluation.distance import (
    frame_features,
    frechet,
    given_frame_psnr,
    kernel_distance,
    motion_energy,
    preview_error,
    sliced_wasserstein,
    spread_ratio,
    temporal_consistency,
)
from anyflow.evaluation.measurement import Measurement
from anyflow.evaluation.obedience import path_figures, swap_gap
from anyflow.flowmap.samplers import SAMPLERS
from anyflow.simulators.motion import (
    MotionScore,
    Reading,
    asked_motion,
    mean_path_error,
    motion_accuracy,
    read_motion,
)
from anyflow.simulators.sight import seen_shares


class Judge:
    """Measures sets of clips, one clip for each item, in order.

    Frames that are given from the prompt's own clip are real, whatever the model: what compares sets of clips, and the
    previews, leave them out. A model that is given none can be compared with one that is if both leave the same out.
    Labels, motion and whole cars are read from whole clips.

    Args:
        items: the prompts, with their own real clips.
        reference: other real clips, as many.
        reference_clips: uint8 ``[N, F, H, W, 3]``.
        reference_latents: ``[N, F, C, H, W]``.
        reference_decoded: the reference clips after the codec.
        asked: what is given and left out, and the further judges. Previews are compared unless the sampler re-noises:
            it draws anew at every step, so that few steps do not lead where many lead.
        partners: whose controls swapped clips were made under (:func:`anyflow.evaluation.obedience.swap_partners`).
    """

    def __init__(
        self,
        items: Sequence[HeldOut],
        reference: Sequence[HeldOut],
        reference_clips: Tensor,
        reference_latents: Tensor,
        reference_decoded: Tensor,
        asked: Measurement,
        partners: Sequence[int] | None = None,
    ) -> None:
        self.items, self.reference, self.partners = items, reference, partners
        self.has_previews = not SAMPLERS[asked.sampler].draws
        self.given, self.given_frames = asked.given_frames, pixel_frames(asked.given_frames)
        self.left_out = max(asked.given_frames, asked.left_out)
        self.latents = reference_latents[:, self.left_out :]
        self.features = frame_features(self._compared(reference_clips))
        self.decoded_features = frame_features(self._compared(reference_decoded))
        self.extracted = [(extract, extract(self._compared(reference_clips))) for extract in asked.judges.extractors]
        self.labels, self.reader = asked.judges.labels, asked.judges.controls
        self._asked: tuple[Reading | None, ...] | None = None
        self._reference_clips = reference_clips

    def __call__(
        self,
        clips: Tensor,
        latents: Tensor,
        real: Tensor,
        finals: Tensor | None = None,
        swapped: Tensor | None = None,
    ) -> Marks:
        """The marks of clips and their latents.

        ``real`` are the prompts' own clips, ``finals`` the latents of the same noise at the most steps, ``swapped`` the
        clips of the same noise under another clip's controls.
        """
        motion = _read(clips, self.items)
        paths, asked = self._paths(clips, motion), self.asked(real)
        made, made_latents = self._compared(clips), latents[:, self.left_out :]
        features, several, spreads = frame_features(made), len(clips) > 1, len(self.latents) > 1
        given = given_frame_psnr(clips[:, : self.given_frames], real[:, : self.given_frames]) if self.given else None
        gaps = {} if swapped is None else self._swap_gaps(clips, paths, swapped, asked)
        ends = finals[:, self.left_out :] if finals is not None and self.has_previews and spreads else None
        return Marks(
            sliced_w1=sliced_wasserstein(made_latents, self.latents),
            frame_frechet=frechet(self.features, features),
            decoded_frechet=frechet(self.decoded_features, features),
            frame_kernel=kernel_distance(self.features, features, clips=len(clips)) if several else None,
            spread=spread_ratio(made_latents, self.latents) if several and spreads else None,
            motion_accuracy=motion.accuracy,
            motion_unread=motion.unread,
            motion_clips=motion.clips or None,
            motion_energy=motion_energy(made),
            temporal_consistency=temporal_consistency(made),
            path_error=mean_path_error(paths, asked),
            **self._path_figures(paths, asked),
            swap_gap=gaps.get("swap_gap"),
            obedience=gaps.get("obedience"),
            given_frame_psnr=given,
            preview_error=None if ends is None else preview_error(made_latents, ends, self.latents),
            more={
                **seen_shares(clips, [item.domain for item in self.items]),
                **self._further_distances(made),
                **self._further_accuracies(clips),
                **({"control_gap": gaps["control_gap"]} if "control_gap" in gaps else {}),
            },
        )

    def of_real(self, real: Tensor, latents: Tensor) -> Marks:
        """The floor: the marks of the prompts' own clips, with the paths of other clips of the same motion.

        How far they are from decoded clips says nothing: the floor of that distance are clips that are decoded, too.
        """
        swapped = None if self.partners is None else real[list(self.partners)]
        others, asked = self._same_motion(), self.asked(real)
        ends = self._path_figures(others, asked) if any(others) else {"path_end_error": None, "path_right": None}
        paths = {"path_error": mean_path_error(others, asked), **ends}
        return replace(self(real, latents, real, swapped=swapped), **paths, decoded_frechet=None)

    def of_codec(self, decoded: Tensor, latents: Tensor, real: Tensor) -> Marks:
        """The marks of the prompts' own clips after the codec; their paths are those asked for and have no error."""
        return replace(self(decoded, latents, real), path_error=None, path_end_error=None, path_right=None)

    def asked(self, real: Tensor) -> tuple[Reading | None, ...]:
        """The paths of the prompts' own clips: what is asked for. Read once."""
        if self._asked is None:
            self._asked = self._paths(real, _read(real, self.items))
        return self._asked

    def _paths(self, clips: Tensor, motion: MotionScore) -> tuple[Reading | None, ...]:
        """What was followed in each clip: where a prompt asks for a motion, or controls do."""
        return self._followed(clips) if self.is_told else motion.readings

    def _followed(self, clips: Tensor) -> tuple[Reading | None, ...]:
        return tuple(read_motion(clip.numpy(), item.domain) for clip, item in zip(clips, self.items, strict=True))

    @property
    def is_told(self) -> bool:
        """Whether samples are told controls."""
        return any(item.controls is not None for item in self.items)

    def _swap_gaps(
        self, clips: Tensor, paths: Sequence[Reading | None], swapped: Tensor, asked: Sequence[Reading | None]
    ) -> dict[str, Any]:
        """By the paths; where none are read, by the controls that a probe reads back."""
        assert self.partners is not None, "clips were swapped"
        gap, obedience = swap_gap(paths, self._followed(swapped), asked, self.partners)
        if gap is None and self.reader is not None:
            gap, obedience = self.reader.gap(clips, swapped, self.items, self.partners)
            return {"control_gap": gap, "obedience": obedience}
        return {"swap_gap": gap, "obedience": obedience}

    def _path_figures(self, paths: Sequence[Reading | None], asked: Sequence[Reading | None]) -> Mapping[str, Any]:
        """Where paths end; a prompt alone does not say it."""
        size = self._reference_clips.shape[2:4]
        return path_figures(paths, asked, self.items, (size[0], size[1])) if self.is_told else {}

    def _same_motion(self) -> list[Reading | None]:
        """For each prompt what another real clip shows of the same motion."""
        others = _read(self._reference_clips, self.reference).readings
        free = dict(enumerate(zip(self.reference, others, strict=True)))
        matched: list[Reading | None] = []
        for item in self.items:
            same = [index for index, (other, _) in free.items() if _wanted(other) == _wanted(item)]
            matched.append(free.pop(same[0])[1] if same else None)
        return matched

    def _compared(self, clips: Tensor) -> Tensor:
        """The frames that comparisons look at."""
        return clips[:, pixel_frames(self.left_out) :]

    def _further_distances(self, clips: Tensor) -> dict[str, float]:
        found = {}
        for extract, reference in self.extracted:
            features = extract(clips)
            if len(features) > 1:
                found[f"{extract.name}_frechet"] = frechet(reference, features)
            if len(clips) > 1:
                found[f"{extract.name}_kernel"] = kernel_distance(reference, features, clips=len(clips))
        return found

    def _further_accuracies(self, clips: Tensor) -> dict[str, float]:
        return {name: value for probe in self.labels for name, value in probe.accuracies(clips, self.items).items()}


def _read(clips: Tensor, items: Sequence[HeldOut]) -> MotionScore:
    """What the motion of each clip is, beside what its item asks for."""
    return motion_accuracy(clips.numpy(), [item.attributes for item in items], [item.domain for item in items])


def _wanted(item: HeldOut) -> tuple[str, str | None]:
    """The motion that a prompt asks for, of its domain."""
    return item.domain, asked_motion(item.domain, item.attributes)
