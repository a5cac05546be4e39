"""Recipes from files: model, stage and hardware merged in that order, then overrides, with a record of who set what."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyflow.errors import UserError, first_line
from anyflow.recipe.check import check_recipe, fit_batch, fit_strategy
from anyflow.recipe.fields import all_fields, flatten, group_keys
from anyflow.recipe.schema import GROUPS, Recipe
from anyflow.stages.declarations import STAGES
from anyflow.system.files import write_atomically
from anyflow.system.places import expand_home, find_shipped, folders_of

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
    from omegaconf import OmegaConf

    tree = {"complete": True, **to_dict(recipe)}
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(tree)))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain values, without ``sources``."""
    return {group: dataclasses.asdict(getattr(recipe, group)) for group in GROUPS}


def merge_recipe(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Recipe:
    """A checked recipe from ``(source, nested mapping)`` layers, later ones winning: for scripts and tests."""
    return _finish(_merge(layers))


def _finish(recipe: Recipe) -> Recipe:
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


def _merge(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Recipe:
    """Merge and convert to the schema's types; ``sources`` keeps the last layer that set each field."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    for source, tree in layers:
        flat = {key: _as_list(key, value) for key, value in flatten(tree)}
        _check_keys(flat, source)
        for key, value in flat.items():
            base = _field_of(key)
            sources[base] = source
            _assign(merged, key, value)
    name = str(merged.get("model", {}).get("name", "tiny"))
    for key in NAMES_THE_MODEL:
        _change(merged, key, lambda text: text.replace("{model}", name))
    for key, info in all_fields().items():
        if info.limits.get("is_path"):
            _change(merged, key, find_shipped)
    parts = {}
    for group, cls in GROUPS.items():
        try:
            typed = OmegaConf.merge(OmegaConf.structured(cls), merged.get(group, {}))
            parts[group] = OmegaConf.to_object(typed)
        except OmegaConfBaseException as error:
            raise _type_error(group, error, merged, sources) from None
    return Recipe(**parts, sources=sources)  # type: ignore[arg-type]


def _change(merged: dict[str, dict[str, Any]], key: str, change: Callable[[str], str]) -> None:
    """Change a text, or each of a list: ``{model}`` is the model's name, so that one stage file serves several."""
    *parents, last = key.split(".")
    tree: Any = merged
    for name in parents:
        tree = tree.get(name) if isinstance(tree, dict) else None
    value = tree.get(last) if isinstance(tree, dict) else None
    if isinstance(value, str):
        tree[last] = change(value)
    elif isinstance(value, list):
        tree[last] = [change(item) if isinstance(item, str) else item for item in value]


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            child = tree[name] = {}
        tree = child
    tree[last] = value


def _as_list(key: str, value: Any) -> Any:
    """``data.card: driving`` means ``[driving]``: a list field takes one value, and nothing for the empty list."""
    info = all_fields().get(key)
    single = info is not None and isinstance(info.default, list) and isinstance(value, str | int | float)
    if not single:
        return value
    return [] if value == "" else [value]


def _field_of(key: str) -> str:
    """The schema's field that a key belongs to: ``model.network.num_layers`` belongs to ``model.network``."""
    fields = all_fields()
    while key and key not in fields:
        key = key.rpartition(".")[0]
    return key


def _check_keys(keys: Iterable[str], source: str) -> None:
    fields, groups = all_fields(), group_keys()
    for key in keys:
        owner = _field_of(key)
        if key in fields or (owner and fields[owner].is_open):
            continue
        if key in groups:
            names = ", ".join(
                sorted({name[len(key) + 1 :].split(".")[0] for name in fields if name.startswith(f"{key}.")})
            )
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


def _type_error(group: str, error: Any, merged: Mapping[str, Any], sources: Mapping[str, str]) -> UserError:
    key = f"{group}.{error.full_key or ''}".partition("[")[0].rstrip(".")
    info = all_fields().get(_field_of(key))
    if info is None:
        return UserError(f"{key} does not fit: {first_line(error)}")
    value: Any = merged
    for name in info.key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return UserError(
        f"{info.key}={value!r} ({sources.get(info.key, 'default')}) is not of the right type: give {info.wants}"
    )


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


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file, without the keys that have no value.

    Raises:
        UserError: it cannot be read, is no YAML, or holds something else.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no valid YAML ({reason}): mend the file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} holds {type(tree).__name__}, not keys with values: write lines such as 'stage: {{steps: 200}}'"
        )
    return {str(key): value for key, value in tree.items() if value is not None}


def _parse_override(text: str) -> dict[str, Any]:
    """``optimizer.lr=1e-4`` as a nested mapping; the value is read as YAML."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {text!r} has no value: write it as dotted.key=value, for example stage.steps=100")
    if not value.strip():
        return _nest(key.strip(), "")
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(
            f"override {text!r} is not understood ({' '.join(str(error).split())}): quote its value"
        ) from None
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def _nest(key: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    _assign(tree, key, value)
    return tree
