"""Recipes from files: model, stage and hardware merged in that order, then overrides, with a record of who set what."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyflow.data.find import BETWEEN, SUFFIXES, is_tars
from anyflow.errors import UserError
from anyflow.recipe.check import check_recipe, fit_batch, fit_strategy
from anyflow.recipe.fields import FieldInfo, all_fields, flatten, group_keys
from anyflow.recipe.schema import GROUPS, ModelRecipe, Recipe
from anyflow.stages.declarations import STAGES
from anyflow.system.files import write_atomically
from anyflow.system.places import expand_home, find_shipped, folders_of
from anyflow.system.typed import fit, misfit, parse_yaml, read_yaml, resolved, to_yaml

COMMAND_LINE = "command line"
DERIVED = "derived"
NAMES_THE_MODEL = ("model.weights", "model.lora.start", "stage.onpolicy.teacher", "run.name")


def list_recipes() -> dict[str, list[str]]:
    """Names of the files by folder: ``{"finetune": ["driving", ...], "models": [...], "hardware": [...]}``.

    They are those in ``recipes/`` of the working folder, which go before, and the project's own.
    """
    names = {
        folder: sorted({path.stem for root in folders_of("recipes") for path in (root / folder).glob("*.yaml")})
        for folder in (*STAGES, "models", "hardware")
    }
    return {folder: found for folder, found in names.items() if found}


def _recipe_file(name: str) -> Path | None:
    places = (root / f"{name}.yaml" for root in folders_of("recipes"))
    return next((place for place in places if place.is_file()), None)


def load_recipe(
    name: str, *, model: str | None = None, hardware: str | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe of a stage file, checked: everything that can be known without opening weights or data.

    ``name`` is ``stage/name`` under ``recipes/``, a YAML file, or a run's folder (its ``recipe.yaml``, which is
    complete and takes neither model nor hardware). ``model`` and ``hardware`` are names of files, or paths; without
    them the stage file's ``defaults`` decide, then the model file's, else ``tiny`` and ``local``. ``overrides`` are
    ``dotted.key=value``.

    Raises:
        UserError: an unknown name or key, a wrong type, a value out of range, or fields that contradict each other.
    """
    _refuse_expanded(overrides)
    path = _find(name)
    stage = read_yaml(path)
    complete = stage.pop("complete", False)
    defaults = _defaults(stage.pop("defaults", {}), path, ("model", "hardware"))
    if complete and (model or hardware):
        raise UserError(f"{path} is a complete recipe: leave --model and --hardware out, or start from its stage file")
    layers: list[tuple[str, Mapping[str, Any]]] = [(str(path), stage)]
    if not complete:
        model_path = _find_part("models", model or defaults.get("model", "tiny"))
        network = read_yaml(model_path)
        defaults = {**_defaults(network.pop("defaults", {}), model_path, ("hardware",)), **defaults}
        hardware_path = _find_part("hardware", hardware or defaults.get("hardware", "local"))
        layers = [(str(model_path), network), *layers, (str(hardware_path), read_yaml(hardware_path))]
        layers.append((DERIVED, {"run": {"recipe": _short_name(path)}}))
    layers += [(COMMAND_LINE, _parse_override(text)) for text in overrides]
    return _finish(_merge(layers))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe, whole or not at all, with every field: ``load_recipe(path)`` gives the same one on its own."""
    write_atomically(path, to_yaml({"complete": True, **to_dict(recipe)}))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain values, without ``sources``."""
    return {group: dataclasses.asdict(getattr(recipe, group)) for group in GROUPS}


def _finish(recipe: Recipe) -> Recipe:
    recipe = _fit_tars(recipe)
    check_recipe(recipe)
    fitted = fit_strategy(fit_batch(recipe))
    sources = dict(recipe.sources)
    if not fitted.run.name:
        label = fitted.run.recipe.replace("/", "-") or fitted.stage.name
        named = label if label.endswith(fitted.model.name) else f"{label}-{fitted.model.name}"
        fitted = dataclasses.replace(fitted, run=dataclasses.replace(fitted.run, name=named))
        sources["run.name"] = DERIVED
    for key in ("data.batch_size", "hardware.accumulate", "hardware.strategy"):
        group, name = key.split(".")
        if getattr(getattr(fitted, group), name) != getattr(getattr(recipe, group), name):
            sources[key] = DERIVED
    return dataclasses.replace(fitted, sources=sources)


def _fit_tars(recipe: Recipe) -> Recipe:
    """A list of tars is one data set, unless each has its weight; streamed ones are not encoded beforehand.

    A stage file's ``precompute`` yields to ``streaming``; that of the command line is refused later.
    """
    data, sources = recipe.data, dict(recipe.sources)
    if len(data.card) > 1 and not data.weights and all(is_tars(card) for card in data.card):
        data = dataclasses.replace(data, card=[BETWEEN.join(data.card)])
    if data.streaming and data.precompute and sources.get("data.precompute") != COMMAND_LINE:
        data = dataclasses.replace(data, precompute=False)
        sources["data.precompute"] = DERIVED
    return dataclasses.replace(recipe, data=data, sources=sources)


def _refuse_expanded(overrides: Sequence[str]) -> None:
    """Tell a pattern of tars that the shell has made several overrides of, of which only the last would count."""
    tars = [text for text in overrides if text.startswith("data.card=") and text.endswith(SUFFIXES)]
    if len(tars) > 1:
        raise UserError(
            f"data.card is given {len(tars)} times ({tars[0]}, ...), as a shell makes of braces: put the whole in "
            "quotes, such as 'data.card=set/{000..099}.tar'"
        )


def _merge(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Recipe:
    """Merge, each value of its field's type; ``sources`` keeps the last layer that set each field."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, tree in layers:
        for key, value in flatten(tree):
            field = _field_of(key, source)
            sources[field] = source
            if key == field:
                values[field] = value
            else:  # of a network's dimensions
                values[field] = {**values.get(field, {}), key.removeprefix(f"{field}."): value}
    try:
        values = resolved(values, lambda: to_dict(Recipe()))
    except KeyError as error:
        key, reason = error.args
        raise UserError(f"{key}={values[key]!r} ({sources[key]}) refers to nothing ({reason}): name a field") from None
    values = {key: _typed(all_fields()[key], value, sources[key]) for key, value in values.items()}
    model = values.get("model.name", ModelRecipe().name)
    for key in NAMES_THE_MODEL:  # so that one stage file serves several models
        if key in values:
            values[key] = values[key].replace("{model}", model)
    for key in values:
        if all_fields()[key].limits.get("is_path"):
            values[key] = (
                list(map(find_shipped, values[key])) if isinstance(values[key], list) else find_shipped(values[key])
            )
    return Recipe(**{group: _group(cls(), f"{group}.", values) for group, cls in GROUPS.items()}, sources=sources)


def _typed(info: FieldInfo, value: Any, source: str) -> Any:
    """A value of its field's type; ``data.card: driving`` means ``[driving]``, and nothing is the empty list."""
    if isinstance(info.default, list) and isinstance(value, str | int | float):
        value = [] if value == "" else [value]
    try:
        return fit(value, info.type)
    except TypeError:
        raise UserError(f"{info.key}={value!r} ({source}) {misfit(value, info.type, info.wants)}") from None


def _group(group: Any, prefix: str, values: Mapping[str, Any]) -> Any:
    """A group of fields, and the groups in it, with the values that were given."""
    changes = {}
    for item in dataclasses.fields(group):
        key, own = f"{prefix}{item.name}", getattr(group, item.name)
        if dataclasses.is_dataclass(own):
            changes[item.name] = _group(own, f"{key}.", values)
        elif key in values:
            changes[item.name] = values[key]
    return dataclasses.replace(group, **changes)


def _field_of(key: str, source: str) -> str:
    """The schema's field that a key belongs to: ``model.network.num_layers`` belongs to ``model.network``.

    Raises:
        UserError: there is none.
    """
    fields = all_fields()
    owner = next(
        (name for name in fields if key == name or (fields[name].is_open and key.startswith(f"{name}."))), None
    )
    if owner is not None:
        return owner
    if key in group_keys():
        names = ", ".join(sorted({name[len(key) + 1 :].split(".")[0] for name in fields if name.startswith(f"{key}.")}))
        raise UserError(f"{key} ({source}) is a group, not a value: set one of its fields ({names})")
    raise UserError(f"unknown key {key!r} ({source}){_suggest(key, list(fields))}")


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    last = key.rpartition(".")[2]
    # the last word on "lr" has optimizer.lr, the shallowest and first
    deep_first = sorted(known, key=lambda name: (-name.count("."), -known.index(name)))
    by_name = {name.rpartition(".")[2]: name for name in deep_first}
    if not close or last in by_name:
        close = [by_name[name] for name in difflib.get_close_matches(last, list(by_name), n=1, cutoff=0.7)] or close
    return f": did you mean {close[0]!r}?" if close else ": 'anyflow recipes show' lists the keys"


def _defaults(tree: Any, path: Path, parts: Sequence[str]) -> dict[str, str]:
    if not isinstance(tree, Mapping) or set(tree) - set(parts):
        raise UserError(
            f"{path}: 'defaults' names a {' and a '.join(parts)} file and nothing else, for example {{{parts[0]}: "
            f"{'tiny' if parts[0] == 'model' else '1gpu'}}}"
        )
    return {str(key): str(value) for key, value in tree.items()}


def _find(name: str) -> Path:
    """The stage file behind a name, a path, or a run's folder."""
    given = Path(expand_home(name))
    if given.is_dir() and (given / "recipe.yaml").is_file():
        return given / "recipe.yaml"
    if given.suffix in (".yaml", ".yml"):
        if given.is_file():
            return given
        raise UserError(f"the recipe file {name} does not exist: check the path, or see 'anyflow recipes' for names")
    found = _recipe_file(name)
    known = [f"{folder}/{stem}" for folder, stems in list_recipes().items() for stem in stems if folder in STAGES]
    if name in known and found is not None:
        return found
    same_name = [item for item in known if item.partition("/")[2] == given.name]
    close = same_name or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "'anyflow recipes' lists them"
    raise UserError(f"there is no recipe {name!r}: {hint}")


def _find_part(folder: str, name: str) -> Path:
    """A model or hardware file, by name or path."""
    given = Path(expand_home(name))
    if given.suffix in (".yaml", ".yml") and given.is_file():
        return given
    found = _recipe_file(f"{folder}/{name}") if os.sep not in name else None
    if found is not None:
        return found
    option, known = folder.removesuffix("s"), list_recipes().get(folder, [])
    if folder == "models" and given.is_dir():
        raise UserError(f"--model {name} is a folder of weights, not a model file: pass model.weights={name} instead")
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    is_one = close and (folder == "models" or len(close) == 1)  # 1gpu, 8gpu and 64gpu are all close to gpu
    hint = f"did you mean {close[0]}?" if is_one else f"known are {', '.join(known)}"
    raise UserError(f"there is no --{option} {name!r}: {hint}")


def _short_name(path: Path) -> str:
    """``finetune/driving`` for a shipped file, the bare stem for any other."""
    parent = path.parent.name
    return f"{parent}/{path.stem}" if parent in STAGES else path.stem


def _parse_override(text: str) -> dict[str, Any]:
    """``optimizer.lr=1e-4`` by its key; the value is read as YAML, a text's as it stands unless it has quotes."""
    key, equals, written = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise UserError(f"override {text!r} has no value: write it as dotted.key=value, for example stage.steps=100")
    takes = all_fields()[key].type if key in all_fields() else None
    try:
        value = parse_yaml(written)
    except ValueError as error:
        if takes is not str:
            raise UserError(f"override {text!r} is not understood ({error}): quote its value") from None
        value = None
    is_text = takes is str or (takes == list[str] and not isinstance(value, list))
    return {key: written if value is None or (is_text and not isinstance(value, str)) else value}
