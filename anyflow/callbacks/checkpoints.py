"""Checkpoints that are whole or absent: written beside, synced, renamed, then pointed at; the last few are kept.

A run's folder holds ``checkpoints/step_00000100/state.ckpt`` and a file ``checkpoints/latest`` with the newest name.
The name is counted in optimiser steps of the stage. Resuming from it is exact: weights, average, optimiser, schedule,
stream position and every random state are inside. Where a step takes several passes, a checkpoint is of the moment
between two updates: passes that wait for theirs have changed no weight, and are done again.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from anyflow.callbacks.background import Writer
from anyflow.errors import UserError
from anyflow.stages.base import gather, world

STATE_FILE = "state.ckpt"
POINTER = "latest"


class Checkpoints(Callback):
    """Save every ``every_steps`` optimiser steps, at the end, and when asked; keep the newest ``keep``.

    ``writer`` does the work: at once, or behind the training's back. Then the strategy must have the same one.
    """

    def __init__(self, folder: Path, *, every_steps: int, keep: int, writer: Writer | None = None) -> None:
        self.folder = folder
        self.writer = writer or Writer()
        self.every_steps = every_steps
        self.keep = keep
        self._random_state: dict[str, Any] | None = None
        self._own_random: dict[str, Any] = {}  # of this rank, when the update under way began
        self._saved = (0, 0)  # step and turn of what is on disk; a run need not save how it begins

    def on_train_start(self, trainer: lightning.Trainer, stage: Any) -> None:
        self._saved = (stage.step, stage.turn)
        self._own_random = _random_state()

    def on_train_batch_end(self, trainer: lightning.Trainer, stage: Any, *_: Any) -> None:
        if not stage.is_between_updates:
            return
        self._own_random = _random_state()
        if stage.turn == 0 and stage.step % self.every_steps == 0:
            self.save(trainer, stage)

    def on_train_end(self, trainer: lightning.Trainer, stage: Any) -> None:
        self.save(trainer, stage)
        self.writer.wait()

    def save(self, trainer: lightning.Trainer, stage: Any) -> None:
        """Write a checkpoint of the newest update if there is none; a reader sees the one before or this, never a part.

        All ranks must come here together.
        """
        self.writer.wait()  # for the one before: one copy in memory, and what went wrong with it is told
        if self._saved == (stage.step, stage.turn):
            return
        self._saved = (stage.step, stage.turn)
        within = f"_turn_{stage.turn}" if stage.turn else ""  # between the updates of one step
        final = self.folder / f"step_{stage.step:08d}{within}"
        partial = self.folder / f"{final.name}.partial"
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial / STATE_FILE, weights_only=False)
        if trainer.is_global_zero:
            self.writer.later(lambda: self._publish(partial, final))
        if not self.writer.is_behind:
            trainer.strategy.barrier()

    def on_load_checkpoint(self, trainer: lightning.Trainer, stage: Any, checkpoint: dict[str, Any]) -> None:
        count_passes(checkpoint, stage.passes, stage.automatic_optimization)

    def _publish(self, partial: Path, final: Path) -> None:
        """Give a complete checkpoint its name."""
        sync_tree(partial)
        replaced = self.folder / f"{final.name}.replaced.partial"
        if final.exists():  # a run that went on from an earlier one reaches the same step again
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        write_atomically(self.folder / POINTER, final.name)
        self._prune()

    def _prune(self) -> None:
        finished = sorted(path for path in self.folder.glob("step_*") if not path.name.endswith(".partial"))
        for old in finished[: -self.keep]:
            shutil.rmtree(old)

    def state_dict(self) -> dict[str, Any]:
        """The random state of every rank."""
        return {"random": gather(self._own_random)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank, states = world()[0], state_dict["random"]
        self._random_state = states[rank] if rank < len(states) else None

    def on_train_batch_start(self, *_: Any) -> None:
        """Take up the saved random state as late as possible: building loaders has drawn from it."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state["torch"])
            if self._random_state["cuda"]:
                torch.cuda.set_rng_state_all(self._random_state["cuda"])
            name, keys, *rest = self._random_state["numpy"]
            np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
            version, numbers, gauss = self._random_state["python"]
            random.setstate((version, tuple(numbers), gauss))
            self._random_state = None


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint's state file in a run's ``checkpoints`` folder, or None.

    Raises:
        UserError: The pointer names a checkpoint that is gone and no other is left.
    """
    pointer = folder / POINTER
    if not pointer.exists():
        return None
    named = folder / pointer.read_text().strip() / STATE_FILE
    if named.exists():
        return named
    others = sorted(path for path in folder.glob(f"step_*/{STATE_FILE}") if not path.parent.name.endswith(".partial"))
    if not others:
        raise UserError(f"{named} is missing though {pointer} names it; restore it or start again without --resume")
    return others[-1]


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_tree(folder: Path) -> None:
    """Force a folder's files, and the folder itself, to disk."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def count_passes(checkpoint: dict[str, Any], passes: int, is_automatic: bool) -> None:
    """Tell Lightning's loops how many batches a checkpoint's updates took, if each takes so many.

    Their own count has passes that waited for an update, whose gradients were not saved and which come again; and the
    run may go on with its updates in another number of passes.

    Args:
        checkpoint: Lightning's, with the state of its loops.
        passes: batches of an update.
        is_automatic: whether Lightning accumulates their gradients, or the stage does (then each counts as a step).
    """
    updates = checkpoint["anyflow"]["position"]
    done, loops = updates * passes, checkpoint["loops"]["fit_loop"]
    for counts in (loops["epoch_loop.batch_progress"][name] for name in ("total", "current")):
        counts.update(dict.fromkeys(("ready", "started", "processed"), done), completed=done - 1)
    # saved within a batch's last hook: Lightning counts that batch once more
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = (updates if is_automatic else done) - 1


def _random_state() -> dict[str, Any]:
    """Every random state of this process, readable without unpickling."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": _numpy_state(),
        "python": random.getstate(),
    }


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return (name, np.asarray(keys).tolist(), *rest)  # plain numbers: readable without unpickling arrays
