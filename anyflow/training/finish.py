"""The ends of a run: what is measured before and after, what is exported, and what the user reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from anyflow.backbone.codec import Codec, pixels_from_bytes
from anyflow.backbone.controls import MODULE as CONTROLS
from anyflow.backbone.controls import controls_of
from anyflow.backbone.export import export_lora, export_pipeline
from anyflow.backbone.guidance import Guidance
from anyflow.backbone.load import read_controls
from anyflow.backbone.model_card import ModelCard
from anyflow.backbone.parallelize import (
    from_rank_zero,
    gather_state,
    is_sharded_module,
    join_ranks,
    rank_and_size,
)
from anyflow.backbone.wan_vae import encode_moments
from anyflow.data.card import common_rate, load_card
from anyflow.data.decode import ClipShape
from anyflow.data.module import VideoDataModule
from anyflow.data.skips import write_skipped
from anyflow.evaluation.curve import CurveResult
from anyflow.evaluation.further_judges import judges_of
from anyflow.evaluation.heldout import Prompts, TooFewClips, curve_of, held_out, load_curve, save_curve
from anyflow.evaluation.kept_samples import KeptSamples
from anyflow.evaluation.measurement import Measurement
from anyflow.evaluation.reconstruction import measure_domains
from anyflow.evaluation.report.folder import write_report
from anyflow.recipe import Recipe, to_dict
from anyflow.system.addresses import DATABASE, how_to_open
from anyflow.system.console import program, progress_line
from anyflow.system.signals import Listener
from anyflow.system.typed import to_yaml
from anyflow.tracking.mlflow import log_artifacts, log_curve
from anyflow.tracking.run_log import RunLogger, recorded_id
from anyflow.tracking.runs import RunFolder
from anyflow.training.assemble import Parts
from anyflow.training.callbacks.preemption import stop_between_calls


def guidance_of(recipe: Recipe) -> Guidance:
    """How samples of what the recipe trains are guided: by text not at all if its weights hold guidance."""
    return Guidance(recipe.sampled_guidance, recipe.model.negative_prompt, recipe.sampling.control_guidance_scale)


def clip_shape(recipe: Recipe) -> ClipShape:
    """What the recipe's clips look like."""
    return ClipShape(recipe.data.frames, recipe.data.height, recipe.data.width, recipe.data.fps or None)


def measure(
    recipe: Recipe,
    run: RunFolder,
    parts: Parts,
    logger: RunLogger | None,
    *,
    label: str,
    listener: Listener | None = None,
) -> CurveResult | None:
    """The any-step curve at this moment, with the averaged weights; measured once for each label and then kept.

    A run may go on with other ``sampling.*`` than it began with: then it is measured again. What is sampled is kept
    until the curve is there: a run that is stopped meanwhile goes on with it.

    Raises:
        Terminated: a signal came, to ``listener`` if there is one.
    """
    if not recipe.sampling.prompts:
        return None
    other = ("every_steps", "guidance_scale", "control_guidance_scale")  # the latter by what they come to
    asked = {key: value for key, value in asdict(recipe.sampling).items() if key not in other}
    guidance = guidance_of(recipe)
    asked |= {"scale": guidance.scale, "negative": guidance.negative} if guidance.scale != 1 else {}
    asked |= {"control": guidance.control} if guidance.control != 1 else {}
    kept = from_rank_zero(load_curve(run.path / "curves", label, asked))
    if kept is not None:
        return kept
    samples = KeptSamples(run.samples_of(label), f"{label} {asked}")
    try:
        result = _sampled(recipe, parts, label, samples, listener)
    except TooFewClips as error:  # small footage is trained on without a curve rather than not at all
        if rank_and_size()[0] == 0:
            print(f"no curve ({label}): {error}", file=sys.stderr)
        return None
    if rank_and_size()[0] == 0:
        save_curve(run.path / "curves", result, asked)
        samples.clear()
        if label == "before":
            print("\n".join(result.curve.notes), file=sys.stderr, end="\n" if result.curve.notes else "")
    log_curve(logger, label, list(result.curve.to_json()["rows"]))
    return result


def place(recipe: Recipe, parts: Parts) -> torch.device:
    """Put what is sampled from on this rank's device, wherever it was left; returns the device.

    Lightning takes a network off the device when training ends. Sharded weights stay where they are: what they compute,
    they compute on the device, also those that wait in host memory. No weight is asked where to compute.
    """
    device = join_ranks(recipe.hardware.accelerator)
    if not parts.codec.is_parked:
        parts.codec.to(device)
    if not is_sharded_module(parts.backbone):
        parts.backbone.to(device)
    return device


def _sampled(recipe: Recipe, parts: Parts, label: str, samples: KeptSamples, listener: Listener | None) -> CurveResult:
    device, sampling = place(recipe, parts), recipe.sampling
    prompts = Prompts(recipe.data.card, clip_shape(recipe), sampling.prompts, recipe.data.heldout, or_fewer=True)
    where, learnt_from = "sampling.encoders", recipe.data.split
    with progress_line("training the probe") as on_progress:
        judges = judges_of(
            sampling.encoders,
            where,
            prompts,
            controls=controls_of(parts.backbone.transformer),
            learnt_from=learnt_from,
            device=device,
            on_progress=on_progress,
        )
    asked = Measurement(
        label=label,
        steps=sampling.steps,
        shift=recipe.model.shift,
        seeds=[sampling.seed],
        given_frames=sampling.given_frames,
        sampler=recipe.sampler,  # type: ignore[arg-type]
        guidance=guidance_of(recipe),
        judges=judges,
    )
    with (
        averaged(parts),
        parts.codec.lent(device),
        progress_line(f"sampling {label}") as show,
        stop_between_calls(parts.backbone, listener) as check,
    ):

        def on_progress(done: int, total: int, what: str) -> None:
            show(done, total, what)
            check()

        return curve_of(
            parts.backbone,
            parts.codec,
            prompts,
            asked,
            device=device,
            kept=samples,
            divide=True,
            on_progress=on_progress,
        )


def finish_flow(recipe: Recipe, run: RunFolder, parts: Parts, logger: RunLogger | None) -> None:
    """Measure again, export the averaged weights, write the report."""
    after = measure(recipe, run, parts, logger, label="after")
    before = load_curve(run.path / "curves", "before")
    figures = {f"{row.num_steps} steps": _figures(row) for row in after.curve.rows} if after else {}
    with averaged(parts):
        weights = gather_state(parts.backbone.transformer, torch.bfloat16)
    if rank_and_size()[0] > 0:
        return
    with averaged(parts) if weights is None else nullcontext():
        card = model_card(recipe, figures)
        export_pipeline(run.model, parts.backbone.transformer, parts.codec, recipe.model.shift, card, weights=weights)
        if recipe.model.lora.enabled:
            export_lora(run.path / "lora", parts.backbone, card, weights=weights)
    if after is not None:
        write_report(run.report, before, after, title=recipe.run.name, fps=recipe.data.fps or 8.0)
        log_artifacts(logger, run.report, "report")


def finish_codec(recipe: Recipe, run: RunFolder, parts: Parts, logger: RunLogger | None) -> None:
    """Fix the latents' statistics, measure the reconstruction of held-out clips, export with an untrained network."""
    if rank_and_size()[0] > 0:
        return
    place(recipe, parts)
    with averaged(parts):
        vae = parts.codec.vae.requires_grad_(False)
        clips = held_out(recipe.data.card, recipe.data.split, clip_shape(recipe), 512)
        mean, std = latent_statistics(parts.codec, torch.stack([torch.as_tensor(item.frames) for item in clips]))
        vae.register_to_config(latents_mean=mean, latents_std=std)
        domains: dict[str, list[Any]] = {}
        for item in held_out(recipe.data.card, recipe.data.heldout, clip_shape(recipe)):
            domains.setdefault(item.domain or "video", []).append(torch.as_tensor(item.frames))
        stacked = {name: torch.stack(frames) for name, frames in domains.items()}
        marks = {name: mark.to_json() for name, mark in measure_domains(parts.codec, stacked).items()}
        run.note(reconstruction=marks)
        for name, mark in marks.items():
            print(f"{name}: {mark['psnr']:.1f} dB, moving pixels {mark['psnr_moving']:.1f} dB ({mark['clips']} clips)")
        if logger is not None:
            logger.log_metrics({f"{name}/{key}": value for name, mark in marks.items() for key, value in mark.items()})
        trained = Codec(vae, parts.codec.tokenizer, parts.codec.text_encoder).to(torch.bfloat16)  # of no folder
        export_pipeline(run.model, parts.backbone.transformer, trained, recipe.model.shift, model_card(recipe, marks))


@torch.no_grad()
def latent_statistics(codec: Codec, clips: torch.Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of unnormalised latents of ``uint8 [N, F, H, W, 3]``."""
    parts = (part.to(codec.device) for part in clips.split(min(8, codec.clips_at_once(*clips.shape[1:4]))))
    latents = torch.cat([encode_moments(codec.vae, pixels_from_bytes(part)).chunk(2, dim=1)[0] for part in parts])
    over = (0, 2, 3, 4)
    return latents.mean(over).tolist(), latents.std(over).tolist()


def averaged(parts: Parts) -> Any:
    """Within the block the trained module has its averaged weights."""
    return parts.stage.ema.applied() if parts.stage.ema is not None else nullcontext()


def model_card(recipe: Recipe, figures: Any) -> ModelCard:
    """The README of the exported model."""
    cards = {name: load_card(name) for name in recipe.data.card}
    return ModelCard(
        title=recipe.run.name,
        base_model=recipe.model.weights,
        summary=f"Trained with anyflow, stage `{recipe.stage.name}`, {recipe.total_steps} steps.",
        data={name: f"{card.licence}. {card.description}" for name, card in cards.items()},
        recipe=to_yaml(to_dict(recipe)),
        figures=figures,
        size=(recipe.data.frames, recipe.data.height, recipe.data.width),
        fps=recipe.data.fps or common_rate(recipe.data.card) or 8.0,
        own_rates=not recipe.data.fps,
        given=recipe.stage.i2v_prob > 0,
        sampler=recipe.sampler,
        guidance=None if recipe.fuses_guidance else guidance_of(recipe),
    )


def describe_parts(recipe: Recipe, parts: Parts) -> Iterator[str]:
    """What ``--dry-run`` shows: one batch, its shapes, the parameters; nothing is trained or written."""
    parts.data.setup()
    batch = next(iter(parts.data.train_dataloader()))
    trainable = sum(p.numel() for p in parts.stage.parameters() if p.requires_grad)
    total = sum(p.numel() for p in parts.stage.parameters())
    yield f"recipe      {recipe.run.name}: {recipe.total_steps} steps of {recipe.global_batch} clips{_dealt(recipe)}"
    yield f"network     {total:,} parameters, {trainable:,} trained"
    yield f"codec       {sum(p.numel() for p in parts.codec.parameters()):,} parameters, frozen"
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            yield f"batch       {name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    yield f"            caption {batch['caption'][0]!r}"
    if "frames" in batch and not recipe.declared.trains_codec:
        yield f"latents     {[len(batch['caption']), *parts.codec.latent_shape(*batch['frames'].shape[1:4])]}"
    if parts.data.stream is not None:
        yield f"data        {parts.data.stream.dataset.told()}"
    yield from (f"bucket      {line}" for line in parts.data.shares)
    yield from parts.notes
    if (told := controls_of(parts.backbone.transformer)) is not None and not recipe.declared.trains_codec:
        added = sum(p.numel() for name, p in parts.stage.named_parameters() if CONTROLS in name and p.requires_grad)
        yield f"controls    {', '.join(told.controls)}: {told.numbers} numbers a frame; {added:,} parameters embed them"
    if parts.stage.shares is not None:
        yield f"intervals   {parts.stage.shares.told(recipe.global_batch)}"
    if recipe.data.precompute and "frames" in batch and not recipe.declared.trains_codec:
        yield "cache       not there yet: training makes it before it starts, or make it by anyflow data encode"


def _dealt(recipe: Recipe) -> str:
    """How a step's clips are dealt to ranks and passes, where there is more than one of either."""
    passes, ranks, context = recipe.hardware.accumulate, recipe.data_ranks, recipe.hardware.context
    if passes == ranks == context == 1:
        return ""
    many = f"{ranks} ranks" if context == 1 else f"{ranks} x {context} ranks ({context} share each clip)"
    parts = [many] * (ranks > 1 or context > 1) + [f"{passes} passes"] * (passes > 1)
    return f", in {' x '.join(parts)} of {recipe.data.batch_size}"


def report_skipped(run: RunFolder, data: VideoDataModule) -> None:
    """Name every clip that could not be used, whether the run ended or was stopped by them."""
    stream = data.stream
    if rank_and_size()[0] > 0 or stream is None or not stream.skipped:
        return
    path = run.path / "skipped.json"
    write_skipped(path, stream.skipped.values())
    print(f"{len(stream.skipped)} clips could not be used: {path} names them all", file=sys.stderr)


def summary(run: RunFolder) -> str:
    """The last words of a run: where everything is, and the commands that use it."""
    lines = [f"Run {run.name} is finished: {run.path}"]
    table = run.report / "table.md"
    if table.exists():
        lines += ["", table.read_text(encoding="utf-8").rstrip(), ""]
    for name, path in (
        ("picture", run.report / "samples.png"),
        ("film", run.report / "samples.mp4"),
        ("curve", run.report / "curve.png"),
        ("numbers", run.report / "curve.json"),
        ("left out", run.path / "skipped.json"),
        ("model", run.model),
        ("lora", run.path / "lora"),
    ):
        if path.exists():
            lines.append(f"  {name:<11}{path}")
    if run.checkpoint is not None:
        lines.append(f"  {'checkpoint':<11}{run.checkpoint.parent}")
    told = run.model.exists() and read_controls(run.model) is not None
    given = " --image START --controls ACTIONS" * told  # files of the user's
    lines.append(f'  sample     {program()} sample "..." --model {run.model}{given} --steps 1,4,16')
    if run_id := recorded_id(run):
        database = f"{DATABASE}{run.status['mlflow_database']}"
        lines.append(f"  MLflow     run {run_id}   (open it with: {how_to_open(database)})")
    return "\n".join(lines)


def _figures(row: Any) -> dict[str, float | str]:
    accuracy = "-" if row.motion_accuracy is None else round(row.motion_accuracy, 3)
    told = {"path right": row.path_right, "obedience": row.obedience}  # of a network that is told controls
    return {
        "motion right": accuracy,
        **{name: round(value, 3) for name, value in told.items() if value is not None},
        "sliced W1": round(row.sliced_w1, 4),
        "frame Frechet": round(row.frame_frechet, 3),
    }
