"""Experiments from files: read, typed, and checked before anything is loaded or trained."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from anyflow.data.find import find_card
from anyflow.errors import UserError
from anyflow.evaluation.figures import FIGURES, figure_of
from anyflow.experiment.schema import Claim, Experiment
from anyflow.recipe.check import check_range
from anyflow.recipe.fields import walk
from anyflow.system.places import expand_home, folders_of
from anyflow.system.typed import build, read_yaml

FOLDER = "experiments"
_NAME = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")
ARM_MODEL = re.compile(r"\{arm\.([\w.-]+)\}")
"""What stands for another arm's model in a recipe, an override or a folder."""


def list_experiments() -> list[str]:
    """Names of the files in ``experiments/``, the working folder's and the project's own."""
    return sorted({path.stem for folder in folders_of(FOLDER) for path in folder.glob("*.yaml")})


def load_experiment(name: str) -> Experiment:
    """An experiment by name (a file of ``experiments/``) or by the path of its file, checked.

    Raises:
        UserError: no such file, a key that is unknown, of the wrong type or out of range, or keys that contradict each
            other.
    """
    path = _find(name)
    experiment = build(Experiment, read_yaml(path, resolve=True), f"{path}: ", file=str(path))
    for info in walk(experiment):
        check_range(info, info.default, str(path))
    _check_whole(experiment, path)
    for arm in experiment.arms:
        _check_arm(experiment, arm, path)
    _check_before(experiment, path)
    in_order(experiment)
    _check_metrics(experiment, path)
    for index, claim in enumerate(experiment.claims):
        _check_claim(experiment, claim, f"{path}: claims[{index}]")
    return experiment


def asked_by(experiment: Experiment) -> str:
    """What the command line calls an experiment: its name, or its file where that does not lie with the others."""
    path = Path(experiment.file)
    is_shipped = any(path.parent.resolve() == folder.resolve() for folder in folders_of(FOLDER))
    return experiment.name if is_shipped else experiment.file


def needed_arms(experiment: Experiment, arm: str) -> list[str]:
    """The arms of this experiment whose models an arm begins with or is taught by."""
    found = experiment.arms[arm]
    texts = (found.recipe, found.folder, *experiment.overrides, *found.overrides)
    named = [match for text in texts for match in ARM_MODEL.findall(text)]
    return list(dict.fromkeys(filter(None, [found.start_from, *named])))


def in_order(experiment: Experiment) -> list[str]:
    """The arms, each after those that it needs.

    Raises:
        UserError: arms that need each other.
    """
    order: list[str] = []

    def visit(arm: str, path: tuple[str, ...]) -> None:
        if arm in path:
            raise UserError(
                f"{experiment.file}: arms.{arm} starts from itself ({' -> '.join((*path, arm))}): break the circle"
            )
        for needed in needed_arms(experiment, arm):
            visit(needed, (*path, arm))
        if arm not in order:
            order.append(arm)

    for arm in experiment.arms:
        visit(arm, ())
    return order


def _find(name: str) -> Path:
    given = Path(expand_home(name))
    if given.suffix in (".yaml", ".yml"):
        if given.is_file():
            return given
        raise UserError(f"the experiment's file {name} does not exist: check the path")
    for folder in folders_of(FOLDER):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = list_experiments()
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known) or 'none'}"
    raise UserError(f"there is no experiment {name!r}: {hint}")


def _check_whole(experiment: Experiment, path: Path) -> None:
    """What concerns all arms."""
    if not experiment.question:
        raise UserError(f"{path}: question is empty: say in one sentence what is asked")
    for key in ("arms", "cards", "seeds", "metrics"):
        if not getattr(experiment, key):
            raise UserError(f"{path}: {key} is empty: an experiment needs at least one of them")
    if not experiment.shown:
        raise UserError(f"{path}: no arm is shown: leave out 'shown: false' where the report should look")
    for card in experiment.cards:
        find_card(card, f"{path}: cards: ")
    _check_once("seeds", experiment.seeds, path)


def _check_arm(experiment: Experiment, name: str, path: Path) -> None:
    arm = experiment.arms[name]
    if not _NAME.fullmatch(name):
        raise UserError(f"{path}: arms.{name} cannot be part of a folder's name: use letters, digits and dashes")
    trained = {"recipe": arm.recipe, "model": arm.model, "start_from": arm.start_from, "overrides": arm.overrides}
    too_much = [key for key, value in trained.items() if value]
    if arm.folder and too_much:
        raise UserError(
            f"{path}: arms.{name} has a folder, so nothing is trained, and {too_much[0]} has no effect: "
            "leave one of them out"
        )
    if not (arm.folder or arm.recipe or experiment.recipe):
        raise UserError(f"{path}: arms.{name} has neither recipe nor folder: give one, or a recipe for all arms")
    for needed in needed_arms(experiment, name):
        if needed not in experiment.arms:
            raise UserError(f"{path}: arms.{name} needs arm {needed!r}, and known are {_list(experiment.arms)}")
    _check_once(f"arms.{name}.seeds", arm.seeds, path)


def _check_once(key: str, seeds: Sequence[int], path: Path) -> None:
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{path}: {key}={seeds} repeats itself: give each once")


def _check_before(experiment: Experiment, path: Path) -> None:
    """That retention is measured against an arm that is there."""
    own = {f"arms.{name}.before": arm.before for name, arm in experiment.arms.items()}
    for key, name in {"before": experiment.before, **own}.items():
        if name and name not in experiment.shown:
            raise UserError(f"{path}: {key}={name!r} is no shown arm: known are {_list(experiment.shown)}")


def _check_metrics(experiment: Experiment, path: Path) -> None:
    """The step counts, and that every metric is a figure that the curves have."""
    steps = experiment.evaluation.steps
    if not steps or len(set(steps)) != len(steps):
        raise UserError(f"{path}: evaluation.steps={steps} is empty or repeats itself: give each number once")
    if experiment.few not in steps:
        raise UserError(
            f"{path}: few={experiment.few} is not among evaluation.steps={steps}: add it, or choose another"
        )
    judged = _judged(experiment)
    for index, name in enumerate(experiment.metrics):
        if name not in judged:
            _refuse_metric(str(name), f"{path}: metrics[{index}]={name!r}", judged, experiment.evaluation.encoders)


def _judged(experiment: Experiment) -> list[str]:
    """The figures that have a better side, those of the further judges included."""
    judged = [name for name, figure in FIGURES.items() if figure.better]
    if encoders := experiment.evaluation.encoders:
        from anyflow.data.card import load_card
        from anyflow.evaluation.encoders import PROBE, figures_of  # torch, which most experiments need not here

        judged += [name for choice in encoders for name in figures_of(choice)]
        if PROBE in encoders:
            labels = dict.fromkeys(name for card in experiment.cards for name in load_card(card, False).attributes)
            judged += [f"probe_{name}_right" for name in labels]
    return judged


def _refuse_metric(name: str, where: str, judged: list[str], encoders: list[str]) -> NoReturn:
    if name in FIGURES:
        raise UserError(f"{where} has no better side (the nearer to real clips the better): take another figure")
    judge = name.partition("_")[0]
    if figure_of(name) is not None and not any(one.startswith(f"{judge}_") for one in judged):
        raise UserError(f"{where}: no judge of evaluation.encoders={encoders} gives it: add the one of {judge!r}")
    close = difflib.get_close_matches(name, judged, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(judged)}"
    raise UserError(f"{where} is no figure: {hint}")


def _check_claim(experiment: Experiment, claim: Claim, where: str) -> None:
    known = experiment.metrics
    if not claim.say:
        raise UserError(f"{where}.say is empty: write the sentence that the report answers")
    for key in ("arm", "than"):
        name = getattr(claim, key)
        if name not in experiment.shown and (name or key == "arm"):
            raise UserError(f"{where}.{key}={name!r} is no shown arm: known are {_list(experiment.shown)}")
    if claim.metric and claim.metric not in known:
        raise UserError(f"{where}.metric={claim.metric!r} is not among metrics: known are {_list(known)}")
    for count in (*claim.steps, *([claim.of] if claim.of else [])):
        if count not in experiment.evaluation.steps:
            raise UserError(f"{where} names {count} steps, which evaluation.steps={experiment.evaluation.steps} lacks")
    if not claim.steps:
        raise UserError(f"{where}.steps is empty: name the step counts that must agree")
    if not claim.than and not claim.of:
        raise UserError(f"{where} compares {claim.arm!r} with itself at the same steps: give 'than' or 'of'")
    for card in claim.cards:
        if card not in experiment.cards:
            raise UserError(f"{where}.cards names {card!r}, which is not among cards: {_list(experiment.cards)}")


def _list(names: Any) -> str:
    return ", ".join(sorted(names))
