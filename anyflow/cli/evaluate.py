"""``anyflow evaluate``: the any-step curve of a model, alone or against another."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli.common import Json, Model, fresh_folder, goes_on, print_json, whole_folder
from anyflow.cli.options import with_options
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model
from anyflow.evaluation.options import WayOptions
from anyflow.system.engine_options import EngineOptions, engine_of
from anyflow.system.imports import quick_imports
from anyflow.system.option import option
from anyflow.system.ranks import end_with_watcher, needs_watcher, watch

if TYPE_CHECKING:
    from anyflow.backbone.guidance import Guidance
    from anyflow.evaluation.curve import CurveResult
    from anyflow.evaluation.heldout import Prompts
    from anyflow.evaluation.kept_samples import KeptSamples
    from anyflow.evaluation.measurement import Judges, Measurement
    from anyflow.system.engines import Engine

SAMPLES = Path("runs/evaluations/.samples")
"""Where what is sampled lies until all of it is measured."""

AGAIN = "what was sampled is kept, and the same command goes on with it"


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured."""

    data: str = option(MISSING, "A dataset card: a name in data/, or a path.")
    against: str | None = option(None, "A second model on the same prompts and noise: before.", is_path=True)
    steps: tuple[int, ...] = option((1, 2, 4, 8, 16, 32), "Step counts.", low=1, high=1000)
    prompts: int = option(16, "Prompts, from the card's split.", low=1)
    split: str = option("heldout", "Split that prompts and real clips come from.")
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "Seeds of the noise; one alone is quicker, and has no intervals.", flags=("--seed",)
    )
    given_frames: int = option(0, "Latent frames given from each prompt's own clip: 1 is image-to-video.", low=0)
    batch_size: int = option(8, "Clips a pass, at most: of large ones fewer fit.", low=1)
    probe: bool = option(False, "Judge labels (task, scene ...) and features by the data set's own probe.")
    encoder: list[str] | None = option(
        None, "controls (reads them back); distances by probe, efficientnet-lite, I3D weights, or an encoder's folder."
    )
    devices: int | None = option(None, "GPUs that prompts are dealt out to; else all of the machine.", low=1)

    def models(self, model: str) -> list[str]:
        """The model, and the one that it is compared with."""
        return [model, self.against] if self.against else [model]

    @property
    def judges(self) -> list[str]:
        """The further judges that are asked for."""
        return list(dict.fromkeys([*(["probe"] * self.probe), *(self.encoder or [])]))


@with_options
def evaluate(
    model: Model,
    options: EvaluateOptions,
    way: WayOptions,
    engine: EngineOptions,
    out: Annotated[Path | None, typer.Option(help="A new folder; without it one under runs/evaluations.")] = None,
    as_json: Json = False,
) -> None:
    """Measure quality against the number of steps: distance to real clips, and whether the motion asked for is there.

    \b
    Examples:
      anyflow evaluate --model data/models/tiny --data driving
      anyflow evaluate --model runs/finetune-driving-tiny-open-001 --against data/models/tiny-open --data driving-rush
      anyflow evaluate --model data/models/tiny --data driving --seeds 0 --steps 1,4
      anyflow evaluate --model data/models/tiny --data driving --given-frames 1
      anyflow evaluate --model data/models/tiny --data robotics --probe --encoder efficientnet-lite
      anyflow evaluate --model runs/tiny-forward --data games --steps 1,4,16 --out curves/games --json
      anyflow evaluate --model runs/wan-forward --data /shared/drives/card.yaml --prompts 256 --engine ray
      anyflow evaluate --model runs/tiny-forward-001 --against runs/tiny-teacher-001 --data games --guidance 2
    \b
    --guidance is of networks that have none in their weights; of two models it guides such a one alone.
    --control-guidance is of networks that are told controls.
    Broken off, the same command goes on: samples are kept until all of them are measured.
    """
    folder = fresh_folder(out, f"runs/evaluations/{Path(options.data).stem}")
    _check_clips(model, options)
    _check_shapes(model, options)
    engine.check(options.devices)
    if not engine.is_ray and needs_watcher(count := _devices(options)):
        raise typer.Exit(watch(count, 1, AGAIN))
    end_with_watcher()
    from anyflow.evaluation.kept_samples import KeptSamples

    kept = KeptSamples(SAMPLES)
    with goes_on(AGAIN):
        cluster = engine_of(engine, 0) if engine.is_ray else None
        before, after = _measured(model, options, way, kept, cluster)
    if after is not None:
        _report(folder, model, options, before, after)
        kept.clear()
        curves = [result.curve.to_json() for result in (before, after) if result is not None]
        found = {"model": model, "against": options.against, "data": options.data, "curves": curves, "folder": folder}
        print_json(found) if as_json else _show(folder)


def _show(folder: Path) -> None:
    """Print the table, and where everything is."""
    table = folder / "table.txt"
    if table.is_file():
        typer.echo(table.read_text(encoding="utf-8").rstrip())
    typer.echo(f"\npicture, film, plot and numbers: {folder}")


def _report(folder: Path, model: str, options: EvaluateOptions, before: CurveResult | None, after: CurveResult) -> None:
    """Leave the report in its folder, whole or not at all, with what ``anyflow compare`` tells apart."""
    from anyflow.evaluation.report.folder import write_report
    from anyflow.tracking.fingerprints import data_fingerprint, model_fingerprint
    from anyflow.tracking.mlflow import code_version

    data, split = options.data, options.split
    about = {"model": model, "model (fingerprint)": model_fingerprint(model), "data": Path(data).stem, "split": split}
    about |= {"data (fingerprint)": data_fingerprint(data, split), **code_version()}
    with whole_folder(folder) as partial:
        write_report(partial, before=before, after=after, title=f"{model}, held-out prompts of {data}", about=about)


def _check_clips(model: str, options: EvaluateOptions) -> None:
    """Models and data set are there, and there are clips enough."""
    from anyflow.data.find import find_card

    find_card(options.data, "--data ")
    check_model(model)
    if options.against:
        check_model(options.against, "--against")
    from anyflow.evaluation.heldout import check_held_out

    check_held_out([options.data], options.split, options.prompts, "--prompts")


def _check_shapes(model: str, options: EvaluateOptions) -> None:
    """Two models make clips of one size, something is left to be made behind the given frames, encoders can see it."""
    from anyflow.evaluation.curve import check_given, pixel_frames
    from anyflow.evaluation.encoders import check_encoders
    from anyflow.evaluation.models import native_shape

    shape, against = native_shape(model), options.against
    check_given(options.given_frames, shape.frames, "--given-frames ")
    check_encoders(options.judges, "--encoder", shape.frames - pixel_frames(options.given_frames), options.split)
    other = native_shape(against) if against else shape
    own_rate = None in (shape.fps, other.fps)  # of one of them: each clip's own, which a cut to a rate would change
    if replace(other, fps=shape.fps if own_rate else other.fps) != shape:
        sizes = [
            f"{one.frames} frames of {one.width}x{one.height}, {one.fps or 0:g} a second" for one in (other, shape)
        ]
        raise UserError(f"--against {against} makes {sizes[0]}, --model {sizes[1]}: they do not compare")


def _devices(options: EvaluateOptions) -> int:
    """Devices that prompts are dealt out to: all GPUs, or the CPU once."""
    from anyflow.training.encoding import devices_here

    (kind, here), wanted = devices_here(), options.devices
    if kind == "gpu" and wanted is not None and wanted > here:
        raise UserError(f"--devices {wanted}: this machine has {here} GPU{'s' * (here > 1)}: ask for fewer")
    return min(wanted or here, options.prompts)


def _measured(
    model: str, options: EvaluateOptions, way: WayOptions, kept: KeptSamples, cluster: Engine | None
) -> tuple[CurveResult | None, CurveResult | None]:
    """The curves before (if there is one to compare with) and after; None for both on all ranks but the first."""
    with quick_imports():
        from anyflow.backbone.parallelize import join_ranks, leave_ranks, rank_and_size
        from anyflow.evaluation.heldout import Prompts
        from anyflow.evaluation.measurement import Measurement
        from anyflow.evaluation.models import native_shape
        from anyflow.evaluation.report.tables import check_comparable

    models = options.models(model)
    ways = _ways(models, way)
    prompts = Prompts([options.data], native_shape(model), options.prompts, options.split)
    device = join_ranks("auto")
    judges = _judges(models, options, prompts, device)
    asked = Measurement(
        steps=sorted(options.steps),
        seeds=options.seeds,
        given_frames=options.given_frames,
        batch_size=options.batch_size,
    )
    curves = {}
    labels = ["before", "after"] if options.against else ["model"]  # what it is compared with comes first
    for label, name in zip(labels, reversed(models), strict=True):
        sampler, guidance = ways[name]
        own = replace(asked, label=label, sampler=sampler, guidance=guidance, judges=judges[name])
        curves[label] = _curve(name, way.precision, prompts, own, kept, cluster)
    is_first = rank_and_size()[0] == 0
    leave_ranks()
    before, after = curves.get("before"), curves[labels[-1]]
    try:
        check_comparable(before.curve if before else None, after.curve)
    except ValueError as error:
        raise UserError(f"--against {options.against} and --model {model}: {error}") from None
    return (before, after) if is_first else (None, None)


def _judges(models: list[str], options: EvaluateOptions, prompts: Prompts, device: Any) -> dict[str, Judges]:
    """Each model's judges: controls are read back as it is told them; of one that is told none, none are."""
    from anyflow.backbone.load import read_controls
    from anyflow.evaluation.encoders import CONTROLS
    from anyflow.evaluation.further_judges import judges_of
    from anyflow.system.console import progress_line

    told = {name: read_controls(name) if CONTROLS in options.judges else None for name in models}
    usual = next(filter(None, told.values()), None)
    found: dict[str, Judges] = {}
    for name in models:
        own = told[name] or usual
        same = next((other for other in found if (told[other] or usual) == own), None)
        if same is not None:
            found[name] = found[same]
            continue
        with progress_line("training the probe") as show:
            found[name] = judges_of(options.judges, "--encoder", prompts, controls=own, device=device, on_progress=show)
    if len({id(judges) for judges in found.values()}) > 1:
        apart = "the models are told different controls: what is read back of them does not compare"
        found = {name: replace(judges, notes=[*judges.notes, apart]) for name, judges in found.items()}
    return found


def _ways(models: list[str], way: WayOptions) -> dict[str, tuple[Any, Guidance]]:
    """How each model is sampled. Where some have guidance in their weights and some not, the options guide the latter.

    A teacher is compared with what was made of it: that the latter is guided by itself is no reason to guide it twice.
    Likewise controls guide the model that is told some, where the other one is told none.
    """
    from anyflow.backbone.load import read_controls
    from anyflow.evaluation.models import has_guidance, way_of

    fused = {model: has_guidance(model) for model in models}
    left_alone = {model for model in models if fused[model] and not all(fused.values())}
    own = {model: (None, None) if model in left_alone else (way.guidance, way.negative) for model in models}
    told = [model for model in models if read_controls(model) is not None] or models
    control = {model: way.control_guidance if model in told else None for model in models}
    return {model: way_of(model, way.sampler, *own[model], control[model]) for model in models}


def _curve(
    model: str, precision: str, prompts: Prompts, asked: Measurement, kept: KeptSamples, cluster: Engine | None
) -> CurveResult:
    """A model's curve."""
    from anyflow.evaluation.handed_out import curve_by_engine
    from anyflow.evaluation.heldout import curve_of
    from anyflow.evaluation.models import load_model
    from anyflow.system.console import progress_line
    from anyflow.tracking.fingerprints import model_fingerprint
    from anyflow.tracking.mlflow import code_version

    made_by = f"{model_fingerprint(model)}, {prompts.shape}, {sorted(code_version().items())}"
    if cluster is not None:
        with progress_line(f"sampling {asked.label}") as show:
            return curve_by_engine(cluster, model, precision, prompts, asked, kept, made_by, show)
    codec, backbone, shift = load_model(model, precision)
    computed = f"on {codec.device.type} in {str(backbone.dtype).removeprefix('torch.')}"
    with progress_line(f"sampling {asked.label}") as on_progress:
        return curve_of(
            backbone,
            codec,
            prompts,
            replace(asked, shift=shift),
            device=codec.device,
            kept=kept.of(f"{made_by} {computed}"),
            divide=True,
            on_progress=on_progress,
        )
