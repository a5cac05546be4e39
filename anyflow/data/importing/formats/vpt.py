"""OpenAI VPT's contractor recordings: NAME.mp4 at 20 frames a second beside NAME.jsonl, one line a tick.

The layout is that of https://github.com/openai/Video-Pre-Training (contractor demonstrations). There are no captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.recording import PLAYER, Found, Recording, Track, Unusable, VideoFile
from anyflow.data.importing.walk import walk_videos
from anyflow.data.safety import parse_json
from anyflow.data.tables import read_rows

LOOKS_FOR = "NAME.mp4 beside NAME.jsonl whose lines have mouse, keyboard and tick"
DOMAIN = "games"
KEYS: dict[str | int, str] = {
    "w": "forward",
    "s": "back",
    "a": "left",
    "d": "right",
    "space": "jump",
    "left.shift": "sneak",
    "left.control": "sprint",
    "q": "drop",
    "e": "inventory",
    "f": "swapHands",
    "escape": "ESC",
    **{str(number): f"hotbar.{number}" for number in range(1, 10)},
    0: "attack",
    1: "use",
    2: "pickItem",
}
"""A key's name, or a mouse button's number -> what it does, as the data set's authors name it."""
HELD = Control(
    "per frame: keys and mouse buttons held, as Minecraft assigns them",
    len(KEYS),
    "multi-hot",
    numbers=tuple(KEYS.values()),
    at="transition",
)
MOUSE = Control(
    "per frame: mouse movement (dx, dy) up to the next frame",
    2,
    unit=("pixel", "pixel"),
    numbers=("dx", "dy"),
    at="transition",
    skipped="sum",
)
CONTROLS: dict[str, Control | str] = {
    "actions": "per frame: keys held, mouse buttons held, mouse movement (dx, dy in pixels), wheel, hotbar, GUI open",
    "keys": HELD,
    "mouse": MOUSE,
    "trajectory": PLAYER,
}
TICKS_PER_SECOND = 20
SESSION = re.compile(r"-\d{8}-\d{6}$")
"""A recording's name ends with its date and time; what stands before names the player's session."""


def detect(folder: Path) -> bool:
    """Whether the first .jsonl beside a video holds ticks."""
    for video in walk_videos(folder):
        lines = video.with_suffix(".jsonl")
        if not lines.is_file():
            continue
        try:
            with lines.open("rb") as file:
                tick = parse_json(file.readline(2**20), lines.name)
        except (DecodeError, OSError):
            return False
        return isinstance(tick, dict) and {"mouse", "keyboard", "tick"} <= set(tick)
    return False


def recordings(folder: Path) -> Iterator[Found]:
    """Every video with its ticks."""
    for video in walk_videos(folder):
        relative = video.relative_to(folder).with_suffix("").as_posix()
        if not video.with_suffix(".jsonl").is_file():
            yield Unusable(relative, f"no {video.stem}.jsonl beside it")
            continue
        session = SESSION.sub("", relative)
        yield Recording(
            relative,
            session,
            VideoFile(str(video)),
            stated_fps=TICKS_PER_SECOND,
            fields={"session": Path(session).name},
            details={"ticks": str(video.with_suffix(".jsonl"))},
        )


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """Actions and pose of every tick; a tick is a frame."""
    path = Path(recording.details["ticks"])
    actions: list[dict[str, Any]] = []
    poses: list[list[float]] = []
    for _, tick in read_rows(path):
        if isinstance(tick, DecodeError):
            raise tick
        try:
            mouse, keyboard = tick["mouse"], tick["keyboard"]
            actions.append(
                {
                    "keys": sorted(str(key).removeprefix("key.keyboard.") for key in keyboard["keys"]),
                    "buttons": sorted(int(button) for button in mouse["buttons"]),
                    "dx": float(mouse["dx"]),
                    "dy": float(mouse["dy"]),
                    "wheel": float(mouse.get("dwheel") or 0),
                    "hotbar": int(tick.get("hotbar") or 0),
                    "gui": bool(tick.get("isGuiOpen")),
                }
            )
            poses.append([float(tick.get(name) or 0) for name in ("xpos", "ypos", "zpos", "yaw", "pitch")])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DecodeError(f"{path.name}:{len(actions) + 1} is no tick ({error!r})") from error
    if not actions:
        raise DecodeError(f"{path.name} holds no ticks")
    times = np.arange(len(actions)) / TICKS_PER_SECOND
    return {
        "actions": Track(times, actions),
        "keys": Track(times, np.array([_held(tick) for tick in actions]), action=HELD),
        "mouse": Track(times, np.array([[tick["dx"], tick["dy"]] for tick in actions]), action=MOUSE),
        "trajectory": Track(times, np.array(poses)),
    }


def _held(action: Mapping[str, Any]) -> list[int]:
    """Of each of ``KEYS``, whether it is held."""
    held = {*action["keys"], *action["buttons"]}
    return [int(key in held) for key in KEYS]
