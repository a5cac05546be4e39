"""Small driving and games data sets in the layouts that others publish; pictures as in ``footage_files``."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from footage_files import HEIGHT, WIDTH, encode, picture, put, put_csv, put_lines, video

SPEED = 10.0
"""Metres a second, everywhere."""
TURN = 6.0
"""Degrees to the left a second, in every drive: the path is a circle."""


def circle(seconds: float) -> tuple[float, float, float]:
    """(x, y, heading in degrees) of a drive that begins at the origin, due x."""
    angle = math.radians(TURN * seconds)
    radius = SPEED / math.radians(TURN)
    return radius * math.sin(angle), radius * (1 - math.cos(angle)), TURN * seconds


def nuscenes(folder: Path, scenes: int = 3, seconds: float = 4.0, rate: int = 12) -> Path:
    """Two cameras; scene s starts at another place and heading; pictures are jpegs with their own times."""
    tables: dict[str, list[dict[str, Any]]] = {
        "sensor": [{"token": f"s{c}", "channel": c, "modality": "camera"} for c in ("CAM_FRONT", "CAM_BACK")]
        + [{"token": "sL", "channel": "LIDAR_TOP", "modality": "lidar"}],
        "log": [{"token": "log", "location": "boston-seaport", "date_captured": "2018-08-01"}],
        "calibrated_sensor": [],
        "scene": [],
        "sample": [],
        "sample_data": [],
        "ego_pose": [],
    }
    for scene in range(scenes):
        name, begin = f"scene-{scene:04d}", 1_500_000_000_000_000 + scene * 60_000_000
        tables["scene"].append(
            {
                "token": name,
                "name": name,
                "log_token": "log",
                "description": f"Turning left, drive {scene}",
                "nbr_samples": 1,
                "first_sample_token": f"{name}-0",
                "last_sample_token": f"{name}-0",
            }
        )
        tables["sample"].append({"token": f"{name}-0", "timestamp": begin, "scene_token": name, "prev": "", "next": ""})
        for channel in ("CAM_FRONT", "CAM_BACK", "LIDAR_TOP"):
            tables["calibrated_sensor"].append({"token": f"{name}{channel}", "sensor_token": f"s{channel}"})
            if channel == "LIDAR_TOP":
                tables["calibrated_sensor"][-1]["sensor_token"] = "sL"
            for frame in range(int(seconds * rate)):
                when = begin + round(frame * 1e6 / rate)
                x, y, heading = circle(frame / rate)
                turned = math.radians(40 * scene)
                place = [
                    500 + x * math.cos(turned) - y * math.sin(turned),
                    70 + x * math.sin(turned) + y * math.cos(turned),
                ]
                half = (math.radians(heading) + turned) / 2
                token = f"{name}-{channel}-{frame}"
                tables["ego_pose"].append(
                    {
                        "token": token,
                        "timestamp": when,
                        "rotation": [math.cos(half), 0.0, 0.0, math.sin(half)],
                        "translation": [*place, 0.0],
                    }
                )
                kind, suffix = ("sweeps" if frame % 6 else "samples"), ("jpg" if channel != "LIDAR_TOP" else "pcd.bin")
                file = f"{kind}/{channel}/{name}__{channel}__{when}.{suffix}"
                tables["sample_data"].append(
                    {
                        "token": token,
                        "sample_token": f"{name}-0",
                        "ego_pose_token": token,
                        "calibrated_sensor_token": f"{name}{channel}",
                        "timestamp": when,
                        "fileformat": suffix,
                        "is_key_frame": kind == "samples",
                        "height": HEIGHT,
                        "width": WIDTH,
                        "filename": file,
                        "prev": "",
                        "next": "",
                    }
                )
                if suffix == "jpg":
                    put(folder / file, jpeg(picture(scene, frame)))
        angles = [{"utime": begin + i * 10_000, "value": math.radians(i / 10)} for i in range(int(seconds * 100))]
        put(folder / f"can_bus/{name}_steeranglefeedback.json", angles)
    # The published tables are in no order.
    tables["sample_data"].reverse()
    for table, rows in tables.items():
        put(folder / f"v1.0-mini/{table}.json", rows)
    return folder


def jpeg(image: np.ndarray) -> bytes:
    """A jpeg file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def comma2k19(folder: Path, routes: int = 2, segments: int = 2, frames: int = 40) -> Path:
    """Raw HEVC at 20 frames a second; poses are earth-centred, CAN signals tick at 100 Hz on the same clock."""
    for route in range(routes):
        for segment in range(segments):
            place = folder / "Chunk_1" / f"b0c9d2329ad1606b|2018-07-{27 + route}--06-03-57" / str(segment)
            number = route * segments + segment
            put(place / "video.hevc", video(number, frames, 20, format="hevc", codec="libx265"))
            begin = 46_000.0 + 60 * segment
            clock = begin + np.arange(frames) / 20
            # The earth's axes, seen from the first frame: some rotation, the same for all.
            turn = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0]
            turn *= np.sign(np.linalg.det(turn))
            path = np.array([circle(t / 20) for t in range(frames)])
            local = np.stack([path[:, 0], -path[:, 1], np.zeros(frames)], axis=1)  # ahead, right, down
            positions = np.array([-2_700_000.0, -4_260_000.0, 3_880_000.0]) + local @ turn.T
            orientations = np.array([_quaternion(turn @ _yaw(-heading)) for heading in path[:, 2]])
            for name, array in (("times", clock), ("positions", positions), ("orientations", orientations)):
                _put_array(place / "global_pose" / f"frame_{name}", array)
            ticks = begin - 0.5 + np.arange(int((frames / 20 + 1) * 100)) / 100
            for signal, values in (("speed", np.full((len(ticks), 1), SPEED)), ("steering_angle", ticks - begin)):
                _put_array(place / "processed_log/CAN" / signal / "t", ticks)
                _put_array(place / "processed_log/CAN" / signal / "value", values)
    return folder


def _put_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # np.save would add a suffix, which the data set's files do not have
        np.save(file, array)


def _yaw(degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _quaternion(turn: np.ndarray) -> np.ndarray:
    """(w, x, y, z) of a rotation matrix: the eigenvector of Bar-Itzhack's matrix."""
    (a, b, c), (d, e, f), (g, h, i) = turn
    k = np.array(
        [
            [a - e - i, d + b, g + c, h - f],
            [d + b, e - a - i, h + f, c - g],
            [g + c, h + f, i - a - e, d - b],
            [h - f, c - g, d - b, a + e + i],
        ]
    )
    x, y, z, w = np.linalg.eigh(k)[1][:, -1]
    return np.array([w, x, y, z])


def bdd100k(folder: Path, videos: int = 3, frames: int = 40, fps: int = 10) -> Path:
    """videos/train, info/100k/train and the labels of the images; fixes once a second."""
    labels = []
    for number in range(videos):
        name = f"{number:04d}f713-1988e0{number:02d}"
        put(folder / f"videos/train/{name}.mov", video(number, frames, fps, format="mov"))
        begin = 1_503_828_163_000
        fixes = []
        for second in range(frames // fps + 2):
            x, y, heading = circle(second)
            fixes.append(
                {
                    "timestamp": begin + 1000 * second,
                    "longitude": -73.9 + x / (111_320 * math.cos(math.radians(40.7))),
                    "latitude": 40.7 + y / 111_320,
                    "course": (90 - heading) % 360,
                    "speed": SPEED,
                    "accuracy": 5,
                }
            )
        info = {
            "rideID": f"ride{number}",
            "startTime": begin,
            "endTime": begin + 40_000,
            "locations": fixes,
            "gyro": [],
        }
        put(folder / f"info/100k/train/{name}.json", info)
        attributes = {"weather": "rainy", "scene": "city street", "timeofday": "night"}
        labels.append({"name": f"{name}.jpg", "attributes": attributes, "timestamp": 10000, "labels": []})
    put(folder / "labels/det_20/det_train.json", labels)
    return folder


def vpt(folder: Path, videos: int = 3, frames: int = 40) -> Path:
    """A video at 20 frames a second and its ticks; frame t moves the mouse by t, and w is held on even frames."""
    for number in range(videos):
        name = f"cheeky-cornflower-setter-02e496ce4ab{number}-20220421-09263{number}"
        put(folder / f"{name}.mp4", video(number, frames, 20))
        ticks = [
            {
                "mouse": {
                    "x": 640.0,
                    "y": 360.0,
                    "dx": float(t),
                    "dy": 0.0,
                    "dwheel": 0.0,
                    "buttons": [],
                    "newButtons": [],
                },
                "keyboard": {"keys": ["key.keyboard.w"] if t % 2 == 0 else [], "newKeys": [], "chars": ""},
                "hotbar": 3,
                "tick": t,
                "milli": 1_650_000_000_000 + 50 * t,
                "inventory": [],
                "isGuiOpen": False,
                "yaw": 90.0,
                "pitch": 5.0,
                "xpos": float(t),
                "ypos": 64.0,
                "zpos": -2.0,
                "stats": {},
            }
            for t in range(frames)
        ]
        put_lines(folder / f"{name}.jsonl", ticks)
    return folder


def gf_minecraft(folder: Path, videos: int = 2, frames: int = 40, fps: int = 16) -> Path:
    """data_2003 with two annotated stretches a video; frame t turns by t."""
    rows = []
    for number in range(videos):
        name = f"seed_{number}_part_{number}"
        put(folder / f"data_2003/video/{name}.mp4", video(number, frames, fps))
        actions = {
            str(t): {
                "ws": 1,
                "ad": 0,
                "scs": 0,
                "pitch": 0.0,
                "yaw": float(t),
                "pitch_delta": 0.0,
                "yaw_delta": float(t),
                "pos": [float(t), 64.0, 0.0],
            }
            for t in range(frames)
        }
        put(
            folder / f"data_2003/metadata/{name}.json",
            {"biome": "plains", "initial_weather": "rain", "actions": actions},
        )
        for start in (0, frames // 2):
            end, prompt = start + frames // 2, f"A walk through plains, part {start}."
            rows.append(
                {
                    "Original video name": f"{name}.mp4",
                    "Start frame index": start,
                    "End frame index": end,
                    "Prompt": prompt,
                }
            )
    put_csv(folder / "data_2003/annotation.csv", rows)
    return folder


def cosmos(folder: Path, videos: int = 3, frames: int = 16) -> Path:
    """videos, metas, and the pickles of text embeddings that must stay shut."""
    for number in range(videos):
        put(folder / f"videos/clip_{number}.mp4", video(number, frames, 8))
        put(folder / f"metas/clip_{number}.txt", f"A robot, take {number}.")
        put(folder / f"t5_xxl/clip_{number}.pickle", b"\x80\x04cos\nsystem\n(S'touch /tmp/run'\ntR.")
    return folder


def scenes(lengths: list[int], fps: float = 8.0) -> bytes:
    """A film of several shots, each of another look."""
    generator = np.random.default_rng(0)
    shots = []
    for length in lengths:
        backdrop = generator.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        shots += [np.roll(backdrop, t, axis=1) for t in range(length)]
    return encode(shots, fps)
