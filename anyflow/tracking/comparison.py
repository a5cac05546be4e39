"""Two or three runs side by side: what differs in recipe, data and commit, and which is better where that is known.

A side is a run's folder, a run id of MLflow, the folder of ``anyflow evaluate``, or an arm of an experiment, its seeds
together: ``runs/experiments/NAME/ARM``, or ``experiments/results/NAME/measured/ARM`` from the committed results. A
figure is marked as the better one only where its interval is clear of all others: the spread over seeds, the half width
in a curve's row (``interval``), or the score interval of a share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anyflow.errors import UserError, first_line
from anyflow.evaluation.figures import HIGHER, LOWER, figure_of
from anyflow.evaluation.heldout import load_curve
from anyflow.evaluation.intervals import wilson_interval
from anyflow.evaluation.statistics import Estimate, estimate
from anyflow.recipe import load_recipe, to_dict
from anyflow.recipe.fields import flatten
from anyflow.system.addresses import check_store
from anyflow.tracking.mlflow import readable_store
from anyflow.tracking.runs import RunFolder

MEASURED = "measured: "
"""Before the settings that figures were measured by."""

SETTINGS = {
    "clips": "numbers of prompts",
    "left_out": "frames left out of distances (left_out)",
    "version": "versions of the measures",
}
"""What must be the same for figures to compare, and what it is called."""

SEEN_GIVEN = ("motion_accuracy", "motion_unread", "path_error", "whole_cars", "sampling_seconds")
"""Figures of whole clips, given frames included: being given some helps them."""

NAMES_ALONE = ("run.name", "run.out", "run.tracking_uri", "run.recipe")
"""Fields that say what a run is called."""

FACTS = ("data", "start", "teacher")
"""What is remembered of a run by fingerprint."""

Figures = dict[tuple[str, str, int], Estimate]
"""``(data set, metric, steps)``: value and interval."""


@dataclass(frozen=True)
class Side:
    """One of the compared: its recipe field by field, what it stands on, and its figures."""

    name: str
    recipe: Mapping[str, str]
    stands_on: Mapping[str, str]
    figures: Figures
    measured: Mapping[str, str] = field(default_factory=dict)


def read_side(text: str, uri: str) -> Side:
    """A side by its folder, arm or MLflow run id.

    Raises:
        UserError: there is nothing of that name.
    """
    folder = Path(text)
    if (folder / "recipe.yaml").is_file() or (folder / "status.json").is_file():
        return _from_runs(folder.name, [RunFolder(folder)])
    if (folder / "curve.json").is_file():
        return _from_evaluation(folder.name, json.loads((folder / "curve.json").read_text(encoding="utf-8")))
    seeds = re.compile(re.escape(folder.name) + r"-\d+(-.+)?")
    runs = [RunFolder(path) for path in sorted(folder.parent.glob("*/")) if seeds.fullmatch(path.name)]
    runs = [run for run in runs if run.status]
    if runs:
        return _from_runs(folder.name, runs)
    for place in (folder.parent, Path("experiments/results") / folder.parent.name / "measured"):
        if kept := [path for path in sorted(place.glob("*.json")) if seeds.fullmatch(path.stem)]:
            return _from_kept(folder.name, [json.loads(path.read_text(encoding="utf-8")) for path in kept])
    if re.fullmatch(r"[0-9a-f]{32}", text):
        return _from_mlflow(text, uri)
    raise UserError(
        f"{text!r} is no run: give a run's folder (runs/NAME), what anyflow evaluate wrote, an arm "
        "(runs/experiments/NAME/ARM), or an MLflow run id"
    )


def differences(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """``(what, the sides' values)`` of everything that is not the same: recipe fields, data, start, commit.

    Recipes are compared where every side has one: a published model has none.
    """
    found = []
    for part in ("recipe", "stands_on", "measured"):
        maps = [getattr(side, part) for side in sides]
        if part == "recipe" and not all(maps):
            continue
        for key in dict.fromkeys(key for one in maps for key in one):
            values = [str(one.get(key, "-")) for one in maps]
            if len(set(values)) > 1 and key not in NAMES_ALONE:
                found.append((key, values))
    return found


def figure_rows(sides: Sequence[Side]) -> list[tuple[tuple[str, str, int], list[Estimate | None], int | None]]:
    """``(figure, the sides' values, index of the one that is better beyond its interval, or None)``.

    None is better where the sides are :func:`unlike`, and where a figure is read from frames that only some were given.
    """
    alike, given_alike = not unlike(sides), not is_given_unlike(sides)
    keys = dict.fromkeys(key for side in sides for key in side.figures)
    ordered = sorted(keys, key=lambda key: (key[0], list(dict.fromkeys(k[1] for k in keys)).index(key[1]), key[2]))
    rows = []
    for key in ordered:
        values = [side.figures.get(key) for side in sides]
        compares = alike and (given_alike or key[1] not in SEEN_GIVEN)
        rows.append((key, values, best(values, direction(key[1])) if compares else None))
    return rows


def unlike(sides: Sequence[Side]) -> list[str]:
    """In what the sides were measured otherwise, in words, so that their figures do not compare."""
    return [words for key, words in SETTINGS.items() if _is_unlike(sides, key)]


def is_given_unlike(sides: Sequence[Side]) -> bool:
    """Whether some samples began with more given frames than others."""
    return _is_unlike(sides, "given_frames")


def _is_unlike(sides: Sequence[Side], setting: str) -> bool:
    return len({side.measured.get(f"{MEASURED}{setting}") for side in sides if side.measured}) > 1


def direction(metric: str) -> int:
    """-1 where less is better, 1 where more is, 0 where neither (motion energy), or where that is not known."""
    figure = figure_of(metric)
    return 0 if figure is None else {LOWER: -1, HIGHER: 1}.get(figure.better, 0)


def best(values: Sequence[Estimate | None], towards: int) -> int | None:
    """Which value is better than all others with no overlap of the intervals; None where that is not known."""
    if not towards or len(values) < 2:
        return None
    spans = []
    for value in values:
        if value is None or value.low is None or value.high is None:
            return None
        spans.append(sorted((towards * value.low, towards * value.high)))
    first = max(range(len(spans)), key=lambda index: spans[index][0])
    return first if all(spans[first][0] > spans[i][1] for i in range(len(spans)) if i != first) else None


def _from_runs(name: str, runs: Sequence[RunFolder]) -> Side:
    recipes = [dict(flatten(to_dict(load_recipe(str(run.recipe))))) for run in runs if run.recipe.is_file()]
    statuses = [run.status for run in runs]
    facts = [{key: str(status[key]) for key in status.keys() & set(FACTS)} for status in statuses]
    curves = [curve for run in runs for curve in _curves(run)]
    codes = [status.get("code") or {} for status in statuses]
    return Side(name, _joined_recipe(recipes), _stands_on(facts, codes), *_measured(curves))


def _from_evaluation(name: str, document: Mapping[str, Any]) -> Side:
    """What ``anyflow evaluate`` wrote; the recipe if the model is a run's."""
    about, curve = document.get("about") or {}, document["after"]
    run = RunFolder(Path(about.get("model", "")))
    recipes = [dict(flatten(to_dict(load_recipe(str(run.recipe)))))] if about and run.recipe.is_file() else []
    stands_on = {key: about[key] for key in ("model", "model (fingerprint)", "split") if key in about}
    stands_on |= _stands_on([{"data": about["data (fingerprint)"]}], [about]) if about else {}
    data = str(about.get("data", curve["domain"]))
    return Side(name, _joined_recipe(recipes), stands_on, *_measured([(data, curve)]))


def _from_kept(name: str, documents: Sequence[Mapping[str, Any]]) -> Side:
    """An arm from the committed results of its experiment."""
    recipes = [document["recipe"] for document in documents if document["recipe"] is not None]
    curves = [(Path(card).stem, found["curve"]) for one in documents for card, found in one["curves"].items()]
    stands_on = _stands_on([one["facts"] for one in documents], [one["code"] for one in documents])
    return Side(name, _joined_recipe(recipes), stands_on, *_measured(curves))


def _joined_recipe(recipes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {key: _joined(str(one.get(key, "")) for one in recipes) for key in (recipes[0] if recipes else {})}


def _stands_on(facts: Sequence[Mapping[str, str]], codes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Fingerprints of data, start and teacher, and the commits."""
    found = {f"{key} (fingerprint)": _joined(one[key] for one in facts if key in one) for key in FACTS}
    found["commit"] = _joined(_commit(code) for code in codes)
    return {key: value for key, value in found.items() if value}


def _curves(run: RunFolder) -> list[tuple[str, dict[str, Any]]]:
    """What was measured after the training, each with its data set: an experiment's curves, else the run's own."""
    paths = sorted(run.path.glob("evaluation/*.json"))
    found = [(path.stem, json.loads(path.read_text(encoding="utf-8"))["curve"]) for path in paths]
    if not found and (own := load_curve(run.path / "curves", "after")) is not None:
        cards = load_recipe(str(run.recipe)).data.card if run.recipe.is_file() else [own.curve.domain]
        found = [(_data_name(cards), own.curve.to_json())]
    return found


def _data_name(cards: Iterable[str]) -> str:
    return "+".join(Path(card).stem for card in cards)


def _measured(curves: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[Figures, dict[str, str]]:
    """Figures over the seeds (of a single curve with its own intervals), and how they were measured."""
    values: dict[tuple[str, str, int], list[Estimate]] = {}
    for data, curve in curves:
        for row in curve["rows"]:
            for metric in _metrics(row):
                key = (data, metric, int(row["num_steps"]))
                values.setdefault(key, []).append(_own(row, metric, int(curve["clips"])))
    figures = {
        key: _possible(own[0] if len(own) == 1 else estimate([[value.mean for value in own]]), key[1])
        for key, own in values.items()
    }
    usual = {"guidance_scale": 1.0, "control_guidance_scale": 1.0}
    told = [{"left_out": curve.get("given_frames"), **usual, **curve} for _, curve in curves]
    settings = {
        f"{MEASURED}{key}": _joined(str(curve[key]) for curve in told if key in curve)
        for key in ("domain", "clips", "given_frames", "left_out", *usual, "version")
    }
    return figures, {key: value for key, value in settings.items() if value}


def _possible(found: Estimate, metric: str) -> Estimate:
    """An interval within what the figure can be: a share from 0 to 1, a distance or a time not below 0."""
    figure = figure_of(metric)
    if figure is None or found.low is None or found.high is None or not (figure.is_share or figure.has_ratio):
        return found
    high = min(1.0, found.high) if figure.is_share else found.high
    return replace(found, low=max(0.0, found.low), high=high)


def _metrics(row: Mapping[str, Any]) -> list[str]:
    numbers = [k for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and v == v]
    return [key for key in numbers if key not in ("num_steps", "nfe", "motion_clips")]


def _own(row: Mapping[str, Any], metric: str, clips: int) -> Estimate:
    """A single curve's figure, with its own interval, or a share's."""
    value, half = float(row[metric]), (row.get("interval") or {}).get(metric)
    if half is not None and half == half:
        return Estimate(value, value - half, value + half, clips)
    figure = figure_of(metric)
    if figure is not None and figure.is_share:
        trials = figure.trials(clips, row.get("motion_clips"))
        return Estimate(value, *wilson_interval(value, trials), trials)
    return Estimate(value, None, None, 1)


def _from_mlflow(run_id: str, uri: str) -> Side:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = check_store(uri, "--uri")
    with readable_store(uri):
        client = MlflowClient(tracking_uri=uri)
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            raise UserError(f"there is no run {run_id} in {uri} ({first_line(error)}): check --uri") from None
    tags, parameters = run.data.tags, run.data.params
    cards = tags.get("anyflow.cards", "").split() or re.findall(r"[^\s\[\]',]+", parameters.get("data.card", ""))
    figures: Figures = {}
    for key in run.data.metrics:
        *path, metric = key.split("/")
        if path and path[0] == "after":
            data = "/".join(path[1:]) or _data_name(cards)
            for point in client.get_metric_history(run_id, key):  # the newest point of a step count stands
                figures[data, metric, point.step] = Estimate(point.value, None, None, 1)
    return Side(run.info.run_name, parameters, _stands_on([tags], [tags]), figures)


def _commit(code: Mapping[str, str]) -> str:
    changed = " with changes" if code.get("git.dirty") == "True" else ""
    return code["git.commit"][:10] + changed if code.get("git.commit") else ""


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))
