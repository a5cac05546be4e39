"""Whole cars: what people see first in a clip of open driving, read from its pixels alone.

A clip is whole if, in every frame, every car is on the road and has one colour of the palette and a car's area and
outline, and if cars come and go only at the left and right ends of the picture. So a ghost, two colours in one car, a
car that melts, splits or is gone for a frame, or an empty road each make a clip one that is not whole. No training, no
label, no memory of data.

1. A pixel belongs to the nearest of the colours of cars and roads, if it is near enough.
2. What is thinner than three pixels is no part of a car: so lane marks, white as white cars, are left out.
3. What is left of each colour are blobs; each must be a car, or the part of one that is in the picture.
4. What looks like neither road nor car, and is large enough to be seen, is a ghost.
5. Blobs of successive frames are the same car if they have one colour and are near each other.

Of 200 held-out clips 200 are whole, and 198 after the tiny model's autoencoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyflow.simulators.driving_open import CAR_LENGTH, CAR_WIDTH, PALETTE, PIXELS_PER_METRE, ROADS
from anyflow.simulators.simulated import HEIGHT, WIDTH

Frames = NDArray[np.uint8]
Mask = NDArray[np.bool_]

NAMES = tuple(PALETTE)
COLOURS = np.array(list(PALETTE.values()), np.float32)
SHOULDERS, ASPHALTS = (np.array(list(some), np.float32) for some in list(zip(*ROADS.values(), strict=True))[:2])

NEAR = 100.0
"""Distance in RGB up to which a pixel may be a car's: at its rim it is part road."""

COVER = 1.3
"""How much nearer to the road than to the car's colour such a pixel may be."""

PURE = 68.0
"""Distance in RGB up to which a whole car has a colour of the palette; no mean of two of them is so near to either."""

VERGE = 4
"""Rows at the upper and lower end of the picture that no car reaches: they are not read."""

STRANGE = 45.0
"""Distance in RGB from every road beyond which a pixel is not road."""

LENGTH, WIDE = CAR_LENGTH * PIXELS_PER_METRE, CAR_WIDTH * PIXELS_PER_METRE
CAR_AREA = LENGTH * WIDE
AREA_RANGE = (0.62, 1.42)
"""Of a car's area, where all of it is in the picture."""

LENGTH_RANGE = (0.65, 1.25)
WIDTH_RANGE = (0.65, 1.42)
FILLED = 0.82
"""Of the box of a blob's own length and width, the least that the blob fills."""

STEADY = (0.7, 1.4)
"""A car's area in any frame, of its median."""

SMALLEST = 0.2
"""Of a car's area: smaller blobs are specks that nobody sees."""

JUMP = 6.0
"""Pixels that a car moves from frame to frame at most; a real one does 5."""

DOOR = 11
"""Pixels of a car that may be in the picture when it is first or last seen."""


@dataclass(frozen=True, eq=False)
class Blob:
    """A region of one colour in one frame; lengths in pixels.

    Attributes:
        frame: its number.
        colour: its number in the palette.
        area: pixels.
        centre: (x, y).
        left: of its box.
        right: of its box, the first column beyond.
        length: along its main axis.
        width: across.
        shade: distance in RGB of its usual colour from the palette's.
    """

    frame: int
    colour: int
    area: int
    centre: NDArray[np.float64]
    left: int
    right: int
    length: float
    width: float
    shade: float

    @property
    def is_cut(self) -> bool:
        """Whether the picture's left or right end may cut it."""
        return self.left == 0 or self.right == WIDTH

    @property
    def is_at_door(self) -> bool:
        """Whether it is just coming, or all but gone."""
        return self.is_cut and self.right - self.left <= DOOR

    def fault(self) -> str | None:
        """Why it is no car, or no part of one."""
        share, width = self.area / CAR_AREA, self.width / WIDE
        if self.shade > PURE:
            return "has no car's colour"
        if share > AREA_RANGE[1] or width > WIDTH_RANGE[1] or self.length > LENGTH_RANGE[1] * LENGTH:
            return "too large"
        if self.is_cut:
            return "too small" if self.right - self.left > DOOR and width < WIDTH_RANGE[0] else None
        if share < AREA_RANGE[0] or width < WIDTH_RANGE[0] or self.length < LENGTH_RANGE[0] * LENGTH:
            return "too small"
        return "ragged" if self.area < FILLED * self.length * self.width else None


class Fault(NamedTuple):
    """A reason for which a frame of a clip is not whole."""

    frame: int
    told: str


def whole_frames(frames: Frames) -> float:
    """The share of a clip's frames, uint8 ``[F, H, W, 3]``, in which every car is whole: 1 for a whole clip."""
    return 1 - len({fault.frame for fault in faults(frames)}) / len(frames)


def faults(frames: Frames) -> Iterator[Fault]:
    """Every reason for which a clip, uint8 ``[F, 64, 96, 3]``, is not whole, one by one.

    Raises:
        ValueError: frames of another size than the world's.
    """
    if frames.shape[1:] != (HEIGHT, WIDTH, 3):
        raise ValueError(f"frames of {frames.shape[2]}x{frames.shape[1]}: whole cars are read at {WIDTH}x{HEIGHT}")
    masks, strange, verge = _masks(frames)
    blobs = [blob for colour, mask in enumerate(masks) for blob in _blobs(mask, colour, frames)]
    for blob in blobs:
        if (fault := blob.fault()) is not None:
            yield _told(blob, fault)
        elif verge[int(blob.centre[1])]:
            yield _told(blob, "is beside the road")
    yield from (_told(ghost, "is a ghost") for ghost in _ghosts(strange, masks, frames))
    by_frame = [[blob for blob in blobs if blob.frame == frame] for frame in range(len(frames))]
    yield from (Fault(frame, "no car") for frame, seen in enumerate(by_frame) if not seen)
    yield from _track_faults(by_frame)


def _told(blob: Blob, fault: str) -> Fault:
    name = NAMES[blob.colour] if blob.colour >= 0 else "what"
    x, y = blob.centre
    size = f"{blob.area} px, {blob.length:.1f}x{blob.width:.1f}"
    return Fault(blob.frame, f"{name} at {x:.0f}, {y:.0f} {fault} ({size})")


def _masks(frames: Frames) -> tuple[list[Mask], Mask, Mask]:
    """Where each colour of the palette is, ``[F, H, W]``, where something is no road, and which rows ``[H]`` are none.

    Those rows are the ones from each end of the picture up to the road, by what most of a row is in all frames.
    """
    from scipy.ndimage import binary_closing, binary_opening

    cars = _distances(frames, COLOURS)
    shoulder, asphalt = (_distances(frames, some).min(0) for some in (SHOULDERS, ASPHALTS))
    nearest, distance = cars.argmin(0), cars.min(0)
    is_car = (distance < NEAR) & (distance < COVER * asphalt)
    like = ((shoulder < asphalt) & (shoulder < STRANGE)).mean((0, 2)) > 0.6
    verge = np.asarray(np.logical_and.accumulate(like) | np.logical_and.accumulate(like[::-1])[::-1])
    road = np.where(verge[:, None], np.minimum(asphalt, shoulder), asphalt)
    is_strange = road > STRANGE
    for found in (is_car, is_strange):
        found[:, :VERGE] = found[:, -VERGE:] = False
    square, masks = np.ones((1, 3, 3), bool), []
    for colour in range(len(COLOURS)):
        solid = binary_opening(is_car & (nearest == colour), square)
        masks.append(np.asarray(binary_closing(solid, square) | solid))
    return masks, np.asarray(binary_opening(is_strange, np.ones((1, 5, 5), bool))), verge


def _distances(pixels: NDArray[Any], colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[K, ...]``: from pixels ``[..., 3]`` to K colours."""
    return np.stack([np.linalg.norm(pixels.astype(np.float32) - one, axis=-1) for one in colours])


def _ghosts(strange: Mask, masks: Sequence[Mask], frames: Frames) -> list[Blob]:
    """What is neither road nor any car's rim."""
    from scipy.ndimage import binary_dilation

    rims = binary_dilation(np.any(masks, axis=0), np.ones((1, 7, 7), bool))
    return _blobs(strange & ~rims, -1, frames)


def _blobs(mask: Mask, colour: int, frames: Frames) -> list[Blob]:
    """The connected regions of each frame that are large enough to be seen."""
    from scipy.ndimage import find_objects, label

    within = np.zeros((3, 3, 3), bool)
    within[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    labels, _ = label(mask, within)
    blobs = []
    for number, box in enumerate(find_objects(labels), start=1):
        _, rows, columns = np.nonzero(labels[box] == number)
        if len(rows) < SMALLEST * CAR_AREA:
            continue
        spread = np.cov(np.stack([columns, rows]), bias=True)
        width, length = np.sqrt(12 * np.maximum(np.linalg.eigvalsh(spread), 0) + 1)
        left, top = box[2].start, box[1].start
        centre = np.array([columns.mean() + left, rows.mean() + top])
        shade = float(np.linalg.norm(np.median(frames[box][labels[box] == number], axis=0) - COLOURS[colour]))
        found = (len(rows), centre, left, box[2].stop, float(length), float(width), shade)
        blobs.append(Blob(box[0].start, colour, *found))
    return blobs


def _track_faults(by_frame: Sequence[Sequence[Blob]]) -> Iterator[Fault]:
    """What cannot be followed: cars that come and go in the picture, jump, or change their size."""
    running = [[blob] for blob in by_frame[0]]
    tracks = list(running)
    for after in by_frame[1:]:
        free, followed = list(after), []
        for track in running:
            last = track[-1]
            near = [blob for blob in free if blob.colour == last.colour and _distance(blob, last) <= JUMP]
            if near:
                track.append(min(near, key=partial(_distance, last)))
                free.remove(track[-1])
                followed.append(track)
            elif not last.is_at_door:
                yield _told(last, "is gone in the next")
        yield from (_told(blob, "comes from nowhere") for blob in free if not blob.is_at_door)
        new = [[blob] for blob in free]
        running, tracks = followed + new, tracks + new
    for track in tracks:
        whole = [blob for blob in track if not blob.is_cut]
        usual = np.median([blob.area for blob in whole]) if whole else 0.0
        yield from (_told(blob, "changes its size") for blob in whole if not _is_steady(blob.area / usual))


def _distance(blob: Blob, other: Blob) -> float:
    return float(np.hypot(*(blob.centre - other.centre)))


def _is_steady(share: float) -> bool:
    return STEADY[0] <= share <= STEADY[1]
