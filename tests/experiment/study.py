"""A small experiment with invented curves, so that its answers are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from anyflow.evaluation.curve import Curve, CurveResult, CurveRow, HeldOut, Marks
from anyflow.evaluation.heldout import save_curve
from anyflow.experiment.load import load_experiment
from anyflow.experiment.pieces import Piece, curve_folder, pieces_of
from anyflow.experiment.schema import Experiment
from anyflow.experiment.tasks import Task, measured_on

STEPS = (1, 4, 32)

TEXT = """
question: Does it matter?
cards: [driving, games]
seeds: [0, 1, 2]
recipe: finetune/{card}
arms:
  base: {folder: data/models/tiny}
  plain: {overrides: [stage.diffusion_share=1, stage.consistency_share=0]}
  more: {start_from: plain}
overrides: [stage.steps=20, "run.tracking_uri="]
budget: {steps: 20, batch: 8}
evaluation: {prompts: 4, steps: [1, 4, 32]}
metrics: [sliced_w1, motion_accuracy]
before: base
claims:
  - {say: More beats plain., arm: more, than: plain, steps: [1, 4]}
"""

Value = Callable[[str, str, int, int], float]
"""``(arm, card, seed, steps)`` to a distance."""


def write_study(folder: Path, text: str = TEXT) -> tuple[Experiment, list[Piece]]:
    """The experiment's file in a folder, read, and its pieces below the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    experiment = load_experiment(str(path))
    return experiment, pieces_of(experiment, folder / "runs")


def invented(kind: type, **values: Any) -> Any:
    """A dataclass of numbers: 1 wherever nothing is given; its mappings stay empty."""
    numbers = [item.name for item in fields(kind) if item.default_factory is MISSING]
    return kind(**{name: values.get(name, 1.0) for name in numbers})


def invent_curve(experiment: Experiment, piece: Piece, card: str, value: Value, with_samples: bool = False) -> None:
    """Leave a curve where the experiment looks for it."""
    rows = tuple(
        invented(
            CurveRow,
            sliced_w1=value(piece.arm, card, piece.seed, steps),
            motion_accuracy=0.5,
            num_steps=steps,
            sampling_seconds=0.1 * steps,
        )
        for steps in STEPS
    )
    real = invented(Marks, sliced_w1=0.5)
    curve = Curve(card, card, 4, piece.seed, 3.0, (5, 32, 48), rows, real, real)
    folder = curve_folder(piece)
    folder.mkdir(parents=True, exist_ok=True)
    stands_on = measured_on(experiment, piece, card)
    found = {"curve": curve.to_json(), "measured_on": stands_on, "seconds": 10.0}
    (folder / f"{card}.json").write_text(json.dumps(found), encoding="utf-8")
    if with_samples:
        clips = torch.randint(0, 255, (2, 5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        shown = tuple(HeldOut(f"{card}-{i}", "A car.", clips[i], card, {}) for i in range(2))
        save_curve(folder, CurveResult(curve, shown, dict.fromkeys(STEPS, clips)))


def invent(experiment: Experiment, pieces: list[Piece], value: Value, with_samples: bool = False) -> None:
    """Curves of all pieces."""
    for piece in pieces:
        for card in piece.cards:
            invent_curve(experiment, piece, card, value, with_samples and piece.seed == experiment.seeds[0])


def tasks_in_state(pieces: list[Piece], state: str = "done") -> list[Task]:
    """All trainings and curves, said to be in a state without a look at any file."""
    titles = [(piece, card) for piece in pieces for card in ([""] if piece.recipe else []) + list(piece.cards)]
    return [Task(piece, card, state) for piece, card in titles]


def invent_training(piece: Piece) -> None:
    """What a finished training leaves."""
    from anyflow.recipe import save_recipe
    from anyflow.tracking.fingerprints import facts_of

    assert piece.recipe is not None
    piece.run.model.mkdir(parents=True, exist_ok=True)
    (piece.run.model / "weights.safetensors").write_text(f"{piece.name} {piece.recipe.stage.steps}")
    save_recipe(piece.recipe, piece.run.recipe)
    piece.run.note(state="finished", train_seconds=40.0, **facts_of(piece.recipe))
