"""YAML that people write, read into dataclasses: a typo, a wrong type or a missing field is one sentence.

Each sentence names the file, the field, its value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from anyflow.errors import UserError

T = TypeVar("T")

_EXPONENT = r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"


def read_yaml(path: Path, what: str = "", *, resolve: bool = False) -> dict[str, Any]:
    """The keys and values of a YAML file as OmegaConf reads it, without those that have no value.

    Args:
        path: The file.
        what: What it is, for the sentence: ``card``.
        resolve: Whether interpolations (``${oc.env:HOME}``) get their values, or stay as they are written.

    Raises:
        UserError: It cannot be read, is not YAML, or holds something else.
    """
    import yaml
    from omegaconf import OmegaConf  # not at the top: `--help` needs none
    from omegaconf.errors import OmegaConfBaseException

    named = f"{what} {str(path)!r}" if what else str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UserError(f"{named} is not UTF-8 but UTF-16, as Windows calls Unicode: save it as UTF-8")
        tree = OmegaConf.to_container(OmegaConf.create(text or "{}"), resolve=resolve)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise UserError(f"{named} is not UTF-8 ({byte}; UTF-16, Latin-1 or Windows-1252?): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{named} cannot be read ({error.strerror}): check the path and its permissions") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{named} is no valid YAML ({_one_line(error)}): mend the file") from None
    if not isinstance(tree, dict):
        raise UserError(f"{named} holds {type(tree).__name__}, not keys with values: write lines such as 'name: value'")
    return {str(key): value for key, value in tree.items() if value is not None}


def parse_yaml(text: str) -> Any:
    """A YAML text as plain values, as OmegaConf reads it; interpolations stay as they are written.

    Raises:
        ValueError: It is not YAML; the message has one line.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(_one_line(error)) from None


def resolved(values: Mapping[str, Any], beside: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Values by dotted key, with OmegaConf's interpolations replaced: ``${stage.steps}``, ``${oc.env:HOME}``.

    Args:
        values: What was given.
        beside: Makes the nested tree of what holds otherwise, which interpolations may name too.

    Raises:
        KeyError: One of them names nothing; its arguments are the key and OmegaConf's reason.
    """
    if not any("${" in str(value) for value in values.values()):
        return dict(values)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree, found = OmegaConf.create(dict(beside())), {}
    for key, value in values.items():
        OmegaConf.update(tree, key, value, force_add=True)
    for key in values:
        try:
            found[key] = OmegaConf.select(tree, key)
            if OmegaConf.is_config(found[key]):
                found[key] = OmegaConf.to_container(found[key], resolve=True)
        except OmegaConfBaseException as error:
            raise KeyError(key, _one_line(error)) from None
    return found


def to_yaml(tree: Mapping[str, Any]) -> str:
    """YAML that :func:`read_yaml` reads back as it was; a tuple stands in one row."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Puts in quotes what OmegaConf would take for a number."""

    def in_a_row(dumper: Dumper, items: tuple[Any, ...]) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)

    Dumper.add_representer(tuple, in_a_row)
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_EXPONENT), list("-+0123456789"))
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def build(kind: type[T], tree: Mapping[str, Any], where: str, prefix: str = "", **beside: Any) -> T:
    """A dataclass, with all dataclasses within, from the plain values of a file.

    Args:
        kind: The dataclass.
        tree: Its fields by name.
        where: What a sentence begins with: the file.
        prefix: Of the fields' names: ``evaluation.``.
        beside: Fields that no file may set.

    Raises:
        UserError: A field is unknown, is missing, or is of the wrong type; or the dataclass itself refuses them, by a
            ValueError whose words begin with a field's name.
    """
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in beside}
    for key in tree:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(hints)}"
            raise UserError(f"{where}unknown key {f'{prefix}{key}' if prefix else key!r}: {hint}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    needed = [item.name for item in fields if item.default is item.default_factory is dataclasses.MISSING]
    needed = [name for name in needed if name not in beside]
    for key in needed:
        if key not in tree:
            raise UserError(f"{where}missing key {prefix + key!r}: {', '.join(needed)} are needed")
    values = {key: _built(value, hints[key], where, f"{prefix}{key}") for key, value in tree.items()}
    try:
        return kind(**values, **beside)
    except ValueError as error:
        raise UserError(f"{where}{prefix}{error}") from None


def _built(value: Any, hint: Any, where: str, key: str) -> Any:
    """The value of one field, whose own parts are named in their sentences."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(origin) and isinstance(value, dict):
        hint = next(filter(dataclasses.is_dataclass, inner), hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, where, f"{key}.")  # type: ignore[arg-type]
    if origin is list and isinstance(value, list):
        return [_built(item, inner[0], where, f"{key}[{index}]") for index, item in enumerate(value)]
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {str(name): _built(item, inner[1], where, f"{key}.{name}") for name, item in value.items()}
    try:
        return fit(value, hint)
    except TypeError:
        raise UserError(f"{where}{key}={value!r} {misfit(value, hint)}") from None


def fit(value: Any, hint: Any) -> Any:
    """A plain value as a field's type takes it.

    A whole number is a number, and so is one in quotes; a path stays a text, since it may be an address. But a number
    is no text: YAML has read it already, so that ``010`` would come out as ``8``.

    Raises:
        TypeError: It is of another type.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(origin):
        for option in inner:
            with suppress(TypeError):
                return fit(value, option)
    elif origin in (list, tuple) and isinstance(value, list):
        return origin(fit(item, inner[0]) for item in value)
    elif origin is typing.Literal and value in inner:
        return value
    elif origin in (dict, Mapping) and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: fit(item, inner[1]) for key, item in value.items()}
    elif hint in (int, float) and (isinstance(value, str) or type(value) in (int, hint)):
        with suppress(ValueError, OverflowError):
            return hint(value)
    elif hint is Any or type(value) is hint or (hint is Path and isinstance(value, str) and value):
        return value
    raise TypeError(value)


def _is_union(origin: Any) -> bool:
    return origin in (typing.Union, types.UnionType)


def misfit(value: Any, hint: Any, wanted: str = "") -> str:
    """The end of the sentence about a value that does not fit: ``is not of the right type: give a whole number``."""
    quoted = f" in quotes: '{value}'" if in_words(hint).startswith("a text") and isinstance(value, int | float) else ""
    return f"is not of the right type: give {wanted or in_words(hint)}{quoted}"


def in_words(hint: Any) -> str:
    """A field's type as a user calls it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(origin):
        return " or ".join(map(in_words, inner))
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    if origin in (list, tuple):
        return f"a list, each item {in_words(inner[0])}"
    if origin in (dict, Mapping):
        return "a mapping of keys to values" if inner[1] is Any else f"keys, each with {in_words(inner[1])}"
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a folder's path"}
    return {**words, type(None): "null"}.get(hint) or "keys with values"
