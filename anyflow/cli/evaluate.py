"""``anyflow evaluate``: the any-step curve of a model, alone or against another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import (
    BatchSize,
    GuidanceScale,
    Json,
    Model,
    Negative,
    Precision,
    Sampler,
    check_precision,
    check_sampler,
    fresh_folder,
    parse_seeds,
    parse_steps,
    print_json,
    whole_folder,
)
from anyflow.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError
from anyflow.evaluation.models import check_model
from anyflow.system.places import find_shipped
from anyflow.system.ranks import end_with_watcher, needs_watcher, watch
from anyflow.system.signals import Terminated, sigterm_raises

if TYPE_CHECKING:
    from anyflow.backbone.guidance import Guidance
    from anyflow.evaluation.curve import CurveResult
    from anyflow.evaluation.heldout import Prompts
    from anyflow.evaluation.kept_samples import KeptSamples
    from anyflow.evaluation.measurement import Measurement

SAMPLES = Path("runs/evaluations/.samples")
"""Where what is sampled lies until all of it is measured."""

AGAIN = "what was sampled is kept, and the same command goes on with it"


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="A dataset card: a name in data/, or a path.")],
    against: Annotated[
        str | None,
        typer.Option(
            help="A second model on the same prompts and noise: before.", parser=find_shipped, metavar="MODEL"
        ),
    ] = None,
    steps: Annotated[str, typer.Option(help="Step counts.")] = "1,2,4,8,16,32",
    prompts: Annotated[int, typer.Option(help="Prompts, from the card's split.", min=1)] = 16,
    split: Annotated[str, typer.Option(help="Split that prompts and real clips come from.")] = "heldout",
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Seeds of the noise; one alone is quicker, and has no intervals.")
    ] = "0,1,2",
    sampler: Sampler = None,
    guidance: GuidanceScale = None,
    negative: Negative = None,
    given_frames: Annotated[
        int, typer.Option(help="Latent frames given from each prompt's own clip: 1 is image-to-video.", min=0)
    ] = 0,
    batch_size: BatchSize = 8,
    probe: Annotated[
        bool, typer.Option("--probe", help="Judge labels (task, scene ...) and features by the data set's own probe.")
    ] = False,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="Distances by probe, efficientnet-lite, I3D weights, or an encoder's folder."),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="GPUs that prompts are dealt out to; else all of the machine.", min=1)
    ] = None,
    precision: Precision = "",
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
      anyflow evaluate --model runs/tiny-forward-001 --against runs/tiny-teacher-001 --data games --guidance 2
    \b
    --guidance is of networks that have none in their weights; of two models it guides such a one alone.
    Broken off, the same command goes on: samples are kept until all of them are measured.
    """
    counts, chosen = parse_steps(steps), parse_seeds(seeds)
    check_sampler(sampler)
    check_precision(precision)
    folder = fresh_folder(out, f"runs/evaluations/{Path(data).stem}")
    judges = list(dict.fromkeys([*(["probe"] * probe), *(encoder or [])]))
    _check_clips(model, against, data, split, prompts)
    _check_shapes(model, against, given_frames, judges, split)
    if needs_watcher(count := _devices(devices, prompts)):
        raise typer.Exit(watch(count, 1, AGAIN))
    end_with_watcher()
    from anyflow.evaluation.heldout import Prompts
    from anyflow.evaluation.kept_samples import KeptSamples
    from anyflow.evaluation.measurement import Measurement
    from anyflow.evaluation.models import native_shape
    from anyflow.evaluation.report.folder import write_report

    asked = Measurement(steps=counts, seeds=chosen, given_frames=given_frames, batch_size=batch_size)
    clips = Prompts([data], native_shape(model), prompts, split)
    models = [name for name in (model, against) if name]
    ways = _ways(models, sampler, guidance, negative)
    kept = KeptSamples(SAMPLES)
    with _goes_on():
        before, after = _measured(models, ways, precision, judges, clips, asked, kept)
    if after is not None:
        with whole_folder(folder) as partial:
            title, about = f"{model}, held-out prompts of {data}", _about(model, data, split)
            write_report(partial, before=before, after=after, title=title, about=about)
        kept.clear()
        curves = [result.curve.to_json() for result in (before, after) if result is not None]
        told = {"model": model, "against": against, "data": data, "curves": curves, "folder": folder}
        print_json(told) if as_json else _show(folder)


@contextmanager
def _goes_on() -> Iterator[None]:
    """Say, when a signal ends it, that nothing is lost."""
    try:
        with sigterm_raises(Terminated):
            yield
    except (KeyboardInterrupt, Terminated) as stop:
        typer.echo(f"\nStopped: {AGAIN}", err=True)
        raise typer.Exit(EXIT_PREEMPTED if isinstance(stop, Terminated) else EXIT_INTERRUPTED) from None


def _show(folder: Path) -> None:
    """Print the table, and tell where everything is."""
    table = folder / "table.txt"
    if table.is_file():
        typer.echo(table.read_text(encoding="utf-8").rstrip())
    typer.echo(f"\npicture, film, plot and numbers: {folder}")


def _about(model: str, data: str, split: str) -> dict[str, str]:
    """What ``anyflow compare`` tells apart."""
    from anyflow.tracking.fingerprints import data_fingerprint, model_fingerprint
    from anyflow.tracking.mlflow import code_version

    found = {"model": model, "model (fingerprint)": model_fingerprint(model), "data": Path(data).stem, "split": split}
    return {**found, "data (fingerprint)": data_fingerprint(data, split), **code_version()}


def _check_clips(model: str, against: str | None, data: str, split: str, prompts: int) -> None:
    """Models and data set are there, and there are clips enough."""
    from anyflow.data.find import find_card

    find_card(data, "--data ")
    check_model(model)
    if against:
        check_model(against, "--against")
    from anyflow.evaluation.heldout import check_held_out

    check_held_out([data], split, prompts, "--prompts")


def _check_shapes(model: str, against: str | None, given_frames: int, judges: list[str], split: str) -> None:
    """Two models make clips of one size, something is left to be made behind the given frames, encoders can see it."""
    from anyflow.evaluation.curve import check_given, pixel_frames
    from anyflow.evaluation.encoders import check_encoders
    from anyflow.evaluation.models import native_shape

    shape = native_shape(model)
    check_given(given_frames, shape.frames, "--given-frames ")
    check_encoders(judges, "--encoder", shape.frames - pixel_frames(given_frames), split)
    other = native_shape(against) if against else shape
    if other != shape:
        sizes = [
            f"{one.frames} frames of {one.width}x{one.height}, {one.fps or 0:g} a second" for one in (other, shape)
        ]
        raise UserError(f"--against {against} makes {sizes[0]}, --model {sizes[1]}: they do not compare")


def _devices(wanted: int | None, prompts: int) -> int:
    """Devices that prompts are dealt out to: all GPUs, or the CPU once."""
    from anyflow.training.encoding import devices_here

    kind, here = devices_here()
    if kind == "gpu" and wanted is not None and wanted > here:
        raise UserError(f"--devices {wanted}: this machine has {here} GPU{'s' * (here > 1)}: ask for fewer")
    return min(wanted or here, prompts)


def _measured(
    models: list[str],
    ways: dict[str, tuple[Any, Guidance]],
    precision: str,
    judges: list[str],
    prompts: Prompts,
    asked: Measurement,
    kept: KeptSamples,
) -> tuple[CurveResult | None, CurveResult | None]:
    """The curves before (if there is one to compare with) and after; None for both on all ranks but the first."""
    from anyflow.backbone.parallelize import join_ranks, leave_ranks, rank_and_size
    from anyflow.evaluation.further_judges import judges_of
    from anyflow.evaluation.report.tables import check_comparable
    from anyflow.system.console import progress_line

    device = join_ranks("auto")
    is_first = rank_and_size()[0] == 0
    with progress_line("training the probe") as on_progress:
        asked = replace(asked, judges=judges_of(judges, "--encoder", prompts, device=device, on_progress=on_progress))
    model, *others = models
    before = None
    for against in others:
        before = _curve(against, "before", ways[against], precision, prompts, asked, kept)
    after = _curve(model, "after" if others else "model", ways[model], precision, prompts, asked, kept)
    leave_ranks()
    try:
        check_comparable(before.curve if before else None, after.curve)
    except ValueError as error:
        raise UserError(f"--against {others[0]} and --model {model}: {error}") from None
    return (before, after) if is_first else (None, None)


def _ways(
    models: list[str], sampler: str | None, guidance: float | None, negative: str | None
) -> dict[str, tuple[Any, Guidance]]:
    """How each model is sampled. Where some have guidance in their weights and some not, the options guide the latter.

    A teacher is compared with what was made of it: that the latter is guided by itself is no reason to guide it twice.
    """
    from anyflow.evaluation.models import has_guidance, way_of

    fused = {model: has_guidance(model) for model in models}
    left_alone = {model for model in models if fused[model] and not all(fused.values())}
    own = {model: (None, None) if model in left_alone else (guidance, negative) for model in models}
    return {model: way_of(model, sampler, *own[model]) for model in models}


def _curve(
    model: str,
    label: str,
    way: tuple[Any, Guidance],
    precision: str,
    prompts: Prompts,
    asked: Measurement,
    kept: KeptSamples,
) -> CurveResult:
    """A model's curve."""
    from anyflow.evaluation.heldout import curve_of
    from anyflow.evaluation.models import load_model
    from anyflow.system.console import progress_line
    from anyflow.tracking.fingerprints import model_fingerprint
    from anyflow.tracking.mlflow import code_version

    codec, backbone, shift = load_model(model, precision)
    computed = f"on {codec.device.type} in {str(backbone.dtype).removeprefix('torch.')}"
    made_by = f"{model_fingerprint(model)} {computed}, {prompts.shape}, {sorted(code_version().items())}"
    asked = replace(asked, label=label, shift=shift, sampler=way[0], guidance=way[1])
    with progress_line(f"sampling {label}") as on_progress:
        return curve_of(
            backbone,
            codec,
            prompts,
            asked,
            device=codec.device,
            kept=kept.of(made_by),
            divide=True,
            on_progress=on_progress,
        )
