"""``anyflow evaluate``: the any-step curve of a model, alone or against another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.commands.common import (
    SAMPLERS,
    Json,
    check_model,
    check_sampler,
    fresh_folder,
    parse_seeds,
    parse_steps,
    print_json,
    whole_folder,
)
from anyflow.errors import UserError

if TYPE_CHECKING:
    from anyflow.evaluation.curve import CurveResult


def evaluate(
    model: Annotated[str, typer.Option(help="A model folder, a run's folder, or a hub id.")],
    data: Annotated[str, typer.Option(help="A dataset card: a name in data/, or a path.")],
    against: Annotated[str | None, typer.Option(help="A second model on the same prompts and noise: before.")] = None,
    steps: Annotated[str, typer.Option(help="Step counts.")] = "1,2,4,8,16,32",
    prompts: Annotated[int, typer.Option(help="Prompts, from the card's split.", min=1)] = 16,
    split: Annotated[str, typer.Option(help="Split that prompts and real clips come from.")] = "heldout",
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Seeds of the noise; one alone is quicker, and has no intervals.")
    ] = "0,1,2",
    sampler: Annotated[
        str | None, typer.Option(help=f"How jumps are taken, {' | '.join(SAMPLERS)}; else as the model says.")
    ] = None,
    given_frames: Annotated[
        int, typer.Option(help="Latent frames given from each prompt's own clip: 1 is image-to-video.", min=0)
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Clips a pass.", min=1)] = 8,
    probe: Annotated[
        bool, typer.Option("--probe", help="Judge labels (task, scene ...) and features by the data set's own probe.")
    ] = False,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="Distances by probe, efficientnet-lite, I3D weights, or an encoder's folder."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder; without it one under runs/evaluations.")] = None,
    as_json: Json = False,
) -> None:
    """Measure quality against the number of steps: distance to real clips, and whether the motion asked for is there.

    \b
    Examples:
      anyflow evaluate --model data/models/tiny --data driving
      anyflow evaluate --model runs/finetune-driving-tiny-001 --against data/models/tiny --data driving --prompts 32
      anyflow evaluate --model data/models/tiny --data driving --seeds 0 --steps 1,4
      anyflow evaluate --model data/models/tiny --data driving --given-frames 1
      anyflow evaluate --model data/models/tiny --data robotics --probe --encoder efficientnet-lite
      anyflow evaluate --model runs/tiny-forward --data games --steps 1,4,16 --out curves/games --json
    """
    counts = parse_steps(steps)
    check_sampler(sampler)
    folder = fresh_folder(out, f"runs/evaluations/{Path(data).stem}")
    judges = list(dict.fromkeys([*(["probe"] * probe), *(encoder or [])]))
    _check_clips(model, against, data, split, prompts)
    _check_shapes(model, against, given_frames, judges, split)
    from anyflow.evaluation.report import write_report
    from anyflow.evaluation.tables import check_comparable

    settings: dict[str, Any] = {
        "steps": counts,
        "prompts": prompts,
        "split": split,
        "seeds": parse_seeds(seeds),
        "given_frames": given_frames,
        "batch_size": batch_size,
    }
    settings["judging"], settings["notes"] = _judges(model, data, split, judges)
    before = _curve(against, data, "before", sampler, settings) if against else None
    after = _curve(model, data, "after" if against else "model", sampler, settings)
    try:
        check_comparable(before.curve if before else None, after.curve)
    except ValueError as error:
        raise UserError(f"--against {against} and --model {model}: {error}") from None
    with whole_folder(folder) as partial:
        title, about = f"{model}, held-out prompts of {data}", _about(model, data, split)
        write_report(partial, before=before, after=after, title=title, about=about)
    if as_json:
        curves = [result.curve.to_json() for result in (before, after) if result is not None]
        print_json({"model": model, "against": against, "data": data, "curves": curves, "folder": folder})
        return
    table = folder / "table.txt"
    if table.is_file():
        typer.echo(table.read_text(encoding="utf-8").rstrip())
    typer.echo(f"\npicture, film, plot and numbers: {folder}")


def _about(model: str, data: str, split: str) -> dict[str, str]:
    """What ``anyflow compare`` tells apart."""
    from anyflow.fingerprints import data_fingerprint, model_fingerprint
    from anyflow.tracking import code_version

    found = {"model": model, "model (fingerprint)": model_fingerprint(model), "data": Path(data).stem, "split": split}
    return {**found, "data (fingerprint)": data_fingerprint(data, split), **code_version()}


def _check_clips(model: str, against: str | None, data: str, split: str, prompts: int) -> None:
    """Models and data set are there, and there are clips enough."""
    from anyflow.recipe import find_card

    find_card(data, "--data ")
    check_model(model)
    if against:
        check_model(against, "--against")
    from anyflow.curves import check_held_out

    check_held_out([data], split, prompts, "--prompts")


def _check_shapes(model: str, against: str | None, given_frames: int, judges: list[str], split: str) -> None:
    """Two models make clips of one size, something is left to be made behind the given frames, encoders can see it."""
    from anyflow.commands.models import native_shape
    from anyflow.evaluation.curve import pixel_frames
    from anyflow.evaluation.encoders import check_encoders

    shape = native_shape(model, frames=None, height=None, width=None, fps=None)
    if pixel_frames(given_frames) >= shape.frames:
        raise UserError(
            f"--given-frames {given_frames} are {pixel_frames(given_frames)} frames, and clips have {shape.frames}: "
            "give fewer, so that something is left to be made"
        )
    seen = [name for name in (split,) if name == "train"]
    check_encoders(judges, "--encoder", shape.frames - pixel_frames(given_frames), seen)
    other = native_shape(against, frames=None, height=None, width=None, fps=None) if against else shape
    if other != shape:
        sizes = [
            f"{one.frames} frames of {one.width}x{one.height}, {one.fps or 0:g} a second" for one in (other, shape)
        ]
        raise UserError(f"--against {against} makes {sizes[0]}, --model {sizes[1]}: they do not compare")


def _judges(model: str, data: str, split: str, judges: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Further judges of the samples, and what is to be said of them."""
    import torch

    from anyflow.commands.models import native_shape
    from anyflow.console import progress_line
    from anyflow.probes import judges_of

    shape = native_shape(model, frames=None, height=None, width=None, fps=None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with progress_line("training the probe") as on_progress:
        return judges_of(judges, "--encoder", [data], shape, heldout=split, device=device, on_progress=on_progress)


def _curve(model: str, data: str, label: str, sampler: str | None, settings: dict[str, Any]) -> CurveResult:
    from anyflow.backbone.load import read_sampler
    from anyflow.commands.models import load_model, native_shape
    from anyflow.console import progress_line
    from anyflow.curves import curve_of

    shape = native_shape(model, frames=None, height=None, width=None, fps=None)
    codec, backbone, shift = load_model(model)
    with progress_line(f"sampling {label}") as on_progress:
        return curve_of(
            backbone,
            codec,
            [data],
            shape,
            shift=shift,
            label=label,
            sampler=sampler or read_sampler(model),  # type: ignore[arg-type]
            on_progress=on_progress,
            **settings,
        )
