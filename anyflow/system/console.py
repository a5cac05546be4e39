"""What the user sees on the screen: progress of long work, and none of the libraries' chatter."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

CHATTER = (
    r".*LeafSpec.*is deprecated.*",
    r".*does not have many workers.*",
    r".*number of training batches.*smaller than the logging interval.*",
    r".*dataloader is not resumable.*",  # ours is: the stream keeps its place itself
    r".*not using.*GPU.*",
    r".*Checkpoint directory .* exists.*",
    r".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing is changed in place after a module
    r".*torch.distributed is disabled, unavailable or uninitialized.*",  # a sharded checkpoint read by one process
)
"""Warnings that are true of the library and say nothing about the run."""


def quiet_libraries() -> None:
    """Silence progress bars of loaders, greetings and hints of Lightning, MLflow and their like."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # it warns of what it then does
    for pattern in CHATTER:
        warnings.filterwarnings("ignore", message=pattern)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def program() -> str:
    """How this program was called: ``anyflow`` where the shell finds it, else its path."""
    called = Path(sys.argv[0])
    if called.name != "anyflow" or shutil.which("anyflow") is not None or not called.is_file():
        return "anyflow"
    return os.path.relpath(called)


OnProgress = Callable[..., None]
"""``(done, total)`` or ``(done, total, what)``, called after each piece of work."""


@contextmanager
def progress_line(title: str, plain_every: float = 20.0) -> Iterator[OnProgress]:
    """One line with the progress of long work and the time left; a line now and then where output is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        began = spoken = time.monotonic()

        def plain(done: int, total: int, what: str = "") -> None:
            nonlocal spoken
            now = time.monotonic()
            if now - spoken > plain_every or done == total:
                spoken = now
                left = timedelta(seconds=round((now - began) * (total - done) / max(done, 1)))
                words = [f"{done}/{total}", what, f"about {left} left" if done < total else ""]
                print("  ".join([title, *filter(None, words)]), file=sys.stderr, flush=True)

        yield plain
        return
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title)

        def shown(done: int, total: int, what: str = "") -> None:
            description = f"{title}: {what}" if what else title
            progress.update(task, completed=done, total=total, description=description)

        yield shown


def clock(seconds: float) -> str:
    """Seconds as ``1:05`` or ``2:01:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
