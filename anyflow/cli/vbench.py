"""``anyflow vbench``: the videos that the vbench package scores, and its scores at several step counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import (
    BatchSize,
    GuidanceScale,
    Json,
    Model,
    Negative,
    NoiseSeed,
    Precision,
    Sampler,
    check_precision,
    check_sampler,
    parse_names,
    parse_steps,
    print_json,
)
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model
from anyflow.system.files import require_place, write_atomically

if TYPE_CHECKING:
    from anyflow.data.decode import ClipShape
    from anyflow.evaluation.vbench import Asked


def vbench(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the videos and scores; what is there already is kept.")],
    steps: Annotated[str, typer.Option(help="Step counts, each a folder of its own.")] = "4,32",
    info: Annotated[
        Path | None, typer.Option(help="VBench's prompt list (full_info.json); else the installed package's.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="VBench-I2V instead: the folder of its cropped images, data/crop/RATIO.")
    ] = None,
    dimensions: Annotated[str, typer.Option(help="Dimensions, separated by commas; else all.")] = "",
    samples: Annotated[int, typer.Option(help="Videos a prompt; the benchmark's number is 5.", min=1, max=5)] = 5,
    seed: NoiseSeed = 0,
    sampler: Sampler = None,
    guidance: GuidanceScale = None,
    negative: Negative = None,
    batch_size: BatchSize = 4,
    precision: Precision = "",
    score: Annotated[bool, typer.Option("--score", help="Let the installed vbench package score the videos.")] = False,
    as_json: Json = False,
) -> None:
    """Write the videos that VBench or VBench-I2V scores, in its own layout, and merge its scores by step count.

    Interrupt it whenever you like: the same command goes on where it was. Without --score nothing of vbench is needed
    but its prompt list, and the folders can be scored elsewhere.

    \b
    Examples:
      anyflow vbench --model runs/forward-wan --steps 4,32 --out vbench/forward --score
      anyflow vbench --model runs/causal-wan --images crop/16-9 --info vbench2_i2v_full_info.json --out vbench/i2v
      anyflow vbench --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --steps 50 --out vbench/wan
      anyflow vbench --model data/models/tiny --dimensions motion_smoothness --samples 1 --out vbench/tiny
    """
    counts = parse_steps(steps)
    check_model(model)
    check_sampler(sampler)
    check_precision(precision)
    require_place(out, "--out")
    from anyflow.evaluation.vbench import dimensions_of, read_prompts

    place = _prompt_list(info, images)
    chosen = list(parse_names(dimensions)) or list(dimensions_of(image=images is not None))
    prompts = read_prompts(place, chosen, image=images is not None)
    _check_images(images, prompts)
    from anyflow.evaluation.models import usual_precision, way_of

    way = way_of(model, sampler, guidance, negative)
    settings: dict[str, Any] = {"samples": samples, "seed": seed, "sampler": sampler, "images": images}
    settings |= {"batch_size": batch_size, "way": way, "precision": precision or usual_precision(model)}
    _settle(out, model, settings)
    folders = _sample_all(model, prompts, counts, out, settings)
    told: dict[str, Any] = {"model": model, "guidance": way[1].scale, "nfe": _calls(out, counts)}
    scores: dict[str, Any] = {}
    if score:
        scores = _scored(folders, place, chosen, out, images)
        _write_json(out / "vbench.json", {**told, "seed": seed, "samples": samples, "scores": scores})
    if as_json:
        print_json({**told, "prompts": len(prompts), "videos": folders, "scores": scores})
        return
    for count, folder in folders.items():
        line = ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.get(str(count), {}).items())
        typer.echo(f"{count:>4} steps  {told['nfe'].get(str(count), '?'):>4} calls  {line or folder}")
    if way[1].told:
        typer.echo(way[1].told)
    if not score:
        typer.echo(f"score: anyflow vbench ... --score, or: vbench evaluate --videos_path {folder} --dimension ...")


def _prompt_list(info: Path | None, images: Path | None) -> Path:
    """The benchmark's list of prompts: the given one, or that of the installed package."""
    from anyflow.evaluation.vbench import installed_prompts

    place = info or (installed_prompts() if images is None else None)
    if place is None:
        needed = "vbench2_i2v_full_info.json of VBench-I2V" if images is not None else "VBench_full_info.json"
        raise UserError(f"--info is empty and the list is not installed: give {needed} (it comes with VBench)")
    return place


def _scored(
    folders: dict[int, Path], place: Path, dimensions: Sequence[str], out: Path, images: Path | None
) -> dict[str, Any]:
    """The scores of each step count's videos, with the totals."""
    from anyflow.evaluation.vbench import run_vbench, totals

    scores = {}
    for count, folder in folders.items():
        resolution, results = None if images is None else images.name, out / f"steps-{count:02d}"
        found = run_vbench(folder, place, dimensions, results, resolution=resolution, device=_device())
        scores[str(count)] = {**found, **totals(found, image=images is not None)}
    return scores


def _settle(out: Path, model: str, settings: dict[str, Any]) -> None:
    """Note what the folder's videos are of: they are kept, so another model's must not come among them."""
    from anyflow.tracking.fingerprints import model_fingerprint

    told = ("seed", "sampler", "images", "precision")
    now = {"model": model_fingerprint(model), **{key: str(settings[key]) for key in told}}
    now |= {"guidance": settings["way"][1].told}
    path = out / "settings.json"
    was = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now
    was.setdefault("guidance", "")  # of a folder from before there was any
    changed = [key for key, value in now.items() if was.get(key, value) != value]
    if changed:
        raise UserError(f"--out {out} holds videos of another {' and '.join(changed)}: name another folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(path, {**was, **now})


def _calls(out: Path, counts: Sequence[int], found: dict[str, int] | None = None) -> dict[str, int]:
    """Network calls of a video by step count, of those that were ever sampled here; ``found`` is noted for later."""
    path = out / "settings.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    known: dict[str, int] = {**settings.get("nfe", {}), **(found or {})}
    if found:
        _write_json(path, {**settings, "nfe": known})
    return {str(count): known[str(count)] for count in counts if str(count) in known}


def _check_images(images: Path | None, prompts: Sequence[Asked]) -> None:
    """That every prompt's first frame is there, before anything is sampled."""
    missing = [] if images is None else [asked.image for asked in prompts if not (images / str(asked.image)).is_file()]
    if missing:
        raise UserError(
            f"--images {images} lacks {missing[0]!r} ({len(missing)} of {len(prompts)}): download the suite"
        )


def _sample_all(
    model: str, prompts: Sequence[Asked], counts: Sequence[int], out: Path, settings: dict[str, Any]
) -> dict[int, Path]:
    """Every video that is not there yet; the folders by step count."""
    from anyflow.evaluation.models import load_model, native_shape
    from anyflow.evaluation.report.picture import write_mp4
    from anyflow.evaluation.vbench import video_name
    from anyflow.system.console import progress_line

    folders = {count: out / f"steps-{count:02d}" / "videos" for count in counts}
    wanted = [(asked, index) for asked in prompts for index in range(settings["samples"])]
    due = [
        (count, asked, index)
        for count in counts
        for asked, index in wanted
        if not (folders[count] / video_name(asked.prompt, index)).is_file()
    ]
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "prompts.txt", "".join(f"{asked.prompt}\n" for asked in prompts))
    if not due:
        return folders
    shape = native_shape(model)
    codec, backbone, shift = load_model(model, settings["precision"])
    latents = codec.latent_shape(shape.frames, shape.height, shape.width)
    given, per_call = int(settings["images"] is not None), settings["way"][1].calls
    _calls(out, counts, {str(count): per_call * backbone.calls_of(count, latents[0], given) for count in counts})
    size, partial = min(settings["batch_size"], backbone.clips_at_once(latents)), out / ".partial.mp4"
    done = 0
    with progress_line("sampling for vbench") as on_progress:
        for count in counts:
            of_count = [(asked, index) for steps, asked, index in due if steps == count]
            for start in range(0, len(of_count), size):
                part = of_count[start : start + size]
                clips = _sample(codec, backbone, shape, part, count, shift, settings)
                for (asked, index), clip in zip(part, clips, strict=True):
                    write_mp4(partial, list(clip), shape.fps or 8.0)
                    partial.replace(folders[count] / video_name(asked.prompt, index))
                done += len(part)
                on_progress(done, len(due), f"{count} steps")
    return folders


def _sample(
    codec: Any,
    backbone: Any,
    shape: ClipShape,
    part: Sequence[tuple[Asked, int]],
    num_steps: int,
    shift: float,
    settings: dict[str, Any],
) -> Any:
    """Clips uint8 ``[n, F, H, W, 3]``; each video's noise follows seed, prompt and number alone."""
    import torch

    from anyflow.backbone.conditions import Conditions
    from anyflow.cli.sample import given_pixels
    from anyflow.evaluation.measure import prompt_noise, take_of

    keys, first_frames = [f"{asked.prompt}-{index}" for asked, index in part], None
    latent_shape = codec.latent_shape(shape.frames, shape.height, shape.width)
    noise = prompt_noise(latent_shape, keys, settings["seed"]).to(codec.device)
    if settings["images"] is not None:
        frames = [given_pixels(settings["images"] / asked.image, 1, shape) for asked, _ in part]
        first_frames = codec.encode_video(torch.cat([frame for frame in frames if frame is not None]).to(codec.device))
    kind, guidance = settings["way"]
    conditions = Conditions(codec.encode_text([asked.prompt for asked, _ in part]), first_frames)
    take = take_of(kind, keys, settings["seed"])
    guided = guidance.way(backbone, codec)
    return codec.decode(backbone.sample(conditions, noise, num_steps, shift, take, **guided)).cpu().numpy()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _write_json(path: Path, document: Any) -> None:
    write_atomically(path, json.dumps(document, indent=1) + "\n")
