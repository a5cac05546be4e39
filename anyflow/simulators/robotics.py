"""Robotics: Meta-World's Sawyer arm and its scripted experts on MuJoCo, drawn by OSMesa on the processor.

Held-out clips have layouts (where the object or the goal stands) that no training clip has: the first coordinate of the
layout lies in bands of its own. Every batch of clips has a process of its own, for several OSMesa contexts in one
process damage each other's frames.
"""

from __future__ import annotations

import ctypes.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from anyflow.data.clip import Clip, SplitName
from anyflow.data.controls import Control
from anyflow.errors import UserError
from anyflow.simulators.simulated import (
    FRAMES,
    HEIGHT,
    WIDTH,
    area_downscale,
    choose_look,
    clip_generator,
    need_package,
    on_screen,
)
from anyflow.system.pool import batches, run_jobs

STEPS_PER_FRAME = 8
FPS = 80 / STEPS_PER_FRAME
"""Meta-World's control runs at 80 Hz."""
DESCRIPTION = (
    "A red robot arm at a table reaches a green ball, presses a red button, opens or closes a green drawer, or closes "
    "a black door, led by a scripted expert."
)
CONTROLS: dict[str, Control | str] = {
    "actions": Control(
        "per frame: the gripper's commanded motion (x, y, z) and its closing, each from -1 to 1",
        4,
        numbers=("x", "y", "z", "closing"),
        at="transition",
        skipped="mean",
    ),
    "trajectory": on_screen("per frame: [x, y] of the gripper's middle, in pixels of the frame"),
}
ATTRIBUTES: dict[str, str | list[str]] = {
    "task": ["reach", "button-press", "drawer-open", "drawer-close", "door-close"],
    "direction": ["left", "right", "up", "down", "still"],
}
LICENCE = "MIT (rendered with Meta-World, whose models are MIT, on MuJoCo, Apache-2.0)"
PACKAGES = ("metaworld", "mujoco", "numpy", "av")
SUPERSAMPLE = 3
APPROACH_SPEED = 0.5
REACH_SECONDS = 1.5
STILL_PIXELS = 4.0
"""A gripper that ends closer than this to where it began counts as still."""
HELDOUT_BANDS, BANDS = (1, 4), 6
CLIPS_PER_JOB = 20


@dataclass(frozen=True)
class Camera:
    """Where the camera stands: metres and degrees, as MuJoCo has them."""

    distance: float
    azimuth: float
    lookat: tuple[float, float, float] = (0.0, 0.70, 0.18)
    elevation: float = -30.0


LOOKS = {"middle": Camera(0.92, 135.0), "side": Camera(0.92, 135.0, (0.06, 0.65, 0.17))}
PLAIN_COLOURS = {
    "table_wood": (0.66, 0.55, 0.43, 1.0),
    "wall_metal": (0.72, 0.72, 0.74, 1.0),
    "basic_floor": (0.45, 0.47, 0.5, 1.0),
}


@dataclass(frozen=True)
class TaskSpec:
    """One of the tasks.

    Attributes:
        environment: Meta-World's name.
        phrase: completes "The gripper moves left and ...".
        low, high: the box of layouts.
        skip: control steps before the first frame, so that the footage shows the task rather than the approach.
        speed: largest component of the expert's action in the footage; 1 is the fastest that the arm can do.
        axis: the layout's coordinate whose bands part held-out from training layouts.
    """

    environment: str
    phrase: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    skip: int = 0
    speed: float = 0.5
    axis: int = 0


SPECS = {
    "reach": TaskSpec(
        "reach-v3",
        "reaches the green ball",
        (0.45, 0.5, 0.02, -0.3, 0.45, 0.04),
        (0.45, 0.5, 0.02, 0.25, 0.85, 0.3),
        axis=3,
    ),
    "button-press": TaskSpec(
        "button-press-topdown-v3", "presses the red button", (-0.15, 0.75, 0.115), (0.15, 0.9, 0.115), skip=25
    ),
    "drawer-open": TaskSpec(
        "drawer-open-v3", "opens the green drawer", (-0.15, 0.9, 0.0), (0.15, 0.9, 0.0), skip=84, speed=0.3
    ),
    "drawer-close": TaskSpec(
        "drawer-close-v3", "closes the green drawer", (-0.15, 0.9, 0.0), (0.15, 0.9, 0.0), skip=66, speed=0.3
    ),
    "door-close": TaskSpec(
        "door-close-v3", "closes the black door", (-0.05, 0.82, 0.15), (0.15, 0.95, 0.15), speed=0.75
    ),
}
TASKS = ("reach", "button-press", "drawer-open", "reach", "drawer-close", "door-close")
"""A clip's task is TASKS[number % 6]; reaching comes twice, for it goes in all directions."""
REACH_DIRECTIONS = ("left", "right", "up", "down")
REACH_PIXELS = 10.0
"""A ball is at least this far from the gripper in the image, so that the direction is plain to see."""


def render(count: int, split: SplitName, seed: int, workers: int = 2, look: str | None = None) -> Iterator[Clip]:
    """``count`` clips, frames encoded as mp4; clip n depends on (seed, split, n, look) alone.

    Raises:
        UserError: Meta-World, MuJoCo or the system's OSMesa library is missing.
    """
    camera = choose_look("robotics", LOOKS, look)
    if ctypes.util.find_library("OSMesa") is None:
        raise UserError("library OSMesa is needed to render robotics: install the Debian package libosmesa6")
    os.environ["MUJOCO_GL"] = "osmesa"  # read when mujoco is first imported, here or in a worker
    need_package("mujoco", "mujoco")
    need_package("metaworld", "metaworld")
    blocks = batches(count, CLIPS_PER_JOB * len(TASKS))
    jobs = [
        (task, [n for n in block if TASKS[n % len(TASKS)] == task])
        for block in blocks
        for task in SPECS
        if any(TASKS[n % len(TASKS)] == task for n in block)
    ]
    waiting: dict[int, Clip] = {}
    following = 0
    for clips in run_jobs(partial(_render_batch, camera, split, seed), jobs, workers, fresh=True):
        waiting.update((int(clip.key.rsplit("-", 1)[1]), clip) for clip in clips)
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _render_batch(camera: Camera, split: SplitName, seed: int, job: tuple[str, list[int]]) -> list[Clip]:
    os.environ["MUJOCO_GL"] = "osmesa"
    warnings.filterwarnings("ignore", module="metaworld")
    warnings.filterwarnings("ignore", module="gymnasium")
    task, numbers = job
    stage = Stage(task, camera)
    return [_render_clip(stage, split, seed, number).encoded() for number in numbers]


def _render_clip(stage: Stage, split: SplitName, seed: int, number: int) -> Clip:
    generator = clip_generator(seed, split, number)
    for _ in range(100):  # an expert that fails, or leaves the picture, gets another layout
        layout = draw_layout(generator, stage.spec, split)
        if stage.task == "reach":
            wanted = REACH_DIRECTIONS[number // 3 % len(REACH_DIRECTIONS)]
            while not stage.leads(layout, wanted):
                layout = draw_layout(generator, stage.spec, split)
        frames, path, actions, success = stage.play(layout)
        inside = ((path > -2) & (path < np.array([WIDTH + 2, HEIGHT + 2]))).all()
        if success and inside:
            break
    else:
        raise RuntimeError(f"{stage.task}: no layout of a hundred gave a usable clip")
    direction = direction_of(path)
    return Clip(
        key=f"robotics-{split}-{number:06d}",
        caption=caption(stage.task, direction),
        fps=FPS,
        domain="robotics",
        frames=frames,
        controls={"actions": np.round(actions, 3).tolist(), "trajectory": np.round(path, 2).tolist()},
        attributes={"task": stage.task, "direction": direction},
        licence=LICENCE,
    )


def draw_layout(generator: np.random.Generator, spec: TaskSpec, split: SplitName) -> np.ndarray:
    """A layout vector; held-out layouts lie in bands of ``spec.axis`` that training layouts avoid."""
    bands = [band for band in range(BANDS) if (band in HELDOUT_BANDS) == (split == "heldout")]
    shares = generator.uniform(size=len(spec.low))
    shares[spec.axis] = (generator.choice(bands) + shares[spec.axis]) / BANDS
    low, high = np.array(spec.low), np.array(spec.high)
    return low + shares * (high - low)


def direction_of(path: np.ndarray) -> str:
    """Where the gripper's path [F, 2] leads in the image, from its first to its last point."""
    dx, dy = path[-1] - path[0]
    if np.hypot(dx, dy) < STILL_PIXELS:
        return "still"
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def caption(task: str, direction: str) -> str:
    """One sentence: where the gripper moves in the image, and what it does."""
    movement = "stays near its place" if direction == "still" else f"moves {direction}"
    return f"A red robot arm at a table. The gripper {movement} and {SPECS[task].phrase}."


class Stage:
    """One Meta-World environment with its expert, plain colours and a fixed camera. One a process."""

    def __init__(self, task: str, camera: Camera) -> None:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.task, self.spec = task, SPECS[task]
        self.environment: Any = ALL_V3_ENVIRONMENTS[self.spec.environment]()
        make_expert: Any = ENV_POLICY_MAP[self.spec.environment]
        self.expert = make_expert()
        self.environment._set_task_called = True
        self.environment._freeze_rand_vec = True
        self.environment._partially_observable = False  # the expert for reaching must see the goal
        self.environment.__dict__.pop("sawyer_observation_space", None)
        _simplify(self.environment.model, task)
        self.renderer = mujoco.Renderer(self.environment.model, HEIGHT * SUPERSAMPLE, WIDTH * SUPERSAMPLE)
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self.camera.lookat[:] = camera.lookat
        self.camera.distance, self.camera.azimuth = camera.distance, camera.azimuth
        self.camera.elevation = camera.elevation
        self.environment._last_rand_vec = np.array(self.spec.low)
        self.environment.reset()
        self.start = np.array(self.environment.tcp_center)
        self.renderer.update_scene(self.environment.data, self.camera)

    def play(self, layout: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """The expert at work: frames uint8 [F, H, W, 3], gripper's pixels [F, 2], actions [F, 4], success."""
        environment = self.environment
        environment._last_rand_vec = layout
        observation, _ = environment.reset()
        speed = self.spec.speed
        if self.task == "reach":  # straight to the ball, in the same time from near and far
            speed = float(np.abs(layout[3:] - environment.tcp_center).max()) / REACH_SECONDS / 80 / 0.01
        frames, path, actions, success = [], [], [], False
        for step in range(self.spec.skip + STEPS_PER_FRAME * (FRAMES - 1) + 1):
            if self.task == "reach":
                observation[-3:] = layout[3:]  # the environment clips it to the goals of its own layouts
            limit = APPROACH_SPEED if step < self.spec.skip else speed
            action = np.asarray(self.expert.get_action(observation), dtype=float)
            action[:3] *= min(1.0, limit / max(float(np.abs(action[:3]).max()), 1e-6))
            action = np.clip(action, -1, 1)
            if step >= self.spec.skip and (step - self.spec.skip) % STEPS_PER_FRAME == 0:
                self.renderer.update_scene(environment.data, self.camera)
                frames.append(area_downscale(self.renderer.render(), SUPERSAMPLE))
                path.append(self._project(environment.tcp_center))
                actions.append(action)
            observation, _, _, _, info = environment.step(action)
            success = success or bool(info["success"])
        return np.stack(frames), np.array(path), np.array(actions), success

    def leads(self, layout: np.ndarray, direction: str) -> bool:
        """Whether a ball at this layout lies in ``direction`` of the gripper's first place, well visible."""
        start, ball = np.array(self._project(self.start)), np.array(self._project(layout[3:]))
        far = float(np.hypot(*(ball - start))) >= REACH_PIXELS
        inside = bool(((ball > 6) & (ball < (WIDTH - 6, HEIGHT - 6))).all())
        return far and inside and direction_of(np.stack([start, ball])) == direction

    def _project(self, point: np.ndarray) -> tuple[float, float]:
        """World coordinates in metres -> (x, y) in pixels of the small frame."""
        eyes = self.renderer.scene.camera
        position = (np.array(eyes[0].pos) + np.array(eyes[1].pos)) / 2
        forward, up = np.array(eyes[0].forward), np.array(eyes[0].up)
        offset = np.asarray(point) - position
        scale = HEIGHT / 2 * eyes[0].frustum_near / eyes[0].frustum_top / (offset @ forward)
        right = np.cross(forward, up)
        return float(WIDTH / 2 + scale * (offset @ right)), float(HEIGHT / 2 - scale * (offset @ up))


def _simplify(model: Any, task: str) -> None:
    """Plain colours for wood and tiles, no markers except the ball that is to be reached."""
    import mujoco

    for geom in range(model.ngeom):
        material = model.geom_matid[geom]
        name = mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_MATERIAL, material) if material >= 0 else None
        if name in PLAIN_COLOURS:
            model.geom_matid[geom] = -1
            model.geom_rgba[geom] = PLAIN_COLOURS[name]
    model.site_rgba[:, 3] = 0
    if task == "reach":
        goal = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "goal")
        model.site_rgba[goal] = (0.1, 0.8, 0.1, 1.0)
        model.site_size[goal] = 0.035
        puck = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, "obj")
        model.geom_rgba[model.geom_bodyid == puck, 3] = 0
        model.geom_matid[model.geom_bodyid == puck] = -1
