"""What the pages tell a user to type exists: targets, commands, options, recipes, fields, imports and links."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from anyflow.cli.main import app
from anyflow.experiment.load import load_experiment
from anyflow.recipe import load_recipe
from experiments import prose

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
RECIPE_HEADS = sorted((PROJECT / "recipes").glob("*/*.yaml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
VARIABLES = {"RECIPE", "MODEL", "HARDWARE", "ARGS", "DOMAIN", "CLIPS", "PROMPT", "STEPS", "PYTHON", "NAME"}
PLACEHOLDER = re.compile(r"path/to/|my-data/|/FORWARD\b")
"""What stands for the user's own files: such a value is not looked up."""


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """``(line, text)`` of a page's code blocks in a language."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start()) + 2, match[1]


def commands(page: Path) -> Iterator[str]:
    """Each command of a page's shell blocks, and of the first comment of a recipe."""
    for _, block in blocks(page, "sh"):
        yield from filter(None, (line.strip() for line in block.splitlines()))


COMMANDS = [(page, command) for page in PAGES for command in commands(page)] + [
    (path, re.sub(r"\s{2,}\(.*", "", path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")))
    for path in RECIPE_HEADS
    if path.read_text(encoding="utf-8").startswith("# make ")
]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page.name}: {command}" for page, command in COMMANDS])
def test_a_command_can_be_typed(page: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        check_make(words)
    elif program.endswith("anyflow"):
        check_anyflow(words)
    elif program.endswith("python"):
        check_module(words)
    else:
        others = ("bash", "pip", "sudo", "apt-get", "sbatch", "torchrun", "srun")
        assert program.removeprefix(".venv/bin/") in others, command


def check_module(words: list[str]) -> None:
    dash_m, module, *arguments = words
    assert dash_m == "-m" and importlib.util.find_spec(module), f"there is no module {module}"
    assert all((PROJECT / path).exists() for path in arguments), arguments


def check_make(words: list[str]) -> None:
    target, *settings = words
    given = dict(word.split("=", 1) for word in settings)
    assert target in TARGETS
    assert given.keys() <= VARIABLES
    if target == "experiment":
        check_anyflow(["experiment", given["NAME"], *shlex.split(given.get("ARGS", ""))])
    if "RECIPE" in given:
        options = [f"--{name.lower()}={given[name]}" for name in ("MODEL", "HARDWARE") if name in given]
        called = ["plan", given["RECIPE"]] if target == "plan" else ["train", f"{target}/{given['RECIPE']}"]
        check_anyflow([*called, *options, *shlex.split(given.get("ARGS", ""))])


def check_anyflow(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    parsed = command.make_context(command.name, list(words)).params
    if command.name == "experiment" and parsed["name"] and not PLACEHOLDER.search(parsed["name"]):
        load_experiment(parsed["name"])
    if command.name == "train" or (command.name == "plan" and parsed["recipe"]):
        overrides = [text for text in parsed["overrides"] or () if not PLACEHOLDER.search(text)]
        card = ["data.card=driving"] if len(overrides) < len(parsed["overrides"] or ()) else []
        load_recipe(parsed["recipe"], model=parsed["model"], hardware=parsed["hardware"], overrides=[*overrides, *card])


PYTHON_BLOCKS = [(page, line, block) for page in PAGES for line, block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "line", "block"), PYTHON_BLOCKS, ids=[f"{p.name}:{n}" for p, n, _ in PYTHON_BLOCKS])
def test_an_example_imports_what_exists(page: Path, line: int, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{page.name}:{line}: {node.module} has no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*\.md|)#([^)]+)\)", page.read_text(encoding="utf-8")):
        assert anchor in anchors(page.parent / target if target else page), f"{page.name} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_sections_that_docstrings_cite_are_on_the_page() -> None:
    page = (PROJECT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\w+)\. ", page, re.MULTILINE))
    cited = {
        (path.name, number)
        for path in (PROJECT / "anyflow").rglob("*.py")
        for number in re.findall(r"\b(?:sec\.|section) (\d\w?)\b", path.read_text(encoding="utf-8"))
    }
    assert cited and not [place for place in cited if place[1] not in sections]


def test_functions_that_the_algorithm_names_exist() -> None:
    page = (PROJECT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w.]+)`\s+(?:in\s+|\()`(\w+/\w+)\.py`", page)
    assert len(named) > 10
    for name, module in named:
        found: Any = importlib.import_module(f"anyflow.{module.replace('/', '.')}")
        for part in name.split("."):
            assert hasattr(found, part), f"{module}.py has no {name}"
            found = getattr(found, part)


def test_sentences_are_short() -> None:
    """At most 40 words each, 20 on average: ``python -m experiments.prose`` lists them."""
    found = prose.sentences(PAGES)
    long = [f"{sentence.path.name}:{sentence.line}: {sentence.text}" for sentence in prose.too_long(found)]
    assert not long, "\n".join(long)
    assert prose.average(found) <= prose.MOST_ON_AVERAGE


def test_the_linter_of_sentences_sees_prose_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading of many words\n\nOne `code with words` and [two words](https://x.org/a). It is $a + b$ long,\n"
        "e.g. 0.4 s.\n\n```sh\nnot this\n```\n| nor | this |\n- An item.\n- Another one\n\n$$\nu = v\n$$\n"
    )
    counted = [(sentence.line, sentence.words) for sentence in prose.sentences([page])]
    assert counted == [(3, 5), (3, 7), (10, 2), (11, 2)]
    module = tmp_path / "module.py"
    module.write_text('"""Short. Very short."""\n\nX = "no docstring here"\n')
    assert [sentence.words for sentence in prose.sentences([module])] == [1, 2]


def test_the_picture_of_the_rooms_is_the_linters(project: Path) -> None:
    """CONTRIBUTING shows the layers that import-linter enforces, in its order."""
    settings = tomllib.loads((project / "pyproject.toml").read_text())
    [layers] = [rule["layers"] for rule in settings["tool"]["importlinter"]["contracts"] if rule["type"] == "layers"]
    picture = (project / "CONTRIBUTING.md").read_text().split("```\n")[1].split()
    assert " ".join(picture).replace(" | ", "|").split() == [
        layer.replace(" | ", "|") for layer in layers if layer != "__main__"
    ]
