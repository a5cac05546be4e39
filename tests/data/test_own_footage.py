"""The page "fine-tune on my footage": its commands, run as they stand there on small data sets of four formats."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from drive_files import comma2k19, vpt
from footage_files import lerobot_v3
from robot_files import annotated
from typer.testing import CliRunner

from anyflow.cli.main import app
from anyflow.data.card import load_card
from anyflow.data.importing.formats.known import FORMATS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "finetune.md"
WRITERS: dict[str, Callable[[Path], Path]] = {
    "my-robot": lerobot_v3,
    "my-arm": annotated,
    "my-drives": comma2k19,
    "my-games": vpt,
}
SMALL = ["--frames", "17", "--size", "96x64", "--workers", "0", "--heldout", "0.3", "--keep-duplicates"]
"""Added to an import: the last value of an option counts."""


def commands(verb: str, name: str) -> list[list[str]]:
    """The page's commands that begin with ``anyflow VERB`` and name a data set."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line]
    start = [".venv/bin/anyflow", *verb.split()]
    return [line[1:] for line in lines if line[: len(start)] == start and any(name in word for word in line)]


def call(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def imported(name: str, folder: Path) -> Path:
    """Import by the page's own command; returns the new data set's folder."""
    WRITERS[name](folder / name)
    (command,) = commands("data import", name)
    call(*command, *SMALL)
    return folder / "data" / "shards" / name


@pytest.mark.parametrize("name", WRITERS)
def test_import_and_look(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = imported(name, tmp_path)
    card = load_card(folder)
    assert (card.frames, card.width, card.height, card.fps) == (17, 96, 64, 16.0)
    assert {"actions", "trajectory"} & set(card.controls)
    looks = [[word.replace("my-robot", name) for word in line] for line in commands("data", "my-robot")]
    assert [line[1] for line in looks] == ["import", "controls", "check", "show"]
    before = load_card(folder).controls
    assert "written to" in call(*looks[1]) and load_card(folder).controls == before
    assert "is whole" in call(*looks[2])
    assert "contact sheet" in call(*looks[3])


def test_the_page_lists_every_format_and_only_options_that_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in FORMATS)
    help_text = call("data", "import", "--help")
    assert all(option in help_text for option in re.findall(r"`(--[a-z-]+)", text))
    assert json.loads(call("recipes", "show", "finetune/robotics", "--json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"), [("my-robot", "robotics"), ("my-drives", "driving"), ("my-games", "games")]
)
def test_train_on_it(name: str, recipe: str, tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of the page's own command with the embedded model."""
    monkeypatch.chdir(tmp_path)
    folder = imported(name, tmp_path)
    monkeypatch.chdir(project)
    (command,) = [line for line in commands("train", name) if "--model" not in line]
    words = [word.replace(f"data/shards/{name}", str(folder)) for word in command]
    assert words[1] == f"finetune/{recipe}"
    short = [
        "stage.steps=2",
        "optimizer.warmup_steps=0",
        "data.global_batch=2",
        "data.batch_size=2",
        "data.num_workers=0",
    ]
    call(
        *words,
        "--out",
        str(tmp_path / "run"),
        *short,
        "sampling.prompts=1",
        "sampling.steps=[1]",
    )
    assert (tmp_path / "run").is_dir()
