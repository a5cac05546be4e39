"""What an experiment is made of: a piece for every arm, seed and, where the arm differs by data set, card.

A piece is a run folder, ``runs/experiments/NAME/ARM-SEED[-CARD]``: a training (none for a finished model), then a curve
for each card. What is on disk decides what is missing: the recipe that the folder was trained by, the data and the
model that it was trained on, and what its curves were measured on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.errors import UserError
from anyflow.evaluation.curve import VERSION
from anyflow.evaluation.encoders import OWN
from anyflow.experiment.load import ARM_MODEL, in_order, needed_arms
from anyflow.experiment.schema import Experiment
from anyflow.recipe import Recipe, RunRecipe, load_recipe
from anyflow.recipe.load import COMMAND_LINE
from anyflow.system.places import find_shipped
from anyflow.tracking.fingerprints import changed_facts, data_fingerprint, encoder_fingerprint
from anyflow.tracking.runs import RunFolder, changed_fields

ROOT = Path("runs/experiments")


@dataclass(frozen=True)
class Piece:
    """One arm with one seed, and one card if the arm is trained card by card.

    Attributes:
        arm: its name.
        seed: of training, and of the noise that is sampled from.
        run: its folder.
        model: the folder (or hub id) that is evaluated.
        cards: the data sets that it is evaluated on.
        recipe: what it is trained by; None for a finished model.
        words: the recipe as ``anyflow train`` takes it: its name, overrides and options.
        needs: names of the folders of the pieces that must be trained before.
        given_frames: latent frames that are given when it is evaluated.
        is_shown: whether it is evaluated.
        tracking_uri: where it is recorded; a finished model where the trained arms are.
    """

    arm: str
    seed: int
    run: RunFolder
    model: str
    cards: tuple[str, ...]
    recipe: Recipe | None
    words: tuple[str, ...]
    needs: tuple[str, ...]
    given_frames: int
    is_shown: bool
    tracking_uri: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.run.name

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.recipe.total_steps if self.recipe is not None else 0


def pieces_of(experiment: Experiment, root: Path = ROOT) -> list[Piece]:
    """All pieces, each after those that it needs; one seed of all arms before the next.

    Raises:
        UserError: a recipe is wrong, or an arm's steps or batch are not the budget's.
    """
    home = root / experiment.name
    found = [
        _piece(experiment, home, arm, seed, card)
        for arm in in_order(experiment)
        for seed in experiment.seeds_of(arm)
        for card in (experiment.cards if _is_split(experiment, arm) else [None])
    ]
    for piece in found:
        _check_budget(experiment, piece)
    place = {seed: index for index, seed in enumerate(dict.fromkeys(piece.seed for piece in found))}
    return sorted(found, key=lambda piece: place[piece.seed])  # stable: the arms keep their order


def _is_split(experiment: Experiment, arm: str) -> bool:
    """Whether an arm is trained once for each card: it names ``{card}``, or needs an arm that does."""
    found = experiment.arms[arm]
    own = experiment.overrides if not found.folder else []
    texts = (found.recipe or experiment.recipe if not found.folder else "", found.folder, *own, *found.overrides)
    return any("{card}" in text for text in texts) or any(
        _is_split(experiment, needed) for needed in needed_arms(experiment, arm)
    )


def _piece(experiment: Experiment, home: Path, name: str, seed: int, card: str | None) -> Piece:
    arm = experiment.arms[name]
    folders = {needed: home / _folder(experiment, needed, seed, card) for needed in needed_arms(experiment, name)}
    models = {
        needed: find_shipped(_fill(experiment.arms[needed].folder, card, {})) or str(folder / "model")
        for needed, folder in folders.items()
    }
    run = RunFolder(home / _folder(experiment, name, seed, card))
    recipe, words = (None, ()) if arm.folder else _training(experiment, name, seed, card, models)
    return Piece(
        arm=name,
        seed=seed,
        run=run,
        model=find_shipped(_fill(arm.folder, card, models)) or str(run.model),
        cards=(card,) if card is not None else tuple(experiment.cards),
        recipe=recipe,
        words=words,
        needs=tuple(folder.name for needed, folder in folders.items() if not experiment.arms[needed].folder),
        given_frames=experiment.given_to(name),
        is_shown=arm.shown,
        tracking_uri=_tracking_uri(experiment),
    )


def _tracking_uri(experiment: Experiment) -> str:
    """What the overrides of all arms say, or the recipes' default."""
    given = [text.partition("=")[2] for text in experiment.overrides if text.startswith("run.tracking_uri=")]
    return given[-1] if given else RunRecipe().tracking_uri


def _folder(experiment: Experiment, arm: str, seed: int, card: str | None) -> str:
    """``ARM-SEED`` or ``ARM-SEED-CARD``; an arm without this seed is there with its first one."""
    seeds = experiment.seeds_of(arm)
    number = seed if seed in seeds else seeds[0]
    split = card is not None and _is_split(experiment, arm)
    return f"{arm}-{number}-{Path(str(card)).stem}" if split else f"{arm}-{number}"


def _fill(text: str, card: str | None, models: dict[str, str]) -> str:
    filled = text.replace("{card}", card or "")
    return ARM_MODEL.sub(lambda match: models[match[1]], filled)


def _training(
    experiment: Experiment, arm_name: str, seed: int, card: str | None, models: dict[str, str]
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe of one training, and the words after ``anyflow train`` that give it."""
    arm = experiment.arms[arm_name]
    name = _fill(arm.recipe or experiment.recipe, card, models)
    overrides = [_fill(text, card, models) for text in (*experiment.overrides, *arm.overrides)]
    if arm.start_from:
        overrides.append(f"model.weights={models[arm.start_from]}")
    overrides += [f"run.seed={seed}", f"run.experiment={experiment.name}", "sampling.prompts=0"]
    model, hardware = arm.model or experiment.model or None, experiment.hardware or None
    try:
        recipe = load_recipe(name, model=model, hardware=hardware, overrides=overrides)
    except UserError as error:
        told = str(error).replace(f" ({COMMAND_LINE})", "")
        raise UserError(f"{experiment.file}: arms.{arm_name}: {told}") from error
    options = {"--model": model, "--hardware": hardware}
    return recipe, (name, *overrides, *(word for key, value in options.items() if value for word in (key, value)))


def _check_budget(experiment: Experiment, piece: Piece) -> None:
    """Raise unless a compared arm uses what all may use."""
    budget, arm = experiment.budget, experiment.arms[piece.arm]
    if piece.recipe is None or not piece.is_shown:
        return
    steps, batch = arm.steps or budget.steps, budget.batch
    if steps and piece.steps != steps:
        parts = " with its tail" if piece.recipe.has_tail else ""
        raise UserError(
            f"experiment {experiment.name}: arm {piece.arm} trains {piece.steps} steps{parts}, its budget is {steps}: "
            f"set stage.steps, or arms.{piece.arm}.steps where the difference is meant"
        )
    if batch and piece.recipe.global_batch != batch:
        raise UserError(
            f"experiment {experiment.name}: arm {piece.arm} takes {piece.recipe.global_batch} clips a step, "
            f"budget.batch is {batch}: set data.global_batch={batch}"
        )


def training_state(piece: Piece, facts: dict[str, Any]) -> tuple[str, str]:
    """``done``, ``cut``, ``missing`` or ``changed``, and for the last one what changed.

    Args:
        piece: the piece.
        facts: fingerprints of what it would be trained on now (:func:`anyflow.tracking.fingerprints.facts_of`).
    """
    if piece.recipe is None:
        return "done", ""
    if not piece.run.recipe.exists():
        return "missing", ""
    changes = [f"{key} was {was!r} and is {now!r}" for key, was, now in changed_fields(piece.run, piece.recipe)]
    status = piece.run.status
    changes += [f"{what} is another one" for what in changed_facts(status, facts)]
    if changes:
        return "changed", "; ".join(changes[:3])
    return ("done" if status.get("state") == "finished" else "cut"), ""


def curve_folder(piece: Piece) -> Path:
    """Where a piece's curves lie: ``CARD.pt`` and ``CARD.json``."""
    return piece.run.path / "evaluation"


def read_curve(piece: Piece, card: str) -> dict[str, Any] | None:
    """What was measured on a card: ``curve`` (as ``Curve.to_json``), ``measured_on``, ``seconds``; None before."""
    path = curve_folder(piece) / f"{Path(card).stem}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def curve_settings(experiment: Experiment, piece: Piece) -> dict[str, Any]:
    """How a piece's curves are measured: equal settings on equal models and data give equal curves."""
    settings = dataclasses.asdict(experiment.evaluation)
    del settings["batch_size"]
    if settings["draws"] == 1:
        del settings["draws"]
    if settings["guidance_scale"] == 1:
        del settings["guidance_scale"]
    settings["encoders"] = [encoder_fingerprint(choice) for choice in settings["encoders"]]
    if not settings["encoders"]:
        del settings["encoders"]
    if not settings["precision"]:
        del settings["precision"]  # the device's: equal curves but for rounding
    own = {"steps": sorted(settings["steps"]), "given_frames": piece.given_frames, "seed": piece.seed}
    if experiment.left_out > piece.given_frames:
        own["left_out"] = experiment.left_out
    return {**settings, **own, "measures": VERSION}


def judged_by(experiment: Experiment, piece: Piece, card: str) -> dict[str, Any]:
    """What a curve stands on besides the model: the held-out clips, those that a probe learnt from, the settings.

    Raises:
        UserError: the card's shards are missing.
    """
    found = {"data": data_fingerprint(card, experiment.evaluation.split)}
    if set(OWN) & set(experiment.evaluation.encoders):
        found["probe"] = data_fingerprint(card, "train")
    return {**found, **curve_settings(experiment, piece)}


def setting_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What sets two of :func:`curve_settings` apart, in words: a setting at its default stands in neither."""
    keys = [*now, *(key for key in was if key not in now)]
    return {key: f"{key} was {was.get(key)!r} and is {now.get(key)!r}" for key in keys if was.get(key) != now.get(key)}
