"""Measuring a piece's any-step curve, here or in a process beside it."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anyflow.experiment.pieces import Piece, curve_folder, read_curve
from anyflow.experiment.schema import Experiment
from anyflow.experiment.tasks import measured_on
from anyflow.system.files import write_atomically
from anyflow.tracking.mlflow import record_curves

APART = 1000
"""Between the seeds of one piece's noises: those of another piece lie between them."""


def measure_piece(
    experiment: Experiment, piece: Piece, card: str, on_progress: Callable[..., None] | None = None
) -> None:
    """Measure the any-step curve of a piece on a card, and keep it in the piece's folder."""
    from anyflow.backbone.controls import controls_of
    from anyflow.evaluation.further_judges import judges_of
    from anyflow.evaluation.heldout import Prompts, curve_of, save_curve
    from anyflow.evaluation.measurement import Measurement
    from anyflow.evaluation.models import has_guidance, load_model, native_shape, way_of

    began, settings = time.monotonic(), experiment.evaluation
    stands_on = measured_on(experiment, piece, card)
    shape = native_shape(piece.model)
    codec, backbone, shift = load_model(piece.model, settings.precision)
    prompts = Prompts([card], shape, settings.prompts, settings.split)
    scale = None if has_guidance(piece.model) else settings.guidance_scale or None
    sampler, guidance = way_of(piece.model, scale=scale)
    where, device, told = "evaluation.encoders", codec.device, controls_of(backbone.transformer)
    asked = Measurement(
        label=Path(card).stem,
        steps=settings.steps,
        shift=shift,
        seeds=[piece.seed + draw * APART for draw in range(settings.draws)],
        given_frames=piece.given_frames,
        left_out=experiment.left_out,
        sampler=sampler,
        guidance=guidance,
        batch_size=settings.batch_size,
        judges=judges_of(settings.encoders, where, prompts, controls=told, device=device, on_progress=on_progress),
    )
    result = curve_of(backbone, codec, prompts, asked, device=device, on_progress=on_progress)
    del codec, backbone
    gc.collect()
    folder = curve_folder(piece)
    folder.mkdir(parents=True, exist_ok=True)
    if piece.seed == experiment.seeds_of(piece.arm)[0]:  # one seed's samples make the picture
        save_curve(folder, result)
    seconds = round(time.monotonic() - began, 1)
    found = {"curve": result.curve.to_json(), "measured_on": stands_on, "seconds": seconds}
    write_atomically(folder / f"{Path(card).stem}.json", json.dumps(found, indent=1) + "\n")


def record_piece(experiment: Experiment, piece: Piece, cards: Sequence[str]) -> None:
    """Give curves of a piece to the tracker: ``after/CARD`` for each, so that arms of one card and of several overlay.

    A piece of one card has ``after`` too, as any training has.
    """
    found = {card: read_curve(piece, card) for card in cards}
    rows: dict[str, Any] = {card: document["curve"]["rows"] for card, document in found.items() if document is not None}
    curves = {f"after/{Path(card).stem}": curve for card, curve in rows.items()}
    if len(piece.cards) == 1 and rows:
        curves["after"] = rows[piece.cards[0]]
    record_curves(
        piece.run,
        uri=piece.tracking_uri,
        experiment=experiment.name,
        curves=curves,
        tags={"anyflow.arm": piece.arm, "anyflow.seed": str(piece.seed), "anyflow.cards": " ".join(piece.cards)},
    )
