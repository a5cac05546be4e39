"""comma2k19: minutes of driving, raw HEVC at 20 frames a second, with CAN speed and steering and global poses.

The layout is that of https://github.com/commaai/comma2k19: ``[Chunk_N/]DONGLE|DATE/SEGMENT/video.hevc`` beside
``processed_log/CAN/{speed,steering_angle}/{t,value}`` and ``global_pose/frame_{times,positions,orientations}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tokenize import TokenError

import numpy as np

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.recording import PATH, Found, Recording, Track, VideoFile

LOOKS_FOR = "ROUTE/SEGMENT/video.hevc beside processed_log and global_pose"
DOMAIN = "driving"
CONTROLS = {
    "trajectory": PATH,
    "speed": Control("per frame: metres a second, from the CAN bus", 1, unit=("m/s",)),
    "steering": Control("per frame: steering wheel, degrees to the left, from the CAN bus", 1, unit=("degree",)),
}
FPS = 20.0
DEPTHS = ("*/*/video.hevc", "*/*/*/video.hevc", "*/video.hevc")


def detect(folder: Path) -> bool:
    """Whether any segment lies here."""
    return next(_segments(folder), None) is not None


def recordings(folder: Path) -> Iterator[Found]:
    """Every segment; the segments of a route are one group, for they show the same road one after the other."""
    for video in _segments(folder):
        segment = video.parent
        route = segment.parent if segment.parent != folder.parent else segment
        name = segment.relative_to(folder).as_posix()
        yield Recording(
            name=name,
            group=route.relative_to(folder).as_posix(),
            footage=VideoFile(str(video)),
            fps=FPS,
            fields={"route": route.name},
            details={"poses": str(segment / "global_pose" / "frame_positions")},
        )


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """Pose at every frame; speed and steering on the frames' clock."""
    segment = folder / recording.name
    clock = _array(segment / "global_pose" / "frame_times").reshape(-1)
    if len(clock) < 2 or np.diff(clock).min() <= 0:
        raise DecodeError("its frame times do not ascend")
    frames = np.arange(len(clock)) / FPS
    path = _path(
        _array(segment / "global_pose" / "frame_positions"), _array(segment / "global_pose" / "frame_orientations")
    )
    tracks = {"trajectory": Track(frames, path, linear=True, relative=True)}
    for name, signal in (("speed", "speed"), ("steering", "steering_angle")):
        place = segment / "processed_log" / "CAN" / signal
        if (place / "value").is_file():
            times, values = _array(place / "t").reshape(-1), _array(place / "value")
            values = values.reshape(len(values), -1)[:, 0]
            # The camera's clock drifts: a frame's place in the video is its number, whenever it was taken.
            beyond = (times - clock[-1]).clip(0) + (times - clock[0]).clip(None, 0)
            tracks[name] = Track(np.interp(times, clock, frames) + beyond, values, linear=True)
    return tracks


def _segments(folder: Path) -> Iterator[Path]:
    found = {path for depth in DEPTHS for path in folder.glob(depth) if (path.parent / "global_pose").is_dir()}
    yield from sorted(found, key=lambda path: [part.zfill(4) for part in path.relative_to(folder).parts])


def _array(path: Path) -> np.ndarray:
    """A numpy file without a suffix, as numbers; mapped first, for a header may claim more than the file holds."""
    try:
        array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False), dtype=np.float64)
    # numpy reads a header as Python does, and fails as Python does.
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, TokenError, RecursionError, MemoryError) as error:
        raise DecodeError(f"{path.parent.name}/{path.name} cannot be read ({str(error)[:80]})") from error
    if not np.isfinite(array).all():
        raise DecodeError(f"{path.parent.name}/{path.name} holds values that are no numbers")
    return array


def _path(positions: np.ndarray, orientations: np.ndarray) -> np.ndarray:
    """[N, 3] of (x, y, heading in degrees) as seen from the first frame: x ahead, y to the left.

    Args:
        positions: [N, 3], metres, earth-centred. orientations: [N, 4], quaternions (w, x, y, z) that turn the camera's
            frame (ahead, right, down) into the earth-centred one.
    """
    if positions.ndim != 2 or positions.shape[1] != 3 or orientations.shape != (len(positions), 4):
        raise DecodeError(f"poses of shape {positions.shape} and {orientations.shape} are none")
    turns = _rotations(orientations)
    local = (positions - positions[0]) @ turns[0]
    ahead = turns[:, :, 0] @ turns[0]
    heading = np.degrees(np.unwrap(np.arctan2(-ahead[:, 1], ahead[:, 0])))
    return np.stack([local[:, 0], -local[:, 1], heading], axis=1)


def _rotations(quaternions: np.ndarray) -> np.ndarray:
    """[N, 4] (w, x, y, z) to [N, 3, 3]."""
    length = np.linalg.norm(quaternions, axis=1, keepdims=True)
    if (length < 1e-6).any():
        raise DecodeError("an orientation is no rotation")
    w, x, y, z = (quaternions / length).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)
