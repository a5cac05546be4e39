"""A progress bar that says what one wants to know: loss, clips a second, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from anyflow.system.console import clock

BAR_SECONDS = 0.2
"""Between two looks at the loss for the bar."""


class TrainingProgress(Callback):
    """One line for the run; where output is not a terminal, a plain line every ``plain_every`` seconds."""

    def __init__(self, title: str, total_steps: int, plain_every: float = 20.0) -> None:
        self.title = title
        self.total_steps = total_steps
        self.plain_every = plain_every
        self._progress: Progress | None = None
        self._loss: Tensor | None = None
        self._started = (0.0, 0)  # the end of the first batch: that one also warms up, and says little of the others
        self._clips = 0
        self._spoke = 0.0

    def on_train_start(self, trainer: lightning.Trainer, stage: Any) -> None:
        self._clips = -1
        if not trainer.is_global_zero or not sys.stderr.isatty():
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} clips/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.add_task(self.title, total=self.total_steps, completed=stage.step, loss="-", speed="-")
        self._progress.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, stage: Any, outputs: Any, batch: Any, *_: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is not None:  # averaged where it is: a number would make the host wait for the device at every batch
            passes = stage.update.passes if stage.automatic_optimization else 1  # Lightning has divided by them
            new = loss.detach().double() * passes
            self._loss = new if self._loss is None else torch.where(self._loss.isnan(), new, self._loss.lerp(new, 0.05))
        if self._clips < 0:
            self._started, self._clips = (time.monotonic(), stage.step), 0
        else:
            self._clips += len(batch["caption"]) * stage.update.data_rank[1]
        elapsed = time.monotonic() - self._started[0]
        speed = f"{self._clips / elapsed:.1f}" if self._clips else "-"
        every = self.plain_every if self._progress is None else BAR_SECONDS
        if not trainer.is_global_zero or (time.monotonic() - self._spoke < every and stage.step < self.total_steps):
            return
        self._spoke = time.monotonic()
        loss_told = "-" if self._loss is None else f"{float(self._loss):.4g}"
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=stage.step, loss=loss_told, speed=speed)
        else:
            told = f"{self.title}  step {stage.step}/{self.total_steps}  loss {loss_told}"
            steps = stage.step - self._started[1]
            if steps > 0:
                left = elapsed / steps * (self.total_steps - stage.step)
                told += f"  {speed} clips/s  {clock(left)} left"
            print(told, file=sys.stderr, flush=True)

    def teardown(self, *_: Any, **__: Any) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
