"""The house rules: its figures, shipped recipes and cards that hold, no option without effect."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from anyflow.errors import UserError
from anyflow.recipe import Recipe, list_recipes, load_recipe
from anyflow.recipe.fields import all_fields, value_of
from experiments.house import measure

PROJECT = Path(__file__).resolve().parents[1]
PYTHON = sorted(p for folder in ("anyflow", "tests", "experiments") for p in (PROJECT / folder).rglob("*.py"))
PACKAGE = [path for path in PYTHON if path.is_relative_to(PROJECT / "anyflow")]
STAGES = [
    f"{folder}/{n}" for folder, names in list_recipes().items() if folder not in ("models", "hardware") for n in names
]
MODELS, HARDWARE = list_recipes()["models"], list_recipes()["hardware"]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def test_the_house_is_in_order() -> None:
    """What linters do not count: python -m experiments.house shows it."""
    figures = {figure.name: figure for figure in measure(PROJECT / "anyflow")}
    assert [figure.line() for figure in figures.values() if not figure.holds] == []


@pytest.mark.parametrize("stage", STAGES)
def test_shipped_recipes_hold(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage file with its own model and hardware, begun by the command that launches it."""
    monkeypatch.chdir(PROJECT)
    recipe = load_recipe(stage)
    folder, name = stage.split("/")
    assert recipe.stage.name == folder
    first = (PROJECT / "recipes" / f"{stage}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# make {folder} RECIPE={name}"), first
    assert recipe.global_batch == recipe.data.global_batch


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [name for name in STAGES if name.startswith("finetune/")])
def test_every_domain_goes_with_every_model_on_every_machine(
    stage: str, model: str, hardware: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    recipe = load_recipe(stage, model=model, hardware=hardware)
    assert recipe.global_batch == recipe.data.global_batch
    assert (recipe.model.name, recipe.hardware.name) == (model, hardware)


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("stage", [name for name in STAGES if "wan" in name])
def test_released_recipes_go_on_every_machine(stage: str, hardware: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    load_recipe(stage, hardware=hardware)


@pytest.mark.parametrize("path", sorted((PROJECT / "recipes").rglob("*.yaml")), ids=name_of)
def test_recipe_files_are_short_and_begin_with_a_comment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#") and len(text.splitlines()) <= 40
    assert isinstance(yaml.safe_load(text), dict)


READ_BY_THE_RECIPE = {"data.global_batch", "hardware.name"}  # fitted into batch_size and accumulate; for the record


@pytest.mark.parametrize("key", [key for key in all_fields() if key not in READ_BY_THE_RECIPE])
def test_every_option_has_an_effect(key: str) -> None:
    """Some code outside the options' own files reads the field: by its group's name, or as the component's own."""
    group, _, name = key.rpartition(".")
    owner = type(value_of(Recipe(), group)).__module__
    schemas = [path for path in PACKAGE if path.name == "options.py" or "recipe" in path.relative_to(PROJECT).parts]
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE if path not in schemas]
    passed_whole = any(re.search(rf"asdict\((?:recipe\.)?{re.escape(group)}\)", text) for text in sources)
    of_group = rf"\b{group.rpartition('.')[2]}" if owner == "anyflow.recipe.schema" else ""
    read = re.compile(rf"{of_group}\.{name}\b")
    assert passed_whole or any(read.search(text) for text in sources), f"nothing reads {key}"


@pytest.mark.parametrize("path", sorted((PROJECT / "data").glob("*.yaml")), ids=name_of)
def test_shipped_cards_hold(path: Path) -> None:
    from anyflow.data.card import load_card

    card = load_card(path, require_shards=not path.stem.endswith("-full"))
    assert card.licence and card.description


def test_a_card_that_is_missing_is_a_sentence() -> None:
    from anyflow.data.card import load_card

    with pytest.raises(UserError):
        load_card("no-such-card")
