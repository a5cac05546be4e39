"""Motion read from pixels: does a clip show the motion that its prompt asked for?

One probe a domain, each a few lines of fixed arithmetic on the frames: no training, no label, no memory of the data.

- driving: the green car's centroid; a path that ends about a lane higher is a change to the left (the camera looks
  down, up is left), one that stays is ``keep``.
- robotics: the centroid of the gripper's cyan finger; where its path leads in the picture: ``left``, ``right``, ``up``,
  ``down``, ``still``.
- games: the view's horizontal shift and its expansion from frame to frame; ``left``, ``right``, ``forward``, ``still``.

A probe that cannot follow anything (no green car, two of them, a car that jumps) returns the label ``None``, and that
counts as wrong. So accuracy on samples measures the samples as long as the accuracy on real held-out clips is near 1.
Measured on rendered clips (right / all):

| domain   | held-out | training    | held-out through the tiny codec |
|----------|----------|-------------|---------------------------------|
| driving  | 64 / 64  | 1500 / 1500 | 48 / 48                         |
| robotics | 48 / 48  | 588 / 600   | 48 / 48                         |
| games    | 48 / 48  | 600 / 600   | 32 / 32                         |

The twelve misses are paths within a pixel of a diagonal, where two directions are equally right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Path2D = NDArray[np.float64]

GREEN_EXCESS = 60
"""Grey levels by which green must exceed red and blue: the ego has 110 to 160, marks and roads about 0."""

CAR_AREA = (0.010, 0.080)
"""Share of the frame that the green car may cover; the simulator's covers 0.029 to 0.036."""

CAR_REACH = (0.15, 0.14)
"""Half-sizes, of frame width and height, of the window around the car that must hold nearly all green."""

CAR_SHARE = 0.75
"""How much of the green must lie in that window: two cars or a smear over two lanes are not one car."""

LANE = 18 / 64
"""A lane's width as a share of the frame's height."""

MAX_JUMP = 0.5 * LANE
"""The furthest the ego moves between two frames (of the height; real clips: 0.06): further is a jump, not a drive."""

SEEN_SHARE = 0.8
"""How many of the frames must show what is followed."""

CYAN_EXCESS = 25
"""Grey levels by which green and blue must exceed red: the finger has 60 to 250, the bluish wall at most 24."""

FINGER_AREA = (3 / 6144, 0.015)
"""Share of the frame that the cyan finger may cover; the simulator's covers 0.0005 to 0.005."""

FINGER_REACH = 0.14
"""Radius, of the frame's height, that must hold nearly all cyan."""

FINGER_SHARE = 0.75
"""How much of the cyan must lie in that radius."""

FINGER_JUMP = 0.25
"""The furthest the finger moves between two frames, of the height."""

FINGER_STILL = 4 / 64
"""A path shorter than this share of the height does not count as motion, as in the captions."""

FINGER_SEEN_SHARE = 0.7
"""How many frames must show the finger: a door may hide it for a moment."""

TURN_SHARE = 0.2
"""Share of the frame's width by which the view must shift in all to be a turn; the slowest real turn shifts 0.35."""

ZOOM_TOTAL = 0.12
"""Expansion in all that makes a walk."""

TOLERANCE = {"driving": (LANE / 4, 0.0), "robotics": (FINGER_STILL, 0.0), "games": (0.0, TURN_SHARE / 2)}
"""How far from where it should a path may end and still be right: shares of the frame's height, and of its width."""


@dataclass(frozen=True)
class Reading:
    """What a probe read from one clip.

    Attributes:
        label: the motion in the domain's words, or ``None`` if nothing could be followed.
        confidence: 0..1; how much of the clip was followed, and how far the reading is from another label's.
        path: ``[F, 2]``, x and y in pixels of what was followed (for games: of a point that moves with the view,
            starting at the centre); ``nan`` where it was not seen.
    """

    label: str | None
    confidence: float
    path: Path2D


@dataclass(frozen=True)
class MotionScore:
    """Readings of several clips against what was asked.

    Attributes:
        accuracy: share of right readings among clips whose domain has a probe; ``None`` if there are none.
        unread: share of these in which nothing could be followed (they are wrong, too).
        clips: how many clips were judged.
        readings: one a clip, ``None`` where the domain has no probe.
        right: one a clip.
    """

    accuracy: float | None
    unread: float | None
    clips: int
    readings: tuple[Reading | None, ...]
    right: tuple[bool, ...]


def read_motion(frames: Frames, domain: str) -> Reading | None:
    """Read the motion of one clip, uint8 ``[F, H, W, 3]``; ``None`` without a probe, or of a single frame."""
    probe = PROBES.get(domain)
    return probe(np.asarray(frames)) if probe is not None and len(frames) > 1 else None


def asked_motion(domain: str, attributes: Mapping[str, Any]) -> str | None:
    """Return the motion that a clip's attributes name, in the words that the domain's probe uses."""
    value = attributes.get(ASKED.get(domain, ""))
    return None if value is None else str(value)


def motion_accuracy(
    clips: Frames, attributes: Sequence[Mapping[str, Any]], domains: Sequence[str] | str
) -> MotionScore:
    """Compare the motion read from each clip with the one asked for.

    Args:
        clips: uint8 ``[N, F, H, W, 3]``.
        attributes: one mapping a clip, as the shards have them; used to mark the readings, not to make them.
        domains: one a clip, or one for all. Clips of a domain without a probe, or that name no motion, are left out.
    """
    names = [domains] * len(clips) if isinstance(domains, str) else domains
    readings, right, judged, unread = [], [], 0, 0
    for frames, labels, domain in zip(clips, attributes, names, strict=True):
        asked = asked_motion(domain, labels)
        reading = read_motion(frames, domain) if asked is not None else None
        readings.append(reading)
        right.append(reading is not None and reading.label == asked)
        judged += reading is not None
        unread += reading is not None and reading.label is None
    return MotionScore(
        accuracy=sum(right) / judged if judged else None,
        unread=unread / judged if judged else None,
        clips=judged,
        readings=tuple(readings),
        right=tuple(right),
    )


def path_distances(path: Path2D, asked: Path2D) -> Path2D | None:
    """How far a path is from the one asked for, frame by frame, in pixels; both are begun at one point.

    ``[F, 2]`` each; frames in which either was not seen (nan) are left out. None where fewer than half are seen.
    """
    seen = ~(np.isnan(path).any(1) | np.isnan(asked).any(1))
    if np.count_nonzero(seen) < max(2, len(path) / 2):
        return None
    moved = (path[seen] - path[seen][0]) - (asked[seen] - asked[seen][0])
    return np.hypot(*moved.T)  # type: ignore[no-any-return]


def path_error(path: Path2D, asked: Path2D) -> float | None:
    """The mean of :func:`path_distances`; None where a path was seen too rarely."""
    distances = path_distances(path, asked)
    return None if distances is None else float(distances.mean())


def path_tolerance(domain: str, height: int, width: int) -> float:
    """Pixels within which a path of a domain that has a probe must end to be right (:data:`TOLERANCE`)."""
    of_height, of_width = TOLERANCE[domain]
    return of_height * height + of_width * width


def mean_path_error(readings: Sequence[Reading | None], asked: Sequence[Reading | None]) -> float | None:
    """The mean :func:`path_error` over the clips of which both paths could be read, None if there are none."""
    pairs = [(made, wanted) for made, wanted in zip(readings, asked, strict=True) if made and wanted]
    errors = [error for made, wanted in pairs if (error := path_error(made.path, wanted.path)) is not None]
    return float(np.mean(errors)) if errors else None


def read_ego(frames: Frames) -> Reading:
    """Read the green car's manoeuvre: ``keep``, ``left`` or ``right``.

    The label follows the height of the car at the end against the beginning: beyond half a lane it has changed lanes. A
    car that is not seen in enough frames, that jumps, or that leaves its lane and comes back has no label.
    """
    height = frames.shape[1]
    path = np.stack([_green_centre(frame) for frame in frames])
    seen = ~np.isnan(path[:, 0])
    if seen.mean() < SEEN_SHARE or not seen[:3].any() or not seen[-3:].any():
        return Reading(None, 0.0, path)
    y = path[seen, 1] / height
    gaps = np.diff(np.flatnonzero(seen))
    if (np.abs(np.diff(y)) / gaps).max(initial=0.0) > MAX_JUMP:
        return Reading(None, 0.0, path)
    change = float(np.median(y[-3:]) - np.median(y[:3])) / LANE
    if abs(change) > 0.5:
        label = "right" if change > 0 else "left"
    elif np.abs(y - y[0]).max() < 0.75 * LANE:
        label = "keep"
    else:
        return Reading(None, 0.0, path)
    return Reading(label, float(seen.mean()) * min(1.0, abs(abs(change) - 0.5) / 0.5), path)


def _green_centre(frame: Frames) -> Path2D:
    """Return (x, y) of the one green car in a frame, or nan where there is none or more than one."""
    height, width = frame.shape[:2]
    red, green, blue = (frame[..., channel].astype(np.int16) for channel in range(3))
    excess = green - np.maximum(red, blue)
    rows, columns = np.nonzero(excess > GREEN_EXCESS)
    nothing = np.full(2, np.nan)
    if not CAR_AREA[0] <= len(rows) / (height * width) <= CAR_AREA[1]:
        return nothing
    x, y = np.median(columns), np.median(rows)
    inside = (np.abs(columns - x) <= CAR_REACH[0] * width) & (np.abs(rows - y) <= CAR_REACH[1] * height)
    if inside.mean() < CAR_SHARE:
        return nothing
    return np.array([columns[inside].mean(), rows[inside].mean()])


def read_gripper(frames: Frames) -> Reading:
    """Read where the gripper goes in the picture: ``left``, ``right``, ``up``, ``down`` or ``still``.

    One of the two fingers is cyan, and nothing else is. The label is the longer side of the way from the first two
    places to the last two. Confidence is low near the diagonals, where two labels are equally right.
    """
    height = frames.shape[1]
    path = np.stack([_cyan_centre(frame) for frame in frames])
    seen = ~np.isnan(path[:, 0])
    if seen.mean() < FINGER_SEEN_SHARE or not seen[:3].any() or not seen[-3:].any():
        return Reading(None, 0.0, path)
    places, gaps = path[seen], np.diff(np.flatnonzero(seen))
    if (np.hypot(*np.diff(places, axis=0).T) / gaps).max(initial=0.0) > FINGER_JUMP * height:
        return Reading(None, 0.0, path)
    dx, dy = places[-2:].mean(0) - places[:2].mean(0)
    length, still = float(np.hypot(dx, dy)), FINGER_STILL * height
    share = float(seen.mean())
    if length < still:
        return Reading("still", share * (1 - length / still), path)
    label = ("right" if dx > 0 else "left") if abs(dx) >= abs(dy) else ("down" if dy > 0 else "up")
    off_diagonal = abs(abs(dx) - abs(dy)) / length
    return Reading(label, share * min(1.0, length / still - 1) * min(1.0, 2 * off_diagonal), path)


def _cyan_centre(frame: Frames) -> Path2D:
    """Return (x, y) of the cyan finger in a frame, or nan where there is none or where cyan is scattered."""
    height, width = frame.shape[:2]
    red, green, blue = (frame[..., channel].astype(np.float64) for channel in range(3))
    excess = np.minimum(green, blue) - red
    rows, columns = np.nonzero(excess > CYAN_EXCESS)
    nothing = np.full(2, np.nan)
    if not FINGER_AREA[0] <= len(rows) / (height * width) <= FINGER_AREA[1]:
        return nothing
    near = np.hypot(columns - np.median(columns), rows - np.median(rows)) <= FINGER_REACH * height
    if near.mean() < FINGER_SHARE:
        return nothing
    weight = excess[rows, columns] * near
    return np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()


def read_view(frames: Frames) -> Reading:
    """Read how a first-person view moves: ``left``, ``right``, ``forward`` or ``still``.

    From frame to frame the picture is taken to shift by ``a`` pixels and to expand by the factor ``1 + b`` about the
    centre; both are fitted to the pixels (see ``viewflow``). A turn to the left shifts the scene to the right;
    a walk expands it.
    """
    from anyflow.simulators.viewflow import fit_view_flow

    width = frames.shape[2]
    shift, expansion, match = fit_view_flow(frames)
    centre = np.array([width - 1, frames.shape[1] - 1]) / 2
    path = np.tile(centre, (len(frames), 1))
    path[1:, 0] -= np.cumsum(shift)
    if (match > 0.5).mean() < SEEN_SHARE:
        return Reading(None, 0.0, path)
    turned, walked = float(shift.sum()) / width, float(expansion.sum())
    followed = float(np.clip(match, 0, 1).mean())
    if abs(turned) > TURN_SHARE:
        # A view that swings to and fro has no one direction.
        if abs(shift.sum()) / np.abs(shift).sum() < 0.6:
            return Reading(None, 0.0, path)
        label = "left" if turned > 0 else "right"
        return Reading(label, followed * min(1.0, abs(turned) / TURN_SHARE - 1), path)
    if np.abs(shift).sum() / width > 2 * TURN_SHARE:
        return Reading(None, 0.0, path)
    label = "forward" if walked > ZOOM_TOTAL else "still"
    return Reading(label, followed * min(1.0, abs(walked - ZOOM_TOTAL) / ZOOM_TOTAL), path)


PROBES: dict[str, Callable[[Frames], Reading]] = {"driving": read_ego, "robotics": read_gripper, "games": read_view}
"""The probe of each domain; a domain without one has no motion accuracy."""

ASKED = {"driving": "manoeuvre", "robotics": "direction", "games": "motion"}
"""The attribute that names the motion asked for."""
