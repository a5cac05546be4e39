"""nuScenes: json tables of scenes, camera pictures (12 Hz, or key frames alone at 2 Hz) and ego poses; the CAN bus.

The layout is that of https://www.nuscenes.org/nuscenes#data-format: a folder ``v1.0-*`` of tables beside ``samples``,
``sweeps`` and, optionally, ``can_bus``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.recording import PATH, Found, ImageFiles, Recording, Track, Unusable
from anyflow.data.safety import MAX_TABLE_BYTES, inside, read_json
from anyflow.errors import UserError

LOOKS_FOR = "a folder v1.0-* with scene.json, sample_data.json and ego_pose.json"
DOMAIN = "driving"
CONTROLS = {
    "trajectory": PATH,
    "speed": Control("per frame: metres a second, from the poses", 1, unit=("m/s",)),
    "steering": Control("per frame: steering wheel, degrees to the left, from the CAN bus", 1, unit=("degree",)),
}
MICROSECONDS = 1e6
SMALLEST_GAP = 1e-4

log = logging.getLogger(__name__)

Rows = dict[str, dict[str, Any]]


def detect(folder: Path) -> bool:
    """Whether there is a folder of tables."""
    return bool(_versions(folder))


def recordings(folder: Path) -> Iterator[Found]:
    """Every camera of every scene."""
    for tables in _versions(folder):
        try:
            yield from _scenes(folder, tables)
        except (DecodeError, KeyError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, DecodeError) else f"a row lacks or has a wrong field ({error!r})"
            raise UserError(f"{str(tables)!r}: {reason}; fetch the tables again") from error


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """Pose and speed at the pictures' times; steering if the CAN bus was recorded."""
    times, path = recording.details["times"] - recording.start, recording.details["path"]
    tracks = {"trajectory": Track(times, path, linear=True, relative=True)}
    if len(times) > 1 and np.diff(times).min() > SMALLEST_GAP:
        velocity = np.gradient(path[:, :2], times, axis=0)
        tracks["speed"] = Track(times, np.linalg.norm(velocity, axis=-1), linear=True)
    steering = folder / "can_bus" / f"{recording.group}_steeranglefeedback.json"
    if steering.is_file():
        try:
            rows = read_json(steering)
            clock = np.array([row["utime"] for row in rows], dtype=np.float64)
            angle = np.degrees(np.array([row["value"] for row in rows], dtype=np.float64))
        except (KeyError, TypeError, ValueError) as error:
            raise DecodeError(f"{steering.name} is damaged ({error!r})") from error
        if len(clock):
            seconds = (clock - recording.details["begin"]) / MICROSECONDS - recording.start
            tracks["steering"] = Track(seconds, angle, linear=True)
    return tracks


def _versions(folder: Path) -> list[Path]:
    needed = ("scene.json", "sample.json", "sample_data.json", "ego_pose.json")
    return [path for path in sorted(folder.glob("v1.0-*")) if all((path / name).is_file() for name in needed)]


def _scenes(folder: Path, tables: Path) -> Iterator[Found]:
    scenes, samples = _rows(tables, "scene"), _rows(tables, "sample")
    sensors, calibrated = _rows(tables, "sensor"), _rows(tables, "calibrated_sensor")
    logs = _rows(tables, "log") if (tables / "log.json").is_file() else {}
    pictures: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _rows(tables, "sample_data").values():
        sensor = sensors[calibrated[row["calibrated_sensor_token"]]["sensor_token"]]
        if sensor["modality"] == "camera":
            pictures.setdefault((samples[row["sample_token"]]["scene_token"], sensor["channel"]), []).append(row)
    poses = _rows(tables, "ego_pose")
    lacking: list[str] = []
    keyframes = 0
    for token, scene in scenes.items():
        log_row = logs.get(scene.get("log_token", ""), {})
        channels = sorted(channel for of, channel in pictures if of == token)
        begin = min((row["timestamp"] for channel in channels for row in pictures[token, channel]), default=0)
        for channel in channels:
            rows = sorted(pictures[token, channel], key=lambda row: row["timestamp"])
            try:
                camera = _Camera(folder, scene, channel, rows, begin, log_row)
                yield from camera.recordings(poses)
            except (DecodeError, KeyError, TypeError, ValueError) as error:
                reason = str(error) if isinstance(error, DecodeError) else f"a row is damaged ({error!r})"
                yield Unusable(f"{scene['name']}/{channel}", reason)
            else:
                keyframes += camera.keyframes_alone
                lacking += camera.lacking
    if keyframes:
        log.warning("of %d cameras' scenes key frames alone are taken, for most others are not here", keyframes)
    if lacking:
        log.warning("%d pictures are missing (%s, ...): scenes are cut in two there", len(lacking), lacking[0])


class _Camera:
    """What a camera saw of a scene: one stretch of pictures, or several where pictures are missing.

    Attributes:
        keyframes_alone: whether most pictures between key frames are not here, as when ``samples`` alone was fetched;
            then key frames alone are taken.
        lacking: names of the other pictures that are not here.

    Raises:
        DecodeError: none is here.
    """

    def __init__(
        self,
        folder: Path,
        scene: Mapping[str, Any],
        channel: str,
        rows: list[dict[str, Any]],
        begin: int,
        log_row: Mapping[str, Any],
    ) -> None:
        files = {row["token"]: inside(folder, row["filename"]) for row in rows}
        here = {token for token, file in files.items() if file.is_file()}
        if not here:
            raise DecodeError(f"there is no {rows[0]['filename']}, nor any other picture of it")
        between = [row["token"] in here for row in rows if not row["is_key_frame"]]
        self.keyframes_alone = 2 * sum(between) < len(between)
        rows = [row for row in rows if row["is_key_frame"] or not self.keyframes_alone]
        self.lacking = [row["filename"] for row in rows if row["token"] not in here]
        self.stretches = [
            list(stretch) for present, stretch in groupby(rows, key=lambda row: row["token"] in here) if present
        ]
        self.scene, self.channel, self.files, self.begin = scene, channel, files, begin
        fields = {"location": log_row.get("location"), "scene": scene["name"]}
        self.fields = {name: value for name, value in fields.items() if value}

    def recordings(self, poses: Rows) -> Iterator[Recording]:
        """One a stretch."""
        name = f"{self.scene['name']}/{self.channel}"
        for number, rows in enumerate(self.stretches):
            begin = rows[0]["timestamp"]
            times = np.array([(row["timestamp"] - begin) / MICROSECONDS for row in rows])
            path = np.array([_pose(poses[row["ego_pose_token"]]) for row in rows])
            path[:, 2] = np.degrees(np.unwrap(path[:, 2]))
            yield Recording(
                name=name if len(self.stretches) == 1 else f"{name}/{number:03d}",
                group=self.scene["name"],
                footage=ImageFiles(tuple(str(self.files[row["token"]]) for row in rows), tuple(times.tolist())),
                caption=self.scene.get("description"),
                camera=self.channel,
                clock=(begin - self.begin) / MICROSECONDS,
                fields=self.fields,
                details={"times": times, "path": path, "begin": begin},
            )


def _pose(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """(x, y, heading in radians) of an ego pose, whose rotation is a quaternion (w, x, y, z)."""
    w, x, y, z = row["rotation"]
    return row["translation"][0], row["translation"][1], np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def _rows(tables: Path, name: str) -> Rows:
    """A table by token."""
    rows = read_json(tables / f"{name}.json", MAX_TABLE_BYTES)
    return {row["token"]: row for row in rows}
