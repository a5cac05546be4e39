"""BDD100K: videos/[SPLIT/]ID.mov with info/[100k/]SPLIT/ID.json (GPS, IMU); weather and such from the labels.

The folders are those of https://doc.bdd100k.com/download.html; what the info files hold (locations with timestamps in
milliseconds, and -1 for a speed or course that is not known) is as the data set's authors read it in
github.com/gy20073/BDD_Driving_Model. The videos have no captions: write a template over the labels, such as
``--caption "Driving at {timeofday} in {weather} weather, {scene}"``, or give a default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.formats.folder import split_of
from anyflow.data.importing.recording import PATH, Found, Recording, Track, Unusable, VideoFile
from anyflow.data.importing.walk import walk, walk_videos
from anyflow.data.safety import MAX_TABLE_BYTES, read_json, read_json_object

LOOKS_FOR = "videos/**/ID.mov with info/**/ID.json that has rideID and locations or gps"
DOMAIN = "driving"
CONTROLS = {
    "trajectory": replace(PATH, holds=f"{PATH.holds}; by GPS"),
    "speed": Control("per frame: metres a second, by GPS", 1, unit=("m/s",)),
}
LABELS = ("weather", "scene", "timeofday")
METRES_A_DEGREE = 111_320.0
MILLISECONDS = 1000.0


def detect(folder: Path) -> bool:
    """Whether a video's info file lies here."""
    if not (folder / "videos").is_dir() or not (folder / "info").is_dir():
        return False
    first = next((folder / "info").rglob("*.json"), None)
    try:
        return first is not None and bool({"rideID", "locations", "gps"} & set(read_json_object(first)))
    except DecodeError:
        return False


def recordings(folder: Path) -> Iterator[Found]:
    """Every video."""
    infos = {met.path.stem: met.path for met in walk(folder / "info") if not met.left and met.path.suffix == ".json"}
    labels = _labels(folder)
    for video in walk_videos(folder / "videos"):
        relative = video.relative_to(folder / "videos")
        name = relative.with_suffix("").as_posix()
        info = infos.get(video.stem)
        if info is None:
            yield Unusable(name, f"no {video.stem}.json below info")
            continue
        split = split_of(relative) or split_of(info.relative_to(folder))
        # A video's name is RIDE-CLIP: the clips of a ride show the same road.
        yield Recording(
            name=name,
            group=video.stem.partition("-")[0],
            footage=VideoFile(str(video)),
            split=split,
            fields=labels.get(video.stem, {}),
            details={"info": str(info)},
        )


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """Path and speed by GPS, about one fix a second."""
    info = read_json_object(Path(recording.details["info"]))
    fixes = info.get("locations") or info.get("gps") or []
    try:
        rows = [
            [float(fix[name]) for name in ("timestamp", "latitude", "longitude", "speed")]
            + [float(fix.get("course", -1))]
            for fix in fixes
            if float(fix["speed"]) >= 0
        ]
        begin = float(info.get("startTime") or (rows[0][0] if rows else 0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DecodeError(f"{Path(recording.details['info']).name}: a GPS fix is damaged ({error!r})") from error
    table = np.array(sorted(rows), dtype=np.float64).reshape(-1, 5)
    if not len(table):
        return {}
    if not np.isfinite(table).all():
        raise DecodeError("a GPS fix holds a value that is no number")
    times = (table[:, 0] - begin) / MILLISECONDS
    north = (table[:, 1] - table[0, 1]) * METRES_A_DEGREE
    east = (table[:, 2] - table[0, 2]) * METRES_A_DEGREE * np.cos(np.radians(table[0, 1]))
    tracks = {"speed": Track(times, table[:, 3], linear=True)}
    known = table[:, 4] >= 0  # the compass course, clockwise from north; a car that stands has none
    if known.any():
        heading = np.degrees(np.unwrap(np.radians(90 - table[known, 4])))
        path = np.stack([east[known], north[known], heading], axis=1)
        tracks["trajectory"] = Track(times[known], path, linear=True, relative=True)
    return tracks


def _labels(folder: Path) -> dict[str, dict[str, Any]]:
    """Video -> {weather, scene, timeofday}, from the label files (a list of {"name": "ID.jpg", "attributes": ...})."""
    labels: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "labels").rglob("*.json")):
        entries = read_json(path, MAX_TABLE_BYTES)
        for entry in entries if isinstance(entries, list) else []:
            attributes = entry.get("attributes") if isinstance(entry, dict) else None
            if isinstance(attributes, dict) and isinstance(entry.get("name"), str):
                known = {name: attributes[name] for name in LABELS if isinstance(attributes.get(name), str)}
                labels.setdefault(Path(entry["name"]).stem, known)
    return labels
