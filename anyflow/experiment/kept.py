"""Curves that lie with the committed results, so that another machine goes on from them instead of training again.

experiments/results/NAME/measured/ARM-SEED[-CARD].json
    recipe   what it was trained by; null for a finished model      facts    fingerprints of its clips and its start
    curves   by data set: what was measured, on what, and how long it took      code, machine: where

A folder of the piece below ``runs/`` goes before what is kept. What is kept counts as long as recipe, clips and
settings are what they would be now, and those of the pieces that it was trained from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from anyflow.errors import UserError
from anyflow.experiment.pieces import (
    ROOT,
    Piece,
    curve_folder,
    curve_settings,
    judged_by,
    read_curve,
    setting_changes,
    training_state,
)
from anyflow.experiment.schema import Experiment
from anyflow.recipe import Recipe, to_dict
from anyflow.recipe.fields import flatten
from anyflow.system.files import write_atomically
from anyflow.tracking.fingerprints import changed_facts, facts_of, model_fingerprint
from anyflow.tracking.mlflow import code_version, machine
from anyflow.tracking.runs import FREE_ON_RESUME

FOLDER = "measured"


def read_kept(experiment: Experiment, piece: Piece) -> dict[str, Any] | None:
    """What is kept of a piece; None if nothing is, or it cannot be read."""
    try:
        found = json.loads(_file(experiment.results, piece).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("curves"), dict) else None


def kept_pieces(experiment: Experiment, pieces: Sequence[Piece]) -> dict[str, str]:
    """The pieces of which nothing is here and something is kept, each with what makes it useless; empty: it counts.

    Args:
        experiment: the experiment.
        pieces: some of its pieces, each after those that it needs.

    Raises:
        UserError: a card's shards are missing.
    """
    found: dict[str, str] = {}
    sound: set[str] = set()  # kept, or trained here by the recipe of now, whole or in part
    for piece in pieces:
        kept = read_kept(experiment, piece)
        is_here = piece.run.recipe.exists() or curve_folder(piece).is_dir()
        unsound = sorted(set(piece.needs) - sound)
        reason = "" if kept is None else _difference(experiment, piece, kept) or " and ".join(unsound)
        if kept is not None and not is_here:
            found[piece.name] = f"what is kept has another {reason}" if reason else ""
        if (kept is not None and not reason) or (is_here and _is_trained(piece)):
            sound.add(piece.name)
    return found


def keep(experiment: Experiment, pieces: Iterable[Piece], finished: Collection[str], folder: Path) -> None:
    """Write what was measured here into new results, and take over what else is kept.

    Args:
        experiment: the experiment.
        pieces: all of its pieces.
        finished: names of those that are trained and measured here.
        folder: of the results that are being written.
    """
    (folder / FOLDER).mkdir()
    for piece in pieces:
        if piece.name in finished:
            shown = piece.cards if piece.is_shown else ()
            document = {
                "recipe": _computed(piece.recipe),
                "facts": _facts(piece),
                "curves": {card: read_curve(piece, card) for card in shown},
                "code": piece.run.status.get("code") or code_version(),
                "machine": machine(),
            }
            write_atomically(_file(folder, piece), json.dumps(document, indent=1) + "\n")
        elif read_kept(experiment, piece) is not None:
            write_atomically(_file(folder, piece), _file(experiment.results, piece).read_bytes())


def origins(experiment: Experiment, pieces: Iterable[Piece], kept: Collection[str]) -> list[str]:
    """Where the trainings come from, in words: commit and machine, each with the number of its runs."""
    here = machine()
    found: Counter[str] = Counter()
    for piece in pieces:
        document = read_kept(experiment, piece) if piece.name in kept else None
        if document is not None and piece.recipe is not None:
            found[_origin(document["code"], document["machine"])] += 1
        elif piece.recipe is not None and piece.run.status.get("code"):
            found[_origin(piece.run.status["code"], here)] += 1
    return [f"{count} at {origin}" for origin, count in sorted(found.items())]


def _origin(code: dict[str, str], where: dict[str, str]) -> str:
    changes = " with changes" if code.get("git.dirty") == "True" else ""
    return (
        f"commit {code['git.commit'][:7]}{changes} ({where['machine.cpus']} CPU cores, devices: "
        f"{where['machine.devices']}, torch {where.get('version.torch', 'unknown')})"
    )


def _file(results: Path, piece: Piece) -> Path:
    return results / FOLDER / f"{piece.name}.json"


def _difference(experiment: Experiment, piece: Piece, kept: dict[str, Any]) -> str:
    """What sets what is kept of a piece apart from what would come out now (but for rounding); empty: nothing."""
    shown, curves = piece.cards if piece.is_shown else (), kept["curves"]
    if not _computes_the_same(kept.get("recipe"), _computed(piece.recipe)):
        return "recipe"
    with suppress(UserError):  # clips that are not here, such as rendered ones, cannot be compared
        if _facts_differ(kept.get("facts") or {}, _facts(piece)):
            return "start or training clips"
    for card in shown:
        was = {key: value for key, value in curves.get(card, {}).get("measured_on", {}).items() if key != "model"}
        try:
            now = judged_by(experiment, piece, card)
        except UserError:
            now = {**{key: was[key] for key in ("data", "probe") if key in was}, **curve_settings(experiment, piece)}
        for key in setting_changes(was, now):
            return {"data": "held-out split", "probe": "training split of the probe"}.get(key, key)
    return ""


def _facts_differ(kept: dict[str, str], now: dict[str, str]) -> bool:
    """Whether other facts are kept; of before, a teacher's has none of its own (:func:`changed_facts`)."""
    return bool(changed_facts(kept, now)) or bool((kept.keys() ^ now.keys()) - {"teacher"})


def _is_trained(piece: Piece) -> bool:
    """Whether a piece's training here, finished or not, is by the recipe and on the data of now."""
    return training_state(piece, {} if piece.recipe is None else _facts(piece))[0] in ("done", "cut")


def _computed(recipe: Recipe | None) -> dict[str, Any] | None:
    """The fields that decide what is computed, as JSON gives them back; None for a finished model."""
    if recipe is None:
        return None
    fields = {key: value for key, value in flatten(to_dict(recipe)) if not key.startswith(FREE_ON_RESUME)}
    return json.loads(json.dumps(fields))


def _computes_the_same(kept: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    """Whether two recipes train the same; a field that came after what is kept was then at its default."""
    if kept is None or now is None:
        return kept is now
    before = {**(_computed(Recipe()) or {}), **kept}
    return before.keys() == now.keys() and all(_place(before[key]) == _place(now[key]) for key in now)


def _place(value: Any) -> Any:
    """A field's value; another arm's model without the experiment's name, which may change."""
    inside = isinstance(value, str) and Path(value).is_relative_to(ROOT)
    return Path(value).parts[len(ROOT.parts) + 1 :] if inside else value


def _facts(piece: Piece) -> dict[str, str]:
    """Fingerprints of what a piece begins with. A model that another arm made differs by rounding between machines."""
    if piece.recipe is None:
        return {} if piece.needs else {"model": model_fingerprint(piece.model)}
    facts = facts_of(piece.recipe)
    return {"data": facts["data"]} if piece.needs else facts
