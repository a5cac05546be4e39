"""The figures of the code's own order: ``python -m experiments.house``.

What linters hold is in pyproject.toml (who may import whom, circles, style, complexity); this counts the rest.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from statistics import median

PACKAGE = Path(__file__).resolve().parents[1] / "anyflow"
AT_THE_TOP = {"__init__.py", "__main__.py", "errors.py"}
"""All that lies in no room."""


@dataclass(frozen=True)
class Figure:
    """A count, what it may be at most, and where it comes from."""

    name: str
    value: float
    most: float | None = None
    places: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether it is within its bound."""
        return self.most is None or self.value <= self.most

    def line(self) -> str:
        """For people."""
        bound = "" if self.most is None else f"   (at most {self.most:,g})"
        mark = "" if self.holds else "   TOO MANY: " + ", ".join(self.places[:5])
        return f"{self.name:<52}{self.value:>9,g}{bound}{mark}"


def measure(package: Path = PACKAGE) -> list[Figure]:
    """Every figure of a package's sources."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    lines = {path: len(text.splitlines()) for path, text in sources.items()}
    loose = [path.name for path in package.glob("*.py") if path.name not in AT_THE_TOP]
    names = [place for path, tree in trees.items() for place in _stage_names(path, tree)]
    long = [place for path, tree in trees.items() for place in _functions_over(60, path, tree)]
    twice = fields_twice(trees)
    return [
        Figure("lines", sum(lines.values())),
        Figure("files", len(lines)),
        Figure("lines of the median file", median(lines.values()), 130),
        Figure("files over 400 lines", *_count([p.name for p, n in lines.items() if n > 400], 0)),
        Figure("rooms", len([path for path in package.iterdir() if (path / "__init__.py").exists()])),
        Figure("modules in no room", *_count(loose, 0)),
        Figure("reads that can run code", *_count([x for p, t in trees.items() for x in _pickles(p, t)], 0)),
        Figure("functions over 60 lines", *_count(long, LONG)),
        Figure("comparisons of a stage's name", *_count(names, COMPARED)),
        Figure("fields written twice", *_count(twice, TWICE)),
        Figure("stages more than two classes deep", *_count(list(_deep_stages(trees)), 0)),
    ]


LONG, COMPARED, TWICE = 0, 0, 0


def _count(found: list[str], most: float) -> tuple[int, float, tuple[str, ...]]:
    return len(found), most, tuple(found)


def _deep_stages(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Stages that derive from another than ``Stage``."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            if any(base.endswith("Stage") and base != "Stage" for base in bases):
                yield f"{path.name}:{node.lineno}"  # type: ignore[attr-defined]


def _stage_names(path: Path, tree: ast.Module) -> Iterator[str]:
    """Comparisons of ``stage.name`` with something, and its use as a key."""
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        if any(ast.unparse(part).endswith("stage.name") for part in parts):
            yield f"{path.name}:{node.lineno}"  # type: ignore[attr-defined]


def _functions_over(most: int, path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= most:
            yield f"{path.name}:{node.lineno} {node.name}"


def _pickles(path: Path, tree: ast.Module) -> Iterator[str]:
    """What ruff does not see: torch.load and np.load that would run a stranger's pickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_unsafe = called == "torch.load" and given.get("weights_only") != "True"
            if is_unsafe or (called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False"):
                yield f"{path.name}:{node.lineno}"


def fields_twice(trees: dict[Path, ast.Module]) -> list[str]:
    """Fields of a recipe's group that a component's options repeat: two or more of one group, under the same names.

    A class that is the group, or a base of it, repeats nothing; one that extends such a base counts for its own fields.
    """
    from anyflow.recipe.schema import GROUPS

    groups = list(GROUPS.values())
    for group in groups:  # the list grows by the groups within
        inner = (made() for field in fields(group) if callable(made := field.default_factory))
        groups += [type(value) for value in inner if is_dataclass(value)]
    shared = {base.__qualname__ for group in groups for base in group.__mro__}
    found = []
    for path, tree in trees.items():
        if path.relative_to(PACKAGE).parts[0] not in TAKES_OPTIONS:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef) or node.name in shared or not node.name.endswith(SETTINGS):
                continue
            own = {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
            most = max((own & {field.name for field in fields(group)} for group in groups), key=len)
            found += [f"{node.name}.{name}" for name in sorted(most) if len(most) > 1]
    return found


TAKES_OPTIONS = ("flowmap", "backbone", "stages", "training")
"""The rooms whose components a recipe sets up; data and evaluation have commands with options of their own."""

SETTINGS = ("Settings", "Options", "Objective", "Conditioning", "Shares")
"""What the classes are called that a component is set up by."""


if __name__ == "__main__":
    for figure in measure():
        print(figure.line())
