"""Paths on the command line and in recipes: the home folder everywhere, and all that ships found from any folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shell import call

from anyflow.data.card import load_card
from anyflow.data.remote import cache_root
from anyflow.errors import UserError
from anyflow.evaluation.models import check_model, recipe_of
from anyflow.experiment.load import list_experiments, load_experiment
from anyflow.recipe import check_files, list_recipes, load_recipe
from anyflow.recipe.fields import all_fields
from anyflow.system.places import expand_home, expand_word, find_shipped

SHIPPED = [f"finetune/{name}" for name in list_recipes()["finetune"]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, with the working folder elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("word", "expanded"),
    [
        ("~/x y", "{home}/x y"),
        ("~", "{home}"),
        ("--to=~/x", "--to={home}/x"),
        ("run.out=~/runs", "run.out={home}/runs"),
        ("--uri=sqlite:///~/m.db", "--uri=sqlite:///{home}/m.db"),
        ("~nobody-at-all/x", "~nobody-at-all/x"),
        ("./~/x", "./~/x"),
        ("about ~5 cars", "about ~5 cars"),
        ("a car = ~/x", "a car = ~/x"),
        ("stage.steps=5", "stage.steps=5"),
    ],
)
def test_words_of_the_command_line(word: str, expanded: str, home: Path) -> None:
    assert expand_word(word) == expanded.replace("{home}", str(home))


def test_every_field_that_is_a_path_knows_the_home_folder(home: Path) -> None:
    """Overrides, their lists and files: nothing below makes a folder that is called ~."""
    fields = {key for key, info in all_fields().items() if info.limits.get("is_path")}
    assert fields == {
        *("model.weights", "model.codec", "model.lora.start", "data.card", "stage.onpolicy.teacher"),
        *("sampling.encoders", "run.out", "run.tracking_uri"),
    }
    for key in sorted(fields):
        value = "sqlite:///~/m.db" if key == "run.tracking_uri" else "~/x"
        more = ["model.lora.enabled=true"] if key == "model.lora.start" else []
        told = json.loads(call("recipes", "show", "finetune/driving", f"{key}={value}", *more, "--json"))
        shown = {row["key"]: row["value"] for row in told["fields"]}[key]
        assert str(home) in str(shown) and "~" not in str(shown), key
    (home / "mine.yaml").write_text("defaults: {model: tiny}\nstage: {name: forward}\ndata: {card: [~/a, driving]}\n")
    assert load_recipe("~/mine.yaml").data.card == [f"{home}/a", "driving"]


def test_an_import_into_the_home_folder(home: Path, project: Path) -> None:
    import sys

    sys.path.insert(0, str(project / "tests/data"))
    from footage_files import put, video

    put(home / "films/a.mp4", video(0, 8, 8))
    put(home / "captions.csv", "file_name,caption\na,Its own.\n")
    words = ["--frames", "4", "--heldout", "0", "--workers", "0", "--captions=~/captions.csv"]
    told = json.loads(call("data", "import", "~/films", "--to=~/set", *words, "--json"))
    assert told["found"] == told["taken"] == 1 and (home / "set/card.yaml").is_file()
    assert load_card("~/set").path == home / "set/card.yaml"
    (home / "away.yaml").write_text((home / "set/card.yaml").read_text().replace("train: train", "train: ~/set/train"))
    assert load_card(home / "away.yaml").splits["train"] == home / "set/train"
    assert [path.name for path in Path.cwd().iterdir()] == []


def test_what_is_kept_of_buckets(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLOW_CACHE", "~/kept")
    assert cache_root() == home / "kept"


# --- from any folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_find_their_files_from_anywhere(name: str, home: Path) -> None:
    """Also where the working folder has a ``recipes`` and a ``data`` of its own."""
    for folder in ("recipes", "data", "experiments"):
        Path(folder).mkdir()
    recipe = load_recipe(name)
    check_files(recipe)
    assert Path(recipe.model.weights).is_dir() and [load_card(card) for card in recipe.data.card]


def test_what_lies_in_the_working_folder_goes_before(home: Path) -> None:
    Path("recipes/finetune").mkdir(parents=True)
    Path("recipes/finetune/driving.yaml").write_text("stage: {name: finetune, steps: 7}\ndata: {card: games}\n")
    Path("recipes/finetune/mine.yaml").write_text("stage: {name: finetune, steps: 8}\n")
    assert load_recipe("finetune/driving").stage.steps == 7 and load_recipe("finetune/mine").stage.steps == 8
    assert {"driving", "mine", "robotics"} <= set(list_recipes()["finetune"])
    Path("data/models/tiny").mkdir(parents=True)
    assert find_shipped("data/models/tiny") == "data/models/tiny"


def test_models_and_experiments_are_found_from_anywhere(home: Path, project: Path) -> None:
    place = find_shipped("data/models/tiny")
    assert place == str(project / "data/models/tiny") and find_shipped("data/none") == "data/none"
    check_model(place)
    recipe = recipe_of(place)
    assert recipe is not None and recipe.model.name == "tiny"
    assert "retention" in list_experiments() and load_experiment("retention").name == "retention"
    with pytest.raises(UserError, match="there is no such folder"):
        check_model(expand_home("~/none"))
    for name in ("driving", "games", "robotics"):
        assert json.loads(call("data", "show", name, "--count", "0", "--json"))["name"] == name


@pytest.mark.slow
def test_an_install_has_what_ships(project: Path, tmp_path: Path) -> None:
    """Recipes, cards, clips and models, linked folders too: a wheel is used where the project's folder is not."""
    import subprocess
    import sys
    import zipfile

    elsewhere = ["egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path / "build")]
    words = [sys.executable, "setup.py", "-q", *elsewhere, "bdist_wheel", "--dist-dir", str(tmp_path / "dist")]
    subprocess.run(words, cwd=project, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = {name.partition("/share/anyflow/")[2] for name in zipfile.ZipFile(wheel).namelist()}
    kept = ("recipes/**/*.yaml", "data/*.yaml", "data/starter/**/*.tar", "data/models/**/*.safetensors")
    needed = {path.relative_to(project).as_posix() for pattern in kept for path in project.glob(pattern)}
    assert len(needed) > 60 and needed <= names
    assert "data/models/tiny-causal/vae/config.json" in names and not any(
        name.startswith("data/shards") for name in names
    )
