"""Checkpoints that are whole or absent: written beside, synced, renamed, then pointed at; the last few are kept.

A run's folder holds ``checkpoints/step_00000100/state.ckpt`` and a file ``checkpoints/latest`` with the newest name.
The name is counted in optimiser steps of the stage. Resuming from it is exact: weights, average, optimiser, schedule,
stream position and every random state are inside. Where a step takes several passes, a checkpoint is of the moment
between two updates: passes that wait for theirs have changed no weight, and are done again.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from anyflow.stages.update import gather, world
from anyflow.system.files import PARTIAL, naming, sync_tree, write_atomically
from anyflow.tracking.checkpoints import POINTER, STATE_FILE, clear_damaged, finished, replaced
from anyflow.training.callbacks.background import Writer


class Checkpoints(Callback):
    """Save every ``every_steps`` optimiser steps, at the end, and when asked; keep the newest ``keep``.

    ``writer`` does the work: at once, or behind the training's back. Then the strategy must have the same one.
    ``context`` is how many ranks share each clip.
    """

    def __init__(
        self, folder: Path, *, every_steps: int, keep: int, writer: Writer | None = None, context: int = 1
    ) -> None:
        self.folder, self._context = folder, context
        self.writer = writer or Writer()
        self.every_steps = every_steps
        self.keep = keep
        self._random_state: dict[str, Any] | None = None
        self._own_random: dict[str, Any] = {}  # of this rank, before the update under way, if passes may wait for it
        self._saved = (0, 0)  # step and turn of what is on disk; a run need not save how it begins

    def on_train_start(self, trainer: lightning.Trainer, stage: Any) -> None:
        self._saved = (stage.step, stage.turn)
        self._begin_update(stage)

    def on_train_batch_end(self, trainer: lightning.Trainer, stage: Any, *_: Any) -> None:
        if not stage.update.is_complete:
            return
        self._begin_update(stage)
        if stage.turn == 0 and stage.step % self.every_steps == 0:
            self.save(trainer, stage)

    def _begin_update(self, stage: Any) -> None:
        """Remember the random state if a checkpoint may be asked for before the update is complete."""
        if stage.update.passes > 1:
            self._own_random = _random_state()

    def on_train_end(self, trainer: lightning.Trainer, stage: Any) -> None:
        self.save(trainer, stage)
        self.writer.wait()

    def save(self, trainer: lightning.Trainer, stage: Any) -> None:
        """Write a checkpoint of the newest update if there is none; a reader sees the one before or this, never a part.

        All ranks must come here together.
        """
        self.writer.wait()  # for the one before: one copy in memory, and what went wrong with it is reported
        if self._saved == (stage.step, stage.turn):
            return
        self._saved = (stage.step, stage.turn)
        within = f"_turn_{stage.turn}" if stage.turn else ""  # between the updates of one step
        final = self.folder / f"step_{stage.step:08d}{within}"
        partial = self.folder / f"{final.name}{PARTIAL}"
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
        count_passes(checkpoint, stage.update.passes, stage.automatic_optimization)

    def _publish(self, partial: Path, final: Path) -> None:
        """Give a complete checkpoint its name."""
        sync_tree(partial)
        if final.exists():  # a run that went on from an earlier one reaches the same step again
            final.rename(replaced(final))
        partial.rename(final)
        write_atomically(self.folder / POINTER, final.name)
        shutil.rmtree(replaced(final), ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        for old in finished(self.folder)[: -self.keep]:
            shutil.rmtree(old)
        clear_damaged(self.folder)

    def state_dict(self) -> dict[str, Any]:
        """The random state of every rank, and how many of them share each clip."""
        return {"random": gather(self._own_random or _random_state()), "context": self._context}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        (rank, ranks), states = world(), state_dict["random"]
        self._random_state = states[rank] if rank < len(states) else None
        saved = _in_words(len(states), state_dict.get("context", 1))
        now = _in_words(ranks, self._context)
        if rank == 0 and saved != now:
            print(
                f"saved by {saved} and taken up by {now}: clips, noise and times stay those of the seed; sums over "
                "ranks are rounded otherwise, so the weights will agree closely, not bitwise",
                file=sys.stderr,
            )

    def on_train_batch_start(self, *_: Any) -> None:
        """Take up the saved random state as late as possible: building loaders has drawn from it."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state["torch"])
            _restore_cuda(self._random_state["cuda"])
            name, keys, *rest = self._random_state["numpy"]
            np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
            version, numbers, gauss = self._random_state["python"]
            random.setstate((version, tuple(numbers), gauss))
            self._random_state = None


def save_state(content: Any, path: Path) -> None:
    """Write plain values and tensors to a file that is part of something not yet named.

    Through a file of our own: on a full disk torch's own writer only says that a position is unexpected.
    """
    with naming(path), open(path, "wb") as file:
        torch.save(content, file)


def _in_words(ranks: int, context: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}" + (f", {context} to a clip," if context > 1 else "")


def _restore_cuda(states: list[torch.Tensor]) -> None:
    """Put a rank's state of its device back, if it has one here; older checkpoints have those of a whole node."""
    if states and torch.cuda.is_available():
        index = torch.cuda.current_device() if len(states) > 1 else 0
        if index < len(states):
            torch.cuda.set_rng_state(states[index])


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
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
        "numpy": _numpy_state(),
        "python": random.getstate(),
    }


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return (name, np.asarray(keys).tolist(), *rest)  # plain numbers: readable without unpickling arrays
