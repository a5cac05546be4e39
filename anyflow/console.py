"""What libraries say on the way is kept from the user's screen, unless it is a warning that concerns them."""

from __future__ import annotations

import logging
import os
import warnings

CHATTER = (
    r".*LeafSpec.*is deprecated.*",
    r".*does not have many workers.*",
    r".*number of training batches.*smaller than the logging interval.*",
    r".*dataloader is not resumable.*",  # ours is: the stream keeps its place itself
    r".*not using.*GPU.*",
    r".*Checkpoint directory .* exists.*",
)
"""Warnings that are true of the library and say nothing about the run."""


def quiet_libraries() -> None:
    """Silence progress bars of loaders, greetings and hints of Lightning, MLflow and their like."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in CHATTER:
        warnings.filterwarnings("ignore", message=pattern)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
