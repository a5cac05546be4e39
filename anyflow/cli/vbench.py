"""``anyflow vbench``: the videos that the vbench package scores, and its scores at several step counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import Json, Model, print_json
from anyflow.cli.options import with_options
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model
from anyflow.evaluation.options import WayOptions
from anyflow.system.files import require_place, write_atomically
from anyflow.system.locks import NoLocks, locked
from anyflow.system.option import option

if TYPE_CHECKING:
    from torch import Tensor

    from anyflow.evaluation.loaded import LoadedModel
    from anyflow.evaluation.vbench import Asked


@dataclass(frozen=True)
class VBenchOptions:
    """Which videos are made, and whether they are scored."""

    steps: tuple[int, ...] = option((4, 32), "Step counts, each a folder of its own.", low=1, high=1000)
    info: Path | None = option(None, "VBench's prompt list (full_info.json); else the installed package's.")
    images: Path | None = option(None, "VBench-I2V instead: the folder of its cropped images, data/crop/RATIO.")
    dimensions: tuple[str, ...] = option((), "Dimensions, separated by commas; else all.")
    samples: int = option(5, "Videos a prompt; the benchmark's number is 5.", low=1, high=5)
    seed: int = option(0, "Seed of the noise.", low=0)
    batch_size: int = option(4, "Clips a pass, at most: of large ones fewer fit.", low=1)
    score: bool = option(False, "Let the installed vbench package score the videos.")

    @property
    def is_image(self) -> bool:
        """Whether it is the benchmark of image-to-video."""
        return self.images is not None

    @property
    def prompt_list(self) -> Path:
        """The benchmark's list of prompts: the given one, or that of the installed package.

        Raises:
            UserError: none is given, and none is installed.
        """
        from anyflow.evaluation.vbench import installed_prompts

        place = self.info or (None if self.is_image else installed_prompts())
        if place is None:
            needed = "vbench2_i2v_full_info.json of VBench-I2V" if self.is_image else "VBench_full_info.json"
            raise UserError(f"--info is empty and the list is not installed: give {needed} (it comes with VBench)")
        return place

    @property
    def chosen(self) -> list[str]:
        """The dimensions that are asked for."""
        from anyflow.evaluation.vbench import dimensions_of

        return list(self.dimensions or dimensions_of(image=self.is_image))


@with_options
def vbench(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the videos and scores; what is there already is kept.")],
    options: VBenchOptions,
    way: WayOptions,
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
    check_model(model)
    require_place(out, "--out")
    from anyflow.evaluation.models import way_of
    from anyflow.evaluation.vbench import read_prompts

    prompts = read_prompts(options.prompt_list, options.chosen, image=options.is_image)
    _check_images(options.images, prompts)
    if way.control_guidance not in (None, 1):
        raise UserError(f"--control-guidance {way.control_guidance:g}: VBench's prompts have no controls: leave it out")
    way = replace(way, control_guidance=1.0)
    guidance = way_of(model, way.sampler, way.guidance, way.negative, way.control_guidance)[1]
    with _alone(out):
        _settle(out, model, options, way, guidance.told)
        folders = {count: out / f"steps-{count:02d}" / "videos" for count in sorted(options.steps)}
        _sample_missing(model, way, options, prompts, out, folders)
        nfe = _read(out / "settings.json").get("nfe", {})
        found: dict[str, Any] = {
            "model": model,
            "guidance": guidance.scale,
            "nfe": {str(count): nfe[str(count)] for count in folders if str(count) in nfe},
        }
        scores: dict[str, Any] = {}
        if options.score:
            scores = {str(count): _scores_of(folder, options) for count, folder in folders.items()}
            written = {**found, "seed": options.seed, "samples": options.samples, "scores": scores}
            _write(out / "vbench.json", written)
    if as_json:
        print_json({**found, "prompts": len(prompts), "videos": folders, "scores": scores})
    else:
        _show(folders, found["nfe"], scores, guidance.told)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Within the block no other process makes videos in a folder: two at once would write at one place.

    Raises:
        UserError: another one does.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out / ".lock", patience=0, passing=True))
        except BlockingIOError as error:
            raise UserError(f"--out {out} is being filled by another process: wait for it, or name another") from error
        except NoLocks as error:
            typer.echo(f"{error}. It goes on: start no other command with this --out", err=True)
        yield


def _show(folders: Mapping[int, Path], nfe: Mapping[str, int], scores: Mapping[str, Any], guidance: str) -> None:
    for count, folder in folders.items():
        line = ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.get(str(count), {}).items())
        typer.echo(f"{count:>4} steps  {nfe.get(str(count), '?'):>4} calls  {line or folder}")
    if guidance:
        typer.echo(guidance)
    if not scores:
        typer.echo(f"score: anyflow vbench ... --score, or: vbench evaluate --videos_path {folder} --dimension ...")


def _scores_of(videos: Path, options: VBenchOptions) -> dict[str, float]:
    """The scores of one step count's videos, with the totals."""
    import torch

    from anyflow.evaluation.vbench import run_vbench, totals

    found = run_vbench(
        videos,
        options.prompt_list,
        options.chosen,
        videos.parent,
        resolution=None if options.images is None else options.images.name,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return {**found, **totals(found, image=options.is_image)}


def _settle(out: Path, model: str, options: VBenchOptions, way: WayOptions, guidance: str) -> None:
    """Note what the folder's videos are of: they are kept, so another model's must not come among them."""
    from anyflow.evaluation.models import usual_precision
    from anyflow.tracking.fingerprints import model_fingerprint

    precision = way.precision or usual_precision(model)
    told = {"seed": options.seed, "sampler": way.sampler, "images": options.images, "precision": precision}
    now = {"model": model_fingerprint(model), **{key: str(value) for key, value in told.items()}, "guidance": guidance}
    path = out / "settings.json"
    was = _read(path) if path.is_file() else now
    was.setdefault("guidance", "")  # of a folder from before there was any
    changed = [key for key, value in now.items() if was.get(key, value) != value]
    if changed:
        raise UserError(f"--out {out} holds videos of another {' and '.join(changed)}: name another folder")
    _write(path, {**was, **now})


def _check_images(images: Path | None, prompts: Sequence[Asked]) -> None:
    """That every prompt's first frame is there, before anything is sampled."""
    missing = [] if images is None else [asked.image for asked in prompts if not (images / str(asked.image)).is_file()]
    if missing:
        raise UserError(
            f"--images {images} lacks {missing[0]!r} ({len(missing)} of {len(prompts)}): download the suite"
        )


@dataclass(frozen=True)
class _Due:
    """A video that is still to be made."""

    asked: Asked
    index: int
    path: Path


def _sample_missing(
    model: str, way: WayOptions, options: VBenchOptions, prompts: Sequence[Asked], out: Path, folders: dict[int, Path]
) -> None:
    """Make every video that is not there yet, into the folder of its step count."""
    from anyflow.evaluation.vbench import video_name

    due: dict[int, list[_Due]] = {}
    for count, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        every = [(asked, index) for asked in prompts for index in range(options.samples)]
        places = [_Due(asked, index, folder / video_name(asked.prompt, index)) for asked, index in every]
        due[count] = [video for video in places if not video.path.is_file()]
    write_atomically(out / "prompts.txt", "".join(f"{asked.prompt}\n" for asked in prompts))
    if not any(due.values()):
        return
    from anyflow.evaluation.loaded import LoadedModel
    from anyflow.evaluation.models import native_shape
    from anyflow.evaluation.report.picture import write_mp4
    from anyflow.system.console import progress_line

    loaded = LoadedModel.of(model, way, native_shape(model))
    settings = _read(out / "settings.json")
    calls = {str(count): loaded.calls(count, int(options.is_image)) for count in folders}
    _write(out / "settings.json", {**settings, "nfe": {**settings.get("nfe", {}), **calls}})
    partial, done, total = out / ".partial.mp4", 0, sum(map(len, due.values()))
    with progress_line("sampling for vbench") as on_progress:
        for count, part, clips in _sampled(loaded, options, due):
            for video, clip in zip(part, clips, strict=True):
                write_mp4(partial, list(clip.numpy()), loaded.shape.fps or 8.0)
                partial.replace(video.path)
            done += len(part)
            on_progress(done, total, f"{count} steps")


def _sampled(
    loaded: LoadedModel, options: VBenchOptions, due: Mapping[int, Sequence[_Due]]
) -> Iterator[tuple[int, Sequence[_Due], Tensor]]:
    """Step count, videos and their clips uint8 ``[n, F, H, W, 3]``; noise follows seed, prompt and number alone."""
    import torch

    from anyflow.evaluation.loaded import given_pixels

    size = min(options.batch_size, loaded.clips_at_once)
    for count, videos in due.items():
        for start in range(0, len(videos), size):
            part, given = videos[start : start + size], None
            if options.images is not None:
                images = [given_pixels(options.images / str(video.asked.image), 1, loaded.shape) for video in part]
                given = loaded.given_latents(torch.cat(images))
            keys = [f"{video.asked.prompt}-{video.index}" for video in part]
            frames = loaded.parts([video.asked.prompt for video in part], keys, count, options.seed, given)
            yield count, part, torch.cat([frame.cpu() for frame in frames], dim=1)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, document: Any) -> None:
    write_atomically(path, json.dumps(document, indent=1) + "\n")
