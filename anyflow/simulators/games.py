"""Games: a first-person walk in ViZDoom, on a map of our own (see ``arena``): turns, walking, standing still."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.clip import Clip, SplitName
from anyflow.data.controls import Control
from anyflow.simulators.arena import HALF_ROOM, LOOKS, PILLAR_COLOURS, PILLAR_PLACES, Hall, Halls, build_wad
from anyflow.simulators.simulated import FRAMES, area_downscale, choose_look, clip_generator, need_package
from anyflow.system.pool import batches, run_jobs

TICS_PER_FRAME = 4
FPS = 35 / TICS_PER_FRAME
DESCRIPTION = (
    "First-person footage of a game: a player in a red or a blue hall with four coloured pillars turns left, turns "
    "right, walks forward or stands still, slowly or fast."
)
CONTROLS: dict[str, Control | str] = {
    "actions": Control(
        "per frame: degrees that each tic turns to the right, and the engine's forward command",
        2,
        unit=("degrees a tic", "command"),
        numbers=("turn_right", "forward"),
        at="transition",
        skipped="mean",
    ),
    "trajectory": Control(
        "per frame: [x, y, angle], in map units from the hall's centre and degrees counter-clockwise",
        3,
        unit=("map unit", "map unit", "degree"),
        numbers=("x", "y", "angle"),
        period=(0.0, 0.0, 360.0),
    ),
}
ATTRIBUTES: dict[str, str | list[str]] = {
    "motion": ["left", "right", "forward", "still"],
    "speed": ["slow", "fast", "none"],
    "scene": ["red hall", "blue hall"],
}
LICENCE = "MIT (rendered with ViZDoom; map and textures are this project's)"
PACKAGES = ("vizdoom", "numpy", "av", "pillow")

MOTIONS = ("left", "right", "forward", "left", "right", "forward", "left", "right", "forward", "still")
"""A clip's motion is MOTIONS[number % 10]."""
TURN_DEGREES_PER_TIC = {"slow": 0.6, "fast": 1.2}
WALK_COMMAND = {"slow": 8.0, "fast": 16.0}
WALK_LENGTH = {"slow": 150.0, "fast": 300.0}
"""Map units that a clip's walk takes at most (a pillar is 80 wide)."""
TICS = TICS_PER_FRAME * (FRAMES - 1)
SETTLE_TICS = 12
"""A new episode ignores the first few actions."""
WARM_UP_TICS = 12
"""The engine accelerates a walker over a few tics; footage begins at constant speed."""
VIEW_HALF_ANGLE = math.degrees(math.atan(0.9))
"""The engine's 90 degrees, less what the crop from 640 to 576 columns takes away."""


@dataclass(frozen=True)
class Walk:
    """What a clip is to show: where it begins (map units, degrees counter-clockwise) and how the player moves."""

    hall: Hall
    motion: str
    speed: str
    x: float
    y: float
    angle: float
    pillar: int

    @property
    def speed_word(self) -> str:
        """The speed as an adverb."""
        return {"slow": "slowly", "fast": "fast", "none": ""}[self.speed]

    @property
    def command(self) -> tuple[float, float]:
        """(degrees to the right, forward command), each tic."""
        turn = TURN_DEGREES_PER_TIC.get(self.speed, 0.0)
        if self.motion == "forward":
            return 0.0, WALK_COMMAND[self.speed]
        return {"left": -turn, "right": turn, "still": 0.0}[self.motion], 0.0


def render(count: int, split: SplitName, seed: int, workers: int = 2, look: str | None = None) -> Iterator[Clip]:
    """``count`` clips, frames encoded as mp4; clip n depends on (seed, split, n, look) alone."""
    halls = choose_look("games", LOOKS, look)
    need_package("vizdoom", "vizdoom")
    for clips in run_jobs(partial(_render_batch, halls, split, seed), batches(count, 50), workers):
        yield from clips


def _render_batch(halls: Halls, split: SplitName, seed: int, numbers: range) -> list[Clip]:
    with tempfile.TemporaryDirectory(prefix="anyflow-arena-") as folder:
        path = Path(folder) / "arena.wad"
        path.write_bytes(build_wad(halls))
        game = _open_game(path)
        try:
            return [_render_clip(game, halls, split, seed, number).encoded() for number in numbers]
        finally:
            game.close()


def _open_game(wad: Path) -> Any:
    import vizdoom

    game = vizdoom.DoomGame()
    game.set_doom_scenario_path(str(wad))
    game.set_doom_map("map01")
    game.set_doom_config_path(str(wad.with_name("vizdoom.ini")))
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_640X480)
    for clutter in ("hud", "weapon", "crosshair", "particles", "decals", "screen_flashes", "messages"):
        getattr(game, f"set_render_{clutter}")(False)
    variable, button = vizdoom.GameVariable, vizdoom.Button
    game.set_available_game_variables([variable.POSITION_X, variable.POSITION_Y, variable.ANGLE])
    game.set_available_buttons([button.TURN_LEFT_RIGHT_DELTA, button.MOVE_FORWARD_BACKWARD_DELTA])
    game.set_episode_timeout(0)
    game.set_seed(1)
    game.set_game_args("+movebob 0 +sv_cheats 1")
    game.init()
    return game


def _render_clip(game: Any, halls: Halls, split: SplitName, seed: int, number: int) -> Clip:
    generator = clip_generator(seed, split, number)
    motion = MOTIONS[number % len(MOTIONS)]
    walk = draw_walk(generator, motion, halls)
    frames, path = _play(game, walk)
    return Clip(
        key=f"games-{split}-{number:06d}",
        caption=caption(walk),
        fps=FPS,
        domain="games",
        frames=frames,
        controls={
            "actions": [{"turn_right": walk.command[0], "forward": walk.command[1]}] * FRAMES,
            "trajectory": path,
        },
        attributes={"motion": motion, "speed": walk.speed, "scene": f"{walk.hall.name} hall"},
        licence=LICENCE,
    )


def draw_walk(generator: np.random.Generator, motion: str, halls: Halls) -> Walk:
    """A random walk with a pillar in sight halfway, away from walls and pillars."""
    hall = halls[int(generator.integers(len(halls)))]
    speed = "none" if motion == "still" else ("slow", "fast")[int(generator.integers(2))]
    pillar = int(generator.integers(len(PILLAR_PLACES)))
    while True:
        x, y = (float(np.rint(value)) for value in generator.uniform(-400, 400, 2))
        offset = float(generator.uniform(10, 30) * generator.choice([-1, 1]))
        turned = {"left": 1, "right": -1}.get(motion, 0) * TURN_DEGREES_PER_TIC.get(speed, 0.0) * TICS
        px, py = PILLAR_PLACES[pillar]
        bearing = math.degrees(math.atan2(py - y, px - x))
        walk = Walk(hall, motion, speed, x, y, bearing + offset - turned / 2, pillar)
        if 240 < math.hypot(px - x, py - y) < 700 and _is_clear(walk):
            return walk


def _is_clear(walk: Walk) -> bool:
    """No wall and no pillar is close to any point of the path."""
    length = WALK_LENGTH[walk.speed] + 60 if walk.motion == "forward" else 0.0
    direction = np.array([math.cos(math.radians(walk.angle)), math.sin(math.radians(walk.angle))])
    points = np.array([walk.x, walk.y]) + np.linspace(0, length, 9)[:, None] * direction
    distances = np.linalg.norm(points[:, None] - np.array(PILLAR_PLACES)[None], axis=-1)
    return bool(np.abs(points).max() < HALF_ROOM - 90 and distances.min() > 160)


def _play(game: Any, walk: Walk) -> tuple[np.ndarray, list[list[float]]]:
    """uint8 [F, H, W, 3], and [[x, y, angle], ...] in map units from the hall's centre and degrees."""
    game.new_episode()
    cx, cy = walk.hall.centre
    turn, forward = walk.command
    start = np.array([walk.x, walk.y])
    if walk.motion == "forward":  # begin a little behind, so that the walk is at its speed when it passes the start
        direction = np.array([math.cos(math.radians(walk.angle)), math.sin(math.radians(walk.angle))])
        start -= direction * WALK_LENGTH[walk.speed] * WARM_UP_TICS / TICS / 2
    game.send_game_command(f"warp {start[0] + cx:.3f} {start[1] + cy:.3f}")
    game.make_action([0.0, 0.0], SETTLE_TICS)
    game.make_action([-(walk.angle + turn * WARM_UP_TICS), 0.0], 1)
    game.make_action([turn, forward], WARM_UP_TICS)
    frames, path = [], []
    for _ in range(FRAMES):
        state = game.get_state()
        x, y, angle = (float(value) for value in state.game_variables)
        path.append([round(x - cx, 2), round(y - cy, 2), round(angle, 2)])
        frames.append(area_downscale(state.screen_buffer[48:432, 32:608], 6))
        game.make_action([turn, forward], TICS_PER_FRAME)
    return np.stack(frames), path


def caption(walk: Walk) -> str:
    """Three short sentences: the hall, the motion, and where the pillar stands in the first frame."""
    movement = {
        "left": f"The player turns left {walk.speed_word}",
        "right": f"The player turns right {walk.speed_word}",
        "forward": f"The player walks forward {walk.speed_word}",
        "still": "The player stands still",
    }[walk.motion]
    px, py = PILLAR_PLACES[walk.pillar]
    bearing = math.degrees(math.atan2(py - walk.y, px - walk.x)) - walk.angle
    bearing = (bearing + 180) % 360 - 180
    if abs(bearing) > VIEW_HALF_ANGLE:
        place = "comes into view"
    elif abs(bearing) < 8:
        place = "stands ahead"
    else:
        place = f"stands on the {'left' if bearing > 0 else 'right'}"
    colour = list(PILLAR_COLOURS)[walk.pillar]
    return f"First-person view of a game in a {walk.hall.name} hall. {movement}. A {colour} pillar {place}."
