"""``anyflow sample``: clips of a prompt, from preview to quality."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import (
    GuidanceScale,
    Json,
    Model,
    Negative,
    NoiseSeed,
    Precision,
    Sampler,
    check_precision,
    check_sampler,
    fresh_folder,
    parse_steps,
    print_json,
    whole_folder,
)
from anyflow.cli.options import with_options
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model
from anyflow.system.engine_options import EngineOptions, engine_of

if TYPE_CHECKING:
    from torch import Tensor

    from anyflow.backbone.guidance import Guidance
    from anyflow.data.decode import ClipShape


@with_options
def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What the clips show, one text a prompt.")],
    model: Model = "data/models/tiny",
    steps: Annotated[str, typer.Option(help="Step counts, each from the same noise.")] = "1,4,16",
    seed: NoiseSeed = 0,
    sampler: Sampler = None,
    guidance: GuidanceScale = None,
    negative: Negative = None,
    frames: Annotated[int | None, typer.Option(help="Frames (4n+1); else as trained.", min=1)] = None,
    height: Annotated[int | None, typer.Option(help="Pixel rows (multiple of 16); else as trained.", min=16)] = None,
    width: Annotated[int | None, typer.Option(help="Pixel columns (multiple of 16); else as trained.", min=16)] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from (image-to-video).")] = None,
    video: Annotated[Path | None, typer.Option(help="A clip to go on from (video-to-video).")] = None,
    given: Annotated[int, typer.Option(help="With --video: how many of its frames (4n+1) are taken.", min=1)] = 5,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the mp4; else as trained.", min=0.1)] = None,
    precision: Precision = "",
    *,
    engine: EngineOptions,
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
      anyflow sample "..." --model runs/wan-teacher --steps 50 --guidance 5 --negative "blurred, still"
      anyflow sample "..." --model nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers --steps 4 --out samples --json
    """
    counts = parse_steps(steps)
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("PROMPT is empty: say what the clip shows")
    folder = fresh_folder(out, "runs/samples/sample")
    check_model(model)
    check_sampler(sampler)
    check_precision(precision)
    engine.check()
    given = _check_given(image, video, given)
    from anyflow.evaluation.models import load_model, native_shape, way_of

    shape = native_shape(model, frames=frames, height=height, width=width, fps=fps)
    pixels = given_pixels(image or video, given, shape)
    way = way_of(model, sampler, guidance, negative)
    if engine.is_ray:
        from anyflow.evaluation.handed_out import sample_by_engine
        from anyflow.system.console import progress_line

        cluster = engine_of(engine, 0)
        with progress_line("sampling") as show:
            seconds, clips, calls = sample_by_engine(
                cluster, model, precision, prompts, counts, seed, shape, way, pixels, show
            )
    else:
        codec, backbone, shift = load_model(model, precision)
        latent_shape = codec.latent_shape(shape.frames, shape.height, shape.width)
        first_frames = None if pixels is None else codec.encode_video(pixels)
        seconds, clips = _sample_all(codec, backbone, prompts, latent_shape, counts, shift, way, seed, first_frames)
        num_given = 0 if first_frames is None else first_frames.shape[1]
        calls = {count: way[1].calls * backbone.calls_of(count, latent_shape[0], num_given) for count in counts}
    with whole_folder(folder) as partial:
        names = _write(partial, prompts, clips, shape.fps or 8.0, given)
    files = {kind: [folder / name for name in found] for kind, found in names.items()}
    if as_json:
        told = {"model": model, "prompts": prompts, "seed": seed, "guidance": way[1].scale, "nfe": calls}
        print_json({**told, "seconds": seconds, "files": files})
        return
    for count in counts:
        typer.echo(
            f"{count:>4} steps  {calls[count]:>4} calls  {seconds[count]:6.1f} s  "
            f"{', '.join(map(str, files[str(count)]))}"
        )
    if way[1].told:
        typer.echo(way[1].told)
    typer.echo(f"side by side: {' and '.join(map(str, files['all']))}")


def _check_given(image: Path | None, video: Path | None, given: int) -> int:
    """How many pixel frames are given: 1 with an image, ``--given`` with a video, else 0."""
    if image is not None and video is not None:
        raise UserError("--image and --video are both given: a clip has one beginning, give one of them")
    for name, path in (("--image", image), ("--video", video)):
        if path is not None and not path.is_file():
            raise UserError(f"{name} {path}: there is no such file")
    if given % 4 != 1:
        raise UserError(f"--given {given} is not 4n+1, as the VAE needs: give {given - (given - 1) % 4}")
    return given if video is not None else 1 if image is not None else 0


def given_pixels(path: Path | None, given: int, shape: ClipShape) -> Tensor | None:
    """The given frames uint8 ``[1, F, H, W, 3]``, scaled and cropped to the clip's size; None without any."""
    import dataclasses

    import torch

    from anyflow.data.decode import DecodeError, decode_clip

    if path is None:
        return None
    if given >= shape.frames:
        raise UserError(
            f"--given {given} leaves nothing to sample of {shape.frames} frames: give less, or more --frames"
        )
    fps = shape.fps if given > 1 else None
    try:
        frames = decode_clip(path.read_bytes(), dataclasses.replace(shape, frames=given, fps=fps))
    except DecodeError as error:
        raise UserError(f"{path}: {error}") from error
    return torch.from_numpy(frames)[None]


def _sample_all(
    codec: Any,
    backbone: Any,
    prompts: list[str],
    shape: tuple[int, ...],
    counts: list[int],
    shift: float,
    way: tuple[Any, Guidance],
    seed: int,
    first_frames: Tensor | None,
) -> tuple[dict[int, float], dict[int, Any]]:
    """Seconds and clips (uint8 ``[n, F, H, W, 3]``) by step count; each prompt has its own noise, the same at all.

    As many prompts go together as fit.
    """
    import torch

    from anyflow.backbone.stream import stream_video
    from anyflow.evaluation.measure import prompt_noise, take_of
    from anyflow.system.console import progress_line

    at_once = backbone.clips_at_once(shape)
    groups = [prompts[first : first + at_once] for first in range(0, len(prompts), at_once)]
    chunks = len(backbone.chunks_of(shape[0], 0 if first_frames is None else first_frames.shape[1]))
    seconds, clips = {}, {}
    done, total = 0, len(counts) * len(groups) * chunks
    with progress_line("sampling") as on_progress:
        for count in counts:
            start, videos = time.perf_counter(), []
            for group in groups:
                noise = prompt_noise(shape, group, seed).to(codec.device)
                known = None if first_frames is None else first_frames.expand(len(group), -1, -1, -1, -1)
                take, parts = take_of(way[0], group, seed), []
                for part in stream_video(backbone, codec, group, noise, count, shift, known, take, way[1]):
                    parts.append(part.cpu())
                    done += 1
                    on_progress(done, total, f"steps: {count}, chunk {len(parts)}")
                videos.append(torch.cat(parts, dim=1))
            clips[count] = torch.cat(videos)
            seconds[count] = time.perf_counter() - start
    return seconds, clips


def _write(folder: Path, prompts: list[str], clips: dict[int, Any], fps: float, given: int) -> dict[str, list[str]]:
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
