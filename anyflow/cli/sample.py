"""``anyflow sample``: clips of a prompt, from preview to quality."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import Json, Model, fresh_folder, print_json, whole_folder
from anyflow.cli.options import with_options
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model
from anyflow.evaluation.options import WayOptions
from anyflow.system.engine_options import EngineOptions, engine_of
from anyflow.system.imports import quick_imports
from anyflow.system.option import option

if TYPE_CHECKING:
    from torch import Tensor

    from anyflow.backbone.guidance import Guidance
    from anyflow.data.decode import ClipShape
    from anyflow.evaluation.loaded import LoadedModel


@dataclass(frozen=True)
class SampleOptions:
    """What is sampled of the prompts."""

    steps: tuple[int, ...] = option((1, 4, 16), "Step counts, each from the same noise.", low=1, high=1000)
    seed: int = option(0, "Seed of the noise.", low=0)
    frames: int | None = option(None, "Frames (4n+1); else as trained.", low=1)
    height: int | None = option(None, "Pixel rows (multiple of 16; of 32 for Wan 2.2); else as trained.", low=16)
    width: int | None = option(None, "Pixel columns (multiple of 16; of 32 for Wan 2.2); else as trained.", low=16)
    image: Path | None = option(None, "A picture to start from (image-to-video).")
    video: Path | None = option(None, "A clip to go on from (video-to-video).")
    given: int = option(5, "With --video: how many of its frames (4n+1) are taken.", low=1)
    controls: Path | None = option(None, "What is done: a CSV or npy, a row a frame, in the units of the model's card.")
    fps: float | None = option(None, "Frames a second of the mp4; else as trained.", low=0.1)

    @property
    def num_given(self) -> int:
        """Pixel frames that are given: 1 with an image, ``given`` with a video, else 0."""
        return self.given if self.video is not None else 1 if self.image is not None else 0

    def check(self) -> None:
        """That a clip can begin as it is asked to.

        Raises:
            UserError: it cannot.
        """
        if self.image is not None and self.video is not None:
            raise UserError("--image and --video are both given: a clip has one beginning, give one of them")
        files = {"--image": self.image, "--video": self.video, "--controls": self.controls}
        for name, path in files.items():
            if path is not None and not path.is_file():
                raise UserError(f"{name} {path}: there is no such file")
        if self.controls is not None and self.controls.suffix.lower() not in (".csv", ".npy"):
            raise UserError(f"--controls {self.controls}: give a .csv or a .npy with a row for each frame")
        if self.given % 4 != 1:
            fitting = self.given - (self.given - 1) % 4
            raise UserError(f"--given {self.given} is not 4n+1, as the VAE needs: give {fitting}")


@with_options
def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What the clips show, one text a prompt.")],
    options: SampleOptions,
    way: WayOptions,
    engine: EngineOptions,
    model: Model = "data/models/tiny",
    out: Annotated[Path | None, typer.Option(help="A new folder; without it one under runs/samples.")] = None,
    as_json: Json = False,
) -> None:
    """Sample prompts at several step counts, side by side: few steps are a preview of many.

    \b
    Examples:
      anyflow sample "A green car drives slowly and keeps the middle lane. A blue car is beside in the right lane."
      anyflow sample "The robot arm opens a drawer." "It closes it." --model runs/finetune-robotics-tiny-001
      anyflow sample "A green car drives fast." --image start.png
      anyflow sample "A green car drives fast." --model data/models/tiny-causal --video start.mp4 --frames 65
      anyflow sample "A car." --model runs/finetune-driving-control --image start.png --controls actions.csv
      anyflow sample "..." --model runs/wan-teacher --steps 50 --guidance 5 --negative "blurred, still"
      anyflow sample "..." --model nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers --steps 4 --out samples --json
    """
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("PROMPT is empty: say what the clip shows")
    folder = fresh_folder(out, "runs/samples/sample")
    check_model(model)
    options.check()
    engine.check()
    way = _guided(way, options)
    made = _by_engine(engine, model, prompts, options, way) if engine.is_ray else _here(model, prompts, options, way)
    with whole_folder(folder) as partial:
        names = _write(partial, prompts, made.clips, made.shape.fps or 8.0, options.num_given)
    found = {
        "nfe": made.calls,
        "seconds": made.seconds,
        "files": {kind: [folder / name for name in written] for kind, written in names.items()},
    }
    if as_json:
        asked = {"model": model, "prompts": prompts, "seed": options.seed, "guidance": made.guidance.scale}
        asked |= {"control_guidance": made.guidance.control} if options.controls is not None else {}
        print_json({**asked, **found})
    else:
        _show(found, made.guidance.told)


def _guided(way: WayOptions, options: SampleOptions) -> WayOptions:
    """Controls guide where there are any.

    Raises:
        UserError: they are asked to, and there are none.
    """
    if options.controls is not None:
        return way
    if way.control_guidance not in (None, 1):
        raise UserError(f"--control-guidance {way.control_guidance:g}: nothing asks for it: give --controls with it")
    return replace(way, control_guidance=1.0)


@dataclass(frozen=True)
class _Made:
    """By step count: clips (uint8 ``[n, F, H, W, 3]``), their seconds and network calls; and what made them."""

    seconds: Mapping[int, float]
    clips: Mapping[int, Any]
    calls: Mapping[int, int]
    shape: ClipShape
    guidance: Guidance


def _wanted(model: str, options: SampleOptions) -> tuple[ClipShape, Tensor | None]:
    """The shape of the clips, and the pixel frames that all of them begin with."""
    from anyflow.evaluation.loaded import given_pixels
    from anyflow.evaluation.models import native_shape

    shape = native_shape(model, frames=options.frames, height=options.height, width=options.width, fps=options.fps)
    beginning = options.image or options.video
    return shape, None if beginning is None else given_pixels(beginning, options.num_given, shape)


def _told(model: str, options: SampleOptions, frames: int) -> Tensor | None:
    """The controls of the clips' frames; what is to be said of them is printed."""
    if options.controls is None:
        return None
    from anyflow.backbone.load import read_controls
    from anyflow.evaluation.given_controls import given_controls

    controls, notes = given_controls(options.controls, read_controls(model), frames)
    for note in notes:
        print(note, file=sys.stderr)
    return controls


def _here(model: str, prompts: Sequence[str], options: SampleOptions, way: WayOptions) -> _Made:
    """Sample in this process."""
    with quick_imports():
        from anyflow.evaluation.loaded import LoadedModel

    shape, pixels = _wanted(model, options)
    controls = _told(model, options, shape.frames)
    loaded = LoadedModel.of(model, way, shape)
    given = None if pixels is None else loaded.given_latents(pixels)
    seconds, clips = sample_prompts(loaded, prompts, sorted(options.steps), options.seed, given, controls)
    calls = {count: loaded.calls(count, 0 if given is None else given.shape[1]) for count in clips}
    return _Made(seconds, clips, calls, shape, loaded.guidance)


def _by_engine(
    engine: EngineOptions, model: str, prompts: Sequence[str], options: SampleOptions, way: WayOptions
) -> _Made:
    """Sample on a cluster's workers."""
    from anyflow.evaluation.handed_out import sample_by_engine
    from anyflow.evaluation.models import way_of
    from anyflow.system.console import progress_line

    shape, pixels = _wanted(model, options)
    controls = _told(model, options, shape.frames)
    taken = way_of(model, way.sampler, way.guidance, way.negative, way.control_guidance)
    steps = sorted(options.steps)
    cluster = engine_of(engine, 0)
    with progress_line("sampling") as show:
        found = sample_by_engine(
            cluster, model, way.precision, prompts, steps, options.seed, shape, taken, pixels, controls, show
        )
    return _Made(*found, shape, taken[1])


def sample_prompts(
    loaded: LoadedModel,
    prompts: Sequence[str],
    counts: Sequence[int],
    seed: int,
    given: Tensor | None = None,
    controls: Tensor | None = None,
) -> tuple[dict[int, float], dict[int, Any]]:
    """Seconds and clips (uint8 ``[n, F, H, W, 3]``) by step count; each prompt has its own noise, the same at all.

    As many prompts go together as fit.
    """
    import torch

    from anyflow.system.console import progress_line

    at_once = loaded.clips_at_once
    groups = [prompts[first : first + at_once] for first in range(0, len(prompts), at_once)]
    chunks = len(loaded.backbone.chunks_of(loaded.latent_shape[0], 0 if given is None else given.shape[1]))
    seconds, clips = {}, {}
    done, total = 0, len(counts) * len(groups) * chunks
    with progress_line("sampling") as on_progress:
        for count in counts:
            start, videos = time.perf_counter(), []
            for group in groups:
                known, parts = None if given is None else given.expand(len(group), -1, -1, -1, -1), []
                told = None if controls is None else controls.expand(len(group), -1, -1)
                for part in loaded.parts(group, group, count, seed, known, told):
                    parts.append(part.cpu())
                    done += 1
                    on_progress(done, total, f"steps: {count}, chunk {len(parts)}")
                videos.append(torch.cat(parts, dim=1))
            clips[count] = torch.cat(videos)
            seconds[count] = time.perf_counter() - start
    return seconds, clips


def _show(found: Mapping[str, Any], guidance: str) -> None:
    files = found["files"]
    for count, seconds in found["seconds"].items():
        names = ", ".join(map(str, files[str(count)]))
        typer.echo(f"{count:>4} steps  {found['nfe'][count]:>4} calls  {seconds:6.1f} s  {names}")
    if guidance:
        typer.echo(guidance)
    typer.echo(f"side by side: {' and '.join(map(str, files['all']))}")


def _write(
    folder: Path, prompts: Sequence[str], clips: Mapping[int, Any], fps: float, given: int
) -> dict[str, list[str]]:
    """One mp4 a prompt and step count, and ``all`` of them in one picture and one film; the names of the files."""
    from anyflow.evaluation.report.picture import Grid, Prompt, save_mp4, save_png, strips, write_mp4

    names: dict[str, list[str]] = {}
    for count, batch in clips.items():
        names[str(count)] = [f"prompt-{i + 1}-steps-{count:02d}.mp4" for i in range(len(prompts))]
        for name, clip in zip(names[str(count)], batch, strict=True):
            write_mp4(folder / name, list(clip.numpy()), fps)
    rows, samples = [Prompt(prompt) for prompt in prompts], {count: batch.numpy() for count, batch in clips.items()}
    names["all"] = ["samples.png", "samples.mp4"]
    save_png(strips(rows, samples, fps=fps, given=given), folder / "samples.png")
    save_mp4(Grid(rows, {"": samples}, given=given), folder / "samples.mp4", fps=fps)
    return names
