"""Whether a model does what its controls say: what changes when a sample gets another clip's controls.

A sample under the controls of its own clip should go where that clip goes; under another's, somewhere else. A model
that ignores its controls makes the same sample twice, and the gap is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anyflow.evaluation.curve import HeldOut
from anyflow.simulators.motion import Reading, path_error, read_motion

Readings = Sequence[Reading | None]


def swap_partners(items: Sequence[HeldOut]) -> list[int] | None:
    """For each prompt the one whose path leaves its own farthest, and whose controls are given in place of its own.

    None: nothing is swapped. It is where the domain's motion can be read from pixels and the model is told controls.
    """
    if len(items) < 2 or any(item.controls is None or bool(item.controls.isnan().all()) for item in items):
        return None
    read = [read_motion(torch.as_tensor(item.frames).numpy(), item.domain) for item in items]
    paths = [reading.path for reading in read if reading is not None]
    if len(paths) < len(items) or len({item.domain for item in items}) > 1:
        return None
    return [max(range(len(paths)), key=lambda other: path_error(paths[other], own) or 0.0) for own in paths]


def swap_gap(clips: Readings, swapped: Readings, real: Readings) -> float | None:
    """How much farther the swapped clips go from the paths asked for than the clips do, in pixels; None: none is seen.

    Args:
        clips: what is read of samples under their own controls.
        swapped: of the same noise, under their partners' controls.
        real: of the prompts' own clips, whose paths are asked for.
    """
    gaps = []
    for own, other, asked in zip(clips, swapped, real, strict=True):
        if own and other and asked:
            errors = path_error(own.path, asked.path), path_error(other.path, asked.path)
            gaps += [] if None in errors else [errors[1] - errors[0]]  # type: ignore[operator]
    return sum(gaps) / len(gaps) if gaps else None
