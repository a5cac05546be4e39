"""What must be right before anything of an experiment is run: clips, given frames, finished models, encoders."""

from __future__ import annotations

from collections.abc import Sequence

from anyflow.evaluation.curve import check_given, pixel_frames
from anyflow.evaluation.encoders import check_encoders
from anyflow.evaluation.heldout import check_held_out
from anyflow.evaluation.models import check_model, trained_shape
from anyflow.experiment.pieces import Piece
from anyflow.experiment.schema import Experiment


def check_ready(experiment: Experiment, pieces: Sequence[Piece]) -> None:
    """Say what would stop some pieces later on, before the first of them is trained.

    Raises:
        UserError: a split has too few clips, a finished model is missing, more frames are given or left out than a clip
            has, or an encoder cannot be used.
    """
    settings, file = experiment.evaluation, experiment.file
    for card in experiment.cards:
        check_held_out([card], settings.split, settings.prompts, f"{file}: evaluation.prompts")
    for piece in pieces:
        if piece.recipe is None and not piece.needs:
            check_model(piece.model, f"{file}: arms.{piece.arm}.folder")
    lengths = {piece.arm: frames for piece in pieces if piece.is_shown and (frames := _frames(piece)) is not None}
    for arm, frames in lengths.items():
        _check_given(experiment, arm, frames)
    compared = min(lengths.values(), default=None)
    check_encoders(
        settings.encoders,
        f"{file}: evaluation.encoders",
        None if compared is None else compared - pixel_frames(experiment.left_out),
        settings.split,
    )


def _frames(piece: Piece) -> int | None:
    """Frames of a clip that a piece makes; None where its model does not say, or is not made yet."""
    if piece.recipe is not None:
        return piece.recipe.data.frames
    known = trained_shape(piece.model)
    return known[0] if known is not None else None


def _check_given(experiment: Experiment, arm: str, frames: int) -> None:
    """Something is left to be made, and to be compared: all arms leave out what any of them is given."""
    blamed = next(name for name in (arm, *experiment.shown) if experiment.given_to(name) == experiment.left_out)
    is_own = experiment.arms[blamed].given_frames >= 0
    where = f"arms.{blamed}.given_frames" if is_own else "evaluation.given_frames"
    check_given(experiment.left_out, frames, f"{experiment.file}: {where}=", f"clips of arm {arm}")
