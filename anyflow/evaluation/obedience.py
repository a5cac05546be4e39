"""Whether a model does what its controls say: where a sample goes, and what changes under another clip's controls.

A sample under the controls of its own clip should go where that clip goes; under another's, where that one goes from
its own place on. A model that ignores its controls makes the same sample twice, and the gap is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from anyflow.evaluation.curve import HeldOut
from anyflow.simulators.motion import Path2D, Reading, path_distances, path_error, path_tolerance, read_motion

Readings = Sequence[Reading | None]

EDGE = 4 / 64
"""By how much of the frame's height a path may leave the places that clips go to, and still be one to ask for."""


def swap_partners(items: Sequence[HeldOut]) -> list[int] | None:
    """For each prompt the one whose controls are given in place of its own; itself where there is none to give.

    It is of the clips of its domain the one whose path leaves its own farthest, both begun where its own begins. Only
    paths count that an obedient model can follow from there: they stay among the places that any clip goes to. A car in
    the leftmost lane is not told to change to the left.

    None: nothing is swapped. It is where the domain's motion can be read from pixels and the model is told controls.
    """
    told = [item.controls is not None and not bool(item.controls.isnan().all()) for item in items]
    if sum(told) < 2:
        return None
    frames = [torch.as_tensor(item.frames).numpy() for item in items]
    read = [
        read_motion(clip, item.domain) if is_told else None
        for clip, item, is_told in zip(frames, items, told, strict=True)
    ]
    paths = [reading.path if reading is not None and np.isfinite(reading.path).any() else None for reading in read]
    chosen = []
    for place, own in enumerate(paths):
        alike = [other for other, item in enumerate(items) if item.domain == items[place].domain]
        leads = {
            other: _leads_away(own, paths[other], [paths[one] for one in alike], EDGE * frames[place].shape[1])
            for other in alike
        }
        chosen.append(max(leads, key=lambda other: (leads[other], other == place)))
    return chosen if any(other != place for place, other in enumerate(chosen)) else None


def _leads_away(own: Path2D | None, other: Path2D | None, known: Sequence[Path2D | None], edge: float) -> float:
    """How far another clip's path leads from a clip's own, in pixels; 0 where nobody can go there."""
    if own is None or other is None:
        return 0.0
    start, begin = (path[np.isfinite(path).all(1)][0] for path in (own, other))
    places = np.concatenate([path for path in known if path is not None])
    low, high = np.nanmin(places, axis=0) - edge, np.nanmax(places, axis=0) + edge
    moved = (other - begin + start)[np.isfinite(other).all(1)]
    is_open = bool(((moved >= low) & (moved <= high)).all())
    return (path_error(other, own) or 0.0) if is_open else 0.0


def swap_gap(
    clips: Readings, swapped: Readings, asked: Readings, partners: Sequence[int]
) -> tuple[float | None, float | None]:
    """How much farther the swapped clips go from the paths asked for than the clips do: what controls do.

    Args:
        clips: what is read of samples under their own controls.
        swapped: of the same noise, under their partners' controls.
        asked: of the prompts' own clips, whose paths are asked for.
        partners: see :func:`swap_partners`.

    Returns:
        The mean in pixels, and as a share of what it is where each clip goes where its partner does, from its own place
        on: 0 of a model that ignores its controls, 1 of an obedient one. None: none is seen.
    """
    gaps: list[float] = []
    whole: list[float] = []
    for place, (own, other, wanted) in enumerate(zip(clips, swapped, asked, strict=True)):
        partner = asked[partners[place]]
        if partners[place] == place or not (own and other and wanted and partner):
            continue
        found = [path_error(reading.path, wanted.path) for reading in (own, other, partner)]
        errors = [error for error in found if error is not None]
        if len(errors) == len(found):
            gaps.append(errors[1] - errors[0])
            whole.append(errors[2])
    if not gaps:
        return None, None
    return sum(gaps) / len(gaps), sum(gaps) / sum(whole) if sum(whole) > 0 else None


def path_figures(
    clips: Readings, asked: Readings, items: Sequence[HeldOut], size: tuple[int, int]
) -> Mapping[str, Any]:
    """``path_end_error`` and ``path_right``: where paths end, against where they were asked to.

    A path ends right within :func:`anyflow.simulators.motion.path_tolerance`; one that cannot be followed is wrong.
    Clips whose own path cannot be followed ask for nothing.

    Args:
        clips: what is read of samples.
        asked: of the prompts' own clips.
        items: the prompts.
        size: height and width of the clips.
    """
    ends, right = [], []
    for made, wanted, item in zip(clips, asked, items, strict=True):
        if not wanted or path_distances(wanted.path, wanted.path) is None:
            continue
        distances = path_distances(made.path, wanted.path) if made else None
        right.append(distances is not None and bool(distances[-1] <= path_tolerance(item.domain, *size)))
        ends += [] if distances is None else [float(distances[-1])]
    return {
        "path_end_error": sum(ends) / len(ends) if ends else None,
        "path_right": sum(right) / len(right) if right else None,
    }
