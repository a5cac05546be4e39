"""What a set of clips gets: every figure of the table, against the prompts and against other real clips.

The reference is encoded, featured and read once. The figures of the prompts' own real clips are the floor: distances to
the reference of the same size, and the path error of reference clips in which the same motion was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from anyflow.evaluation.curve import HeldOut, Marks
from anyflow.evaluation.distance import (
    PROJECTIONS,
    frame_features,
    frechet,
    given_frame_psnr,
    kernel_distance,
    motion_energy,
    preview_error,
    sliced_wasserstein,
    temporal_consistency,
)
from anyflow.evaluation.motion import Reading, asked_motion, mean_path_error, motion_accuracy


class Extractor(Protocol):
    """Features of clips, for distances between sets of them."""

    name: str
    """Of the figures: ``NAME_frechet`` and ``NAME_kernel``."""

    def __call__(self, clips: Tensor) -> Tensor:
        """Map uint8 clips ``[N, F, H, W, 3]`` to features ``[M, D]``, some for each clip."""


class Labels(Protocol):
    """Reads labels from clips: a probe."""

    def accuracies(self, clips: Tensor, items: Sequence[HeldOut]) -> Mapping[str, float]:
        """By name of the figure, the share of clips whose label, read from the pixels, is the one asked for."""


class Judge:
    """Measures sets of clips, one clip for each item, in order.

    Args:
        items: the prompts, with their own real clips.
        reference: other real clips, as many.
        reference_clips: uint8 ``[N, F, H, W, 3]``.
        reference_latents: ``[N, F, C, H, W]``.
        projections: random directions of the sliced distance.
        given: frames of each clip that are given from the prompt's own.
        has_previews: whether few steps lead where many lead; a sampler that re-noises draws anew at every step.
        extractors: of further distances.
        labels: of further accuracies.
    """

    def __init__(
        self,
        items: Sequence[HeldOut],
        reference: Sequence[HeldOut],
        reference_clips: Tensor,
        reference_latents: Tensor,
        *,
        projections: int = PROJECTIONS,
        given: int = 0,
        has_previews: bool = True,
        extractors: Sequence[Extractor] = (),
        labels: Sequence[Labels] = (),
    ) -> None:
        self.items, self.reference, self.given, self.has_previews = items, reference, given, has_previews
        self.latents, self.projections = reference_latents, projections
        self.features = frame_features(reference_clips)
        self.extracted = [(extract, extract(reference_clips)) for extract in extractors]
        self.labels = labels
        self._asked: tuple[Reading | None, ...] | None = None
        self._reference_clips = reference_clips

    def __call__(self, clips: Tensor, latents: Tensor, real: Tensor, finals: Tensor | None = None) -> Marks:
        """The marks of clips and their latents.

        ``real`` are the prompts' own clips, ``finals`` the latents of the same noise at the most steps.
        """
        motion = motion_accuracy(
            clips.numpy(), [item.attributes for item in self.items], [item.domain for item in self.items]
        )
        features = frame_features(clips)
        given = given_frame_psnr(clips[:, : self.given], real[:, : self.given]) if self.given else None
        return Marks(
            sliced_w1=sliced_wasserstein(latents, self.latents, projections=self.projections),
            frame_frechet=frechet(self.features, features),
            frame_kernel=kernel_distance(self.features, features),
            motion_accuracy=motion.accuracy,
            motion_unread=motion.unread,
            motion_energy=motion_energy(clips),
            temporal_consistency=temporal_consistency(clips),
            path_error=mean_path_error(motion.readings, self.asked(real)),
            given_frame_psnr=given,
            preview_error=None
            if finals is None or not self.has_previews
            else preview_error(latents, finals, self.latents),
            more={**self._further_distances(clips), **self._further_accuracies(clips)},
        )

    def of_real(self, real: Tensor, latents: Tensor) -> Marks:
        """The floor: the marks of the prompts' own clips, with the path error of other clips of the same motion."""
        return replace(self(real, latents, real), path_error=self._path_floor(real))

    def asked(self, real: Tensor) -> tuple[Reading | None, ...]:
        """The paths of the prompts' own clips: what is asked for. Read once."""
        if self._asked is None:
            labels, domains = [item.attributes for item in self.items], [item.domain for item in self.items]
            self._asked = motion_accuracy(real.numpy(), labels, domains).readings
        return self._asked

    def _path_floor(self, real: Tensor) -> float | None:
        labels, domains = [item.attributes for item in self.reference], [item.domain for item in self.reference]
        others = motion_accuracy(self._reference_clips.numpy(), labels, domains).readings
        free = dict(enumerate(zip(self.reference, others, strict=True)))
        matched: list[Reading | None] = []
        for item in self.items:
            same = [index for index, (other, _) in free.items() if _wanted(other) == _wanted(item)]
            matched.append(free.pop(same[0])[1] if same else None)
        return mean_path_error(matched, self.asked(real))

    def _further_distances(self, clips: Tensor) -> dict[str, float]:
        found = {}
        for extract, reference in self.extracted:
            features = extract(clips)
            found[f"{extract.name}_frechet"] = frechet(reference, features)
            found[f"{extract.name}_kernel"] = kernel_distance(reference, features)
        return found

    def _further_accuracies(self, clips: Tensor) -> dict[str, float]:
        return {name: value for probe in self.labels for name, value in probe.accuracies(clips, self.items).items()}


def _wanted(item: HeldOut) -> tuple[str, str | None]:
    """The motion that a prompt asks for, of its domain."""
    return item.domain, asked_motion(item.domain, item.attributes)
