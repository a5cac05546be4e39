"""Two or three runs side by side: what differs in recipe, data and commit, and which is better where that is known.

A side is a run's folder, a run id of MLflow, or an arm of an experiment (``runs/experiments/NAME/ARM``: its seeds
together). A figure is marked as the better one only where its interval is clear of all others: the spread over seeds,
the half width that a curve's row tells itself (``interval``), or the score interval of a share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyflow.curves import load_curve
from anyflow.errors import UserError
from anyflow.evaluation.intervals import wilson_interval
from anyflow.evaluation.statistics import Estimate, estimate
from anyflow.recipe import load_recipe, to_dict
from anyflow.recipe.fields import flatten
from anyflow.runs import RunFolder

NAMES_ALONE = ("run.name", "run.out", "run.tracking_uri", "run.recipe")
"""Fields that say what a run is called."""
LOWER = ("w1", "frechet", "distance", "error", "unread", "seconds", "loss")
HIGHER = ("accuracy", "fidelity", "consistency", "right")
SHARES = ("accuracy", "unread")

Figures = dict[tuple[str, str, int], Estimate]
"""``(domain, metric, steps)``: value and interval."""


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
    seeds = re.compile(re.escape(folder.name) + r"-\d+(-.+)?")
    runs = [RunFolder(path) for path in sorted(folder.parent.glob("*/")) if seeds.fullmatch(path.name)]
    runs = [run for run in runs if run.status]
    if runs:
        return _from_runs(folder.name, runs)
    if re.fullmatch(r"[0-9a-f]{32}", text):
        return _from_mlflow(text, uri)
    raise UserError(
        f"{text!r} is no run: give a run's folder (runs/NAME), an arm (runs/experiments/NAME/ARM), or an MLflow run id"
    )


def differences(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """``(what, the sides' values)`` of everything that is not the same: recipe fields, data, start, commit."""
    found = []
    for part in ("recipe", "stands_on", "measured"):
        maps = [getattr(side, part) for side in sides]
        for key in dict.fromkeys(key for one in maps for key in one):
            values = [str(one.get(key, "-")) for one in maps]
            if len(set(values)) > 1 and key not in NAMES_ALONE:
                found.append((key, values))
    return found


def figure_rows(sides: Sequence[Side]) -> list[tuple[tuple[str, str, int], list[Estimate | None], int | None]]:
    """``(figure, the sides' values, index of the one that is better beyond its interval, or None)``."""
    keys = dict.fromkeys(key for side in sides for key in side.figures)
    ordered = sorted(keys, key=lambda key: (key[0], list(dict.fromkeys(k[1] for k in keys)).index(key[1]), key[2]))
    rows = []
    for key in ordered:
        values = [side.figures.get(key) for side in sides]
        rows.append((key, values, best(values, direction(key[1]))))
    return rows


def direction(metric: str) -> int:
    """-1 where less is better, 1 where more is, 0 where neither (motion energy)."""
    if any(word in metric for word in LOWER):
        return -1
    return int(any(word in metric for word in HIGHER))


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
    recipe = {key: _joined(str(one[key]) for one in recipes) for key in (recipes[0] if recipes else {})}
    statuses = [run.status for run in runs]
    facts = {
        "data (fingerprint)": _joined(s["data"] for s in statuses if "data" in s),
        "start (fingerprint)": _joined(s["start"] for s in statuses if "start" in s),
        "commit": _joined(_commit(s.get("code") or {}) for s in statuses),
    }
    curves = [curve for run in runs for curve in _curves(run)]
    figures = _pool(curves)
    measured = {
        f"measured: {key}": _joined(str(c[key]) for c in curves)
        for key in ("domain", "clips", "given_frames")
        if any(key in c for c in curves)
    }
    return Side(name, recipe, {key: value for key, value in facts.items() if value}, figures, measured)


def _curves(run: RunFolder) -> list[dict[str, Any]]:
    """What was measured after the training: an experiment's curves, else the run's own."""
    paths = sorted(run.path.glob("evaluation/*.json"))
    found = [json.loads(path.read_text(encoding="utf-8"))["curve"] for path in paths]
    if not found and (own := load_curve(run.path / "curves", "after")) is not None:
        found = [own.curve.to_json()]
    return found


def _pool(curves: Sequence[Mapping[str, Any]]) -> Figures:
    """Figures over the seeds; of a single curve with its own intervals."""
    values: dict[tuple[str, str, int], list[Estimate]] = {}
    for curve in curves:
        for row in curve["rows"]:
            for metric in _metrics(row):
                key = (str(curve["domain"]), metric, int(row["num_steps"]))
                values.setdefault(key, []).append(_own(row, metric, int(curve["clips"])))
    return {key: own[0] if len(own) == 1 else estimate([[value.mean for value in own]]) for key, own in values.items()}


def _metrics(row: Mapping[str, Any]) -> list[str]:
    numbers = [k for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and v == v]
    return [key for key in numbers if key not in ("num_steps", "nfe")]


def _own(row: Mapping[str, Any], metric: str, clips: int) -> Estimate:
    """A single curve's figure, with the interval that it tells, or a share's."""
    value, half = float(row[metric]), (row.get("interval") or {}).get(metric)
    if half is not None and half == half:
        return Estimate(value, value - half, value + half, clips)
    if metric.endswith(SHARES) and 0 <= value <= 1:
        return Estimate(value, *wilson_interval(value, clips), clips)
    return Estimate(value, None, None, 1)


def _from_mlflow(run_id: str, uri: str) -> Side:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise UserError(f"there is no run {run_id} in {uri} ({str(error).splitlines()[0]}): check --uri") from None
    tags, figures = run.data.tags, {}
    for key in run.data.metrics:
        *path, metric = key.split("/")
        if path and path[0] == "after":
            for point in client.get_metric_history(run_id, key):  # the newest point of a step count stands
                figures["/".join(path[1:]), metric, point.step] = Estimate(point.value, None, None, 1)
    facts = {"data (fingerprint)": tags.get("data", ""), "start (fingerprint)": tags.get("start", "")}
    facts["commit"] = _commit({key: tags[key] for key in ("git.commit", "git.dirty") if key in tags})
    return Side(run.info.run_name, run.data.params, {key: value for key, value in facts.items() if value}, figures)


def _commit(code: Mapping[str, str]) -> str:
    changed = " with changes" if code.get("git.dirty") == "True" else ""
    return code["git.commit"][:10] + changed if code.get("git.commit") else ""


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))
