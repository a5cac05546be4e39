"""From a recipe to a finished run: assemble, measure before, train, measure after, export, report.

Whatever stops a run in the middle, the same command with ``--resume auto`` goes on from what is on disk: the curve
measured before training, the newest checkpoint, the exported model.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from anyflow.backbone.compiled import graph_count
from anyflow.backbone.parallelize import (
    accelerator_here,
    check_devices,
    from_rank_zero,
    join_ranks,
    largest_on_ranks,
    leave_ranks,
    rank_and_size,
    wait_for_all,
)
from anyflow.backbone.quantized import check_quantizer
from anyflow.data.reader import find_split
from anyflow.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError, explain
from anyflow.evaluation.curve import pixel_frames
from anyflow.evaluation.encoders import check_encoders
from anyflow.recipe import Recipe, check_files, lagging_average, save_recipe, to_dict
from anyflow.recipe.fields import flatten
from anyflow.system.console import quiet_libraries
from anyflow.system.engine_options import EngineOptions, engine_of
from anyflow.system.ranks import leave_place
from anyflow.system.signals import Listener, Terminated, signals_raise
from anyflow.tracking.checkpoints import clear_leftovers, require_whole
from anyflow.tracking.fingerprints import facts_of
from anyflow.tracking.mlflow import close_tracking, code_version, log_artifact, open_tracking
from anyflow.tracking.run_log import RunLogger
from anyflow.tracking.runs import RunFolder, changed_fields, taken_run
from anyflow.training.assemble import Parts, assemble, batches_of, is_precomputed
from anyflow.training.callbacks.background import BackgroundWriter, Writer
from anyflow.training.callbacks.changes import KeepSettings
from anyflow.training.callbacks.checkpoints import Checkpoints
from anyflow.training.callbacks.preemption import Preemption
from anyflow.training.callbacks.progress import TrainingProgress
from anyflow.training.callbacks.sampling import Sampling
from anyflow.training.callbacks.sharded import AnyCheckpoint, ShardedStrategy
from anyflow.training.deterministic import make_deterministic
from anyflow.training.encoding import EncodingJob, encode
from anyflow.training.finish import describe_parts, finish_codec, finish_flow, measure, report_skipped, summary


def train(
    recipe: Recipe,
    *,
    resume: str | None = None,
    accept_changes: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
    on_open: Callable[[RunFolder], None] | None = None,
) -> int:
    """Run a recipe to its end; returns the process's exit code. ``on_open`` is given the run's folder.

    ``accept_changes`` lets a run go on with another recipe than it was started with.

    Raises:
        UserError: Recipe, data, weights or folders are at fault.
    """
    quiet_libraries()
    if recipe.hardware.threads:
        torch.set_num_threads(recipe.hardware.threads)
    if recipe.run.deterministic:
        make_deterministic()
    check_files(recipe)
    _check_needs(recipe)
    if not dry_run and "RANK" not in os.environ:
        check_devices(recipe.hardware.accelerator, recipe.hardware.devices)
    if (lag := lagging_average(recipe)) and int(os.environ.get("RANK", "0")) == 0:
        print(lag, file=sys.stderr)
    if dry_run:
        for line in describe_parts(recipe, assemble(recipe.on_full_base, leave_stored=True, encode=False)):
            print(line)
        return 0
    join_ranks(recipe.hardware.accelerator)
    is_first = rank_and_size()[0] == 0
    where = partial(taken_run, Path(recipe.run.out), recipe.run.name, out=out, resume=resume)
    with where() if is_first else nullcontext() as mine:
        if mine is not None:
            leave_place(mine.path)
        run = from_rank_zero(mine)
        if on_open is not None:
            on_open(run)
        changed = _refuse_another_recipe(run, recipe, accept_changes)
        if run.status.get("state") == "finished":
            print(f"{run.path} is finished already: nothing to resume.\n")
            print(summary(run))
            return 0
        if is_first:
            require_whole(run.checkpoints, else_older=resume == "auto")
        wait_for_all()  # nobody writes before all have read
        try:
            with signals_raise():  # outside of the training loop; the loop has its own
                return _train(recipe, run, [KeepSettings()] if changed else [])
        except Terminated as stop:
            return _stopped(run, stop.received)


def encode_ahead(recipe: Recipe) -> None:
    """Encode what several ranks of this machine will read, by as many processes; what is there already is left.

    Ranks would wait for the first one, which would do it alone; so they do where they are on several machines. That all
    else is right is seen before.

    Raises:
        UserError: the recipe cannot be run, or encoded.
    """
    hardware = recipe.hardware
    check_devices(hardware.accelerator, hardware.devices)
    if hardware.num_nodes > 1 or not is_precomputed(recipe):
        return
    quiet_libraries()
    jobs = [EncodingJob.of(recipe, card) for card in recipe.data.card]
    codec = jobs[0].codec()
    if all(job.encoding(codec).is_whole() for job in jobs):
        return
    _check_needs(recipe)
    assemble(recipe.on_full_base, leave_stored=True, encode=False)
    engine = engine_of(EngineOptions(), hardware.devices, gpus=accelerator_here(hardware.accelerator) == "gpu")
    for job in jobs:
        encode(job, engine, waits=True)


def _check_needs(recipe: Recipe) -> None:
    """That what is asked for later is there, before anything is loaded or encoded: held-out clips, judges, quantisers.

    Raises:
        UserError: something is not.
    """
    sampled = recipe.data.frames - pixel_frames(recipe.sampling.given_frames)
    check_encoders(recipe.sampling.encoders, "sampling.encoders", sampled)
    check_quantizer(recipe.model.lora.base)
    if recipe.sampling.prompts or recipe.declared.trains_codec:
        for card in recipe.data.card:
            find_split(card, recipe.data.heldout)


def _train(recipe: Recipe, run: RunFolder, more: list[Any]) -> int:
    parts = assemble(recipe)
    if rank_and_size()[0] == 0:
        for note in parts.notes:
            print(note, file=sys.stderr)
        run.clear_leftovers(recipe.total_steps, is_changed=bool(more))
    wait_for_all()
    return _train_parts(recipe, run, parts, more)


def _train_parts(recipe: Recipe, run: RunFolder, parts: Parts, more: list[Any]) -> int:
    is_first = rank_and_size()[0] == 0
    if is_first and run.checkpoint is not None:
        print(f"going on with {run.path} from {run.checkpoint.parent.name}", file=sys.stderr)
    logger = _open_records(recipe, run) if is_first else None
    is_codec = recipe.declared.trains_codec
    try:
        if not is_codec:
            measure(recipe, run, parts, logger, label="before")
        received = fit(recipe, run, parts, logger, more)
        if received is not None:
            raise Terminated(received)
        (finish_codec if is_codec else finish_flow)(recipe, run, parts, logger)
    except Terminated:
        close_tracking(logger, "KILLED")
        raise
    except Exception as error:
        if is_first:
            _failed(run, logger)
        sentence = explain(error, str(run.path))
        if sentence is None or isinstance(error, UserError):
            raise
        raise UserError(sentence) from error
    if is_first:
        run.note(state="finished")
        close_tracking(logger, "FINISHED")
        print(summary(run))
    leave_ranks()
    return 0


def _open_records(recipe: Recipe, run: RunFolder) -> RunLogger | None:
    """The run's folder with its recipe, and the tracker."""
    run.path.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run.recipe)
    facts = facts_of(recipe)
    run.note(state="running", **facts, code=code_version())
    logger = open_tracking(
        run,
        uri=recipe.run.tracking_uri,
        experiment=recipe.run.experiment,
        parameters=dict(flatten(to_dict(recipe))),
        tags={"stage": recipe.stage.name, "model": recipe.model.name, "recipe": recipe.run.recipe, **facts},
    )
    log_artifact(logger, run.recipe)
    return logger


def fit(
    recipe: Recipe, run: RunFolder, parts: Parts, logger: RunLogger | None, more: Sequence[Any] = ()
) -> signal.Signals | None:
    """Train from the run's newest checkpoint (or the start) to the last step; returns the signal that cut it short.

    ``more`` are further callbacks.
    """
    hardware = recipe.hardware
    checkpoint = recipe.checkpoint
    writer = BackgroundWriter() if checkpoint.background else Writer()
    checkpoints = Checkpoints(
        run.checkpoints,
        every_steps=checkpoint.every_steps,
        keep=checkpoint.keep,
        writer=writer,
        context=hardware.context,
    )
    preemption = Preemption(checkpoints)
    callbacks: list[Any] = [checkpoints, TrainingProgress(recipe.stage.name, recipe.total_steps), preemption, *more]
    if recipe.sampling.every_steps and not recipe.declared.trains_codec:
        listener, every = preemption.listener, recipe.sampling.every_steps
        measure_now = partial(_measure_now, recipe, run, parts, logger, listener)
        sampling = Sampling(measure_now, every_steps=every, total_steps=recipe.total_steps, listener=listener)
        callbacks.insert(0, sampling)
    manual = not parts.stage.automatic_optimization  # such a stage has several optimisers and counts its own steps
    turns = batches_of(recipe) // recipe.total_steps if manual else 1
    trainer = lightning.Trainer(
        accelerator=accelerator_here(hardware.accelerator),
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        **_strategy(recipe, manual, writer),
        accumulate_grad_batches=1 if manual else hardware.accumulate,
        max_steps=-1 if manual else recipe.stage.steps,  # else the declared length of the data ends the run
        max_epochs=1,  # one endless epoch of declared length: epoch boundaries are the stream's affair
        callbacks=callbacks,
        logger=logger or False,
        log_every_n_steps=min(10, recipe.total_steps) * turns,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.path,
    )
    try:
        trainer.fit(parts.stage, parts.data, ckpt_path=run.checkpoint, weights_only=True)
        if parts.data.stream is not None:
            parts.data.stream.gather()
    finally:
        report_skipped(run, parts.data)
    # all ranks agree, and none leaves before the first, which may still have been writing, and is taken for dead
    received = largest_on_ranks(int(preemption.received or 0))
    if hardware.compile and rank_and_size()[0] == 0:
        run.note(graphs=graph_count())
    return signal.Signals(received) if received else None


def _strategy(recipe: Recipe, manual: bool, writer: Writer) -> dict[str, Any]:
    """Lightning's settings of ranks, precision and checkpoints; the ranks have met before it starts."""
    hardware, ranks = recipe.hardware, recipe.world_size
    if ranks > 1 and hardware.strategy == "fsdp":  # precision is the policy's, see parallelize.py
        return {
            "strategy": ShardedStrategy(ranks, writer),
            "precision": "32-true",
            "plugins": [TorchElasticEnvironment()],
        }
    # a turn of one role leaves the other's weights without gradient, a step without compressed frames their patches:
    # plain ddp takes both for a mistake
    copies = "ddp_find_unused_parameters_true" if manual or recipe.model.architecture == "causal" else "ddp"
    return {
        "strategy": copies if ranks > 1 else "auto",
        # a network has its precision in itself (spread): in sampling too, its backward pass outside of autocast
        "precision": hardware.precision if recipe.declared.trains_codec else "32-true",
        "plugins": [AnyCheckpoint(writer), *([TorchElasticEnvironment()] if ranks > 1 else [])],
    }


def _measure_now(
    recipe: Recipe, run: RunFolder, parts: Parts, logger: RunLogger | None, listener: Listener, label: str
) -> None:
    measure(recipe, run, parts, logger, label=label, listener=listener)


def _failed(run: RunFolder, logger: RunLogger | None) -> None:
    """Note it, whatever went wrong."""
    try:
        run.note(state="failed")
    except OSError:  # a full disk: there is room once what was being written is gone
        with suppress(OSError):
            clear_leftovers(run.checkpoints)
            run.note(state="failed")
    close_tracking(logger, "FAILED")


def _stopped(run: RunFolder, received: signal.Signals) -> int:
    """Say how to go on."""
    code = EXIT_INTERRUPTED if received == signal.SIGINT else EXIT_PREEMPTED
    if rank_and_size()[0] > 0:
        return code
    if not run.recipe.exists():
        print(f"\nStopped by {received.name} before training began; run the same command again.", file=sys.stderr)
        return code
    run.note(state="preempted" if received == signal.SIGTERM else "interrupted")
    where = run.checkpoint.parent.name if run.checkpoint else "the start"
    print(f"\nStopped by {received.name}; {run.path} is saved.", file=sys.stderr)
    print(
        f"To go on from {where}, run the same command with --resume {run.path} "
        f'(a make command with ARGS="--resume {run.path}")',
        file=sys.stderr,
    )
    return code


def _refuse_another_recipe(run: RunFolder, recipe: Recipe, accept: bool) -> bool:
    """A run resumes with its own recipe: another one would mix two experiments in one set of weights.

    Returns:
        Whether it is another one, and accepted.

    Raises:
        UserError: fields differ, and that was not accepted.
    """
    changed = changed_fields(run, recipe)
    if changed:
        listed = "; ".join(f"{key} was {was!r} and is {now!r}" for key, was, now in changed[:5])
        listed += f" ({len(changed) - 5} more)" if len(changed) > 5 else ""
        if not accept:
            raise UserError(
                f"{run.path} was started with another recipe: {listed}. Set it back, start a new run, or go on with "
                "the changes by --accept-changes"
            )
        if rank_and_size()[0] == 0:
            print(f"{run.path} goes on with another recipe: {listed}", file=sys.stderr)
    return bool(changed)
