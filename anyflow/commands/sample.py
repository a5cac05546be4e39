"""``anyflow sample``: clips of a prompt, from preview to quality."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from anyflow.commands.common import Json, check_model, fresh_folder, parse_steps, print_json, whole_folder
from anyflow.errors import UserError


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What the clips show, one text a prompt.")],
    model: Annotated[str, typer.Option(help="A model folder, a run's folder, or a hub id.")] = "data/models/tiny",
    steps: Annotated[str, typer.Option(help="Step counts, each from the same noise.")] = "1,4,16",
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    frames: Annotated[int | None, typer.Option(help="Frames (4n+1); else as trained.", min=1)] = None,
    height: Annotated[int | None, typer.Option(help="Pixel rows (multiple of 16); else as trained.", min=16)] = None,
    width: Annotated[int | None, typer.Option(help="Pixel columns (multiple of 16); else as trained.", min=16)] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the mp4; else as trained.", min=0.1)] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder; without it one under runs/samples.")] = None,
    as_json: Json = False,
) -> None:
    """Sample prompts at several step counts, side by side: few steps are a preview of many.

    \b
    Examples:
      anyflow sample "A green car drives slowly and changes left from the middle lane to the left lane."
      anyflow sample "The robot arm opens a drawer." "It closes it." --model runs/finetune-robotics-tiny-001
      anyflow sample "..." --model nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers --steps 4 --out samples --json
    """
    counts = parse_steps(steps)
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("PROMPT is empty: say what the clip shows")
    folder = fresh_folder(out, "runs/samples/sample")
    check_model(model)
    from anyflow.commands.models import load_model, native_shape

    shape = native_shape(model, frames=frames, height=height, width=width, fps=fps)
    codec, backbone, shift = load_model(model)
    latent_shape = codec.latent_shape(shape.frames, shape.height, shape.width)
    seconds, clips = _sample_all(codec, backbone, prompts, latent_shape, counts, shift, seed)
    with whole_folder(folder) as partial:
        names = _write(partial, prompts, clips, shape.fps or 8.0)
    files = {kind: [folder / name for name in found] for kind, found in names.items()}
    if as_json:
        print_json({"model": model, "prompts": prompts, "seed": seed, "seconds": seconds, "files": files})
        return
    for count in counts:
        typer.echo(f"{count:>4} steps  {seconds[count]:6.1f} s  {', '.join(map(str, files[str(count)]))}")
    typer.echo(f"side by side: {' and '.join(map(str, files['all']))}")


def _sample_all(
    codec: Any, backbone: Any, prompts: list[str], shape: tuple[int, ...], counts: list[int], shift: float, seed: int
) -> tuple[dict[int, float], dict[int, Any]]:
    """Seconds and clips (uint8 ``[n, F, H, W, 3]``) by step count; each prompt has its own noise, the same at all."""
    import torch

    from anyflow.evaluation.curve import bind_text, prompt_noise
    from anyflow.flowmap.sampling import sample as run_sampler

    velocity = bind_text(backbone, codec)(prompts)
    noise = prompt_noise(shape, prompts, seed).to(codec.device)
    seconds, clips = {}, {}
    for count in counts:
        start = time.perf_counter()
        with torch.no_grad():
            latents = run_sampler(velocity, noise, count, shift)
            clips[count] = codec.decode(latents).cpu()
        seconds[count] = time.perf_counter() - start
    return seconds, clips


def _write(folder: Path, prompts: list[str], clips: dict[int, Any], fps: float) -> dict[str, list[str]]:
    """One mp4 a prompt and step count, and ``all`` of them in one picture and one film; the names of the files."""
    from anyflow.evaluation.picture import Grid, Prompt, save_mp4, save_png, strips, write_mp4

    names: dict[str, list[str]] = {}
    for count, batch in clips.items():
        names[str(count)] = [f"prompt-{i + 1}-steps-{count:02d}.mp4" for i in range(len(prompts))]
        for name, clip in zip(names[str(count)], batch, strict=True):
            write_mp4(folder / name, list(clip.numpy()), fps)
    rows, samples = [Prompt(prompt) for prompt in prompts], {count: batch.numpy() for count, batch in clips.items()}
    names["all"] = ["samples.png", "samples.mp4"]
    save_png(strips(rows, samples, fps=fps), folder / "samples.png")
    save_mp4(Grid(rows, {"": samples}), folder / "samples.mp4", fps=fps)
    return names
