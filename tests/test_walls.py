"""Who may import whom: read from the sources, so that a forbidden import fails before it can be relied on."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "anyflow"
SOURCES = sorted(PACKAGE.rglob("*.py"))

STREET = {
    *("__main__", "assemble", "benchmark", "cli", "commands", "comparison", "console", "curves", "deterministic"),
    *("doctor", "early", "encoding", "experiment", "fingerprints", "finish", "launch"),
    *("plan", "plan_changes", "plan_codec", "plan_peak", "plan_phases", "plan_simulate", "plan_turns"),
    *("probes", "ranks", "run_log", "runs", "sync", "tracking"),
}
"""The street door and the launcher: they may use every room."""

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "signals": set(),
    "recipe": {"errors", "files"},
    "flowmap": {"errors"},
    "data": {"errors", "files"},
    "backbone": {"errors", "files", "flowmap"},
    "evaluation": {"errors", "files", "flowmap", "backbone"},
    "stages": {"errors", "flowmap", "backbone"},
    "callbacks": {"errors", "files", "signals", "backbone", "stages"},
}
"""Room -> the rooms that it may import besides itself."""

THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "signals": set(),
    "recipe": {"omegaconf", "yaml"},
    "flowmap": {"torch"},
}
"""Rooms that may import these libraries alone."""

ONLY_IN: dict[str, set[str]] = {
    "mlflow": {
        "anyflow/tracking.py",
        "anyflow/run_log.py",
        "anyflow/sync.py",
        "anyflow/comparison.py",
        "anyflow/launch.py",
        "anyflow/commands/tracking.py",
    },
    "torch.distributed": {
        "anyflow/backbone/parallelize.py",
        "anyflow/stages/base.py",
        "anyflow/callbacks/sharded.py",
        "anyflow/plan_peak.py",
        "anyflow/doctor/ranks.py",
        "anyflow/data/stream.py",
    },
}
"""Modules that these files alone may import (or reach, as ``torch.distributed.x``)."""

LIGHTNING_BELOW_STAGES = {"anyflow/data/module.py"}
"""Lightning ends at the stages; the data module is a LightningDataModule."""

LIGHT_AT_THE_DOOR = {"typer", "anyflow"}
"""What ``anyflow --help`` may import."""

LIGHT_ROOMS = {
    *("__version__", "cli", "commands", "early", "recipe", "errors", "files", "plan", "plan_changes", "plan_phases"),
    *("ranks", "signals"),
}


def room_of(path: Path) -> str:
    """``anyflow/data/card.py`` -> ``data``; ``anyflow/cli.py`` -> ``cli``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[int, str]]:
    """``(line, dotted module)`` of every import; with ``top_level`` those that run when the module is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: Iterator[ast.AST] = ast.walk(tree)
    if top_level:
        nodes = (node for node in tree.body if not _is_type_checking(node))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} is a relative import: write it out"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_rooms_import_only_the_rooms_below_them(path: Path) -> None:
    room = room_of(path)
    if room in STREET or room == "__init__":
        return
    assert room in ROOMS, f"{room} is a new room: say in tests/test_walls.py what it may import"
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] == "anyflow" and len(parts) > 1:
            assert parts[1] in ROOMS[room] | {room}, f"{name_of(path)}:{line} may not import anyflow.{parts[1]}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    room, name = room_of(path), name_of(path)
    for line, module in imports(path):
        root = module.partition(".")[0]
        if room in THIRD_PARTY and root not in sys.stdlib_module_names | {"anyflow"}:
            assert root in THIRD_PARTY[room], f"{name}:{line}: {room} may not import {root}"
        if root in ("lightning", "pytorch_lightning") and room in ROOMS and room not in ("stages", "callbacks"):
            assert name in LIGHTNING_BELOW_STAGES, f"{name}:{line}: Lightning ends at the stages"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_tracking_and_collectives_stay_in_their_files(path: Path) -> None:
    name = name_of(path)
    for line, module in imports(path):
        for guarded, homes in ONLY_IN.items():
            if f"{module}.".startswith(f"{guarded}."):
                assert name in homes, f"{name}:{line}: {guarded} belongs to {', '.join(sorted(homes))}"
    if name in ONLY_IN["torch.distributed"]:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.distributed", (
                f"{name}:{node.lineno}: torch.distributed belongs elsewhere"
            )


@pytest.mark.parametrize("path", [p for p in SOURCES if room_of(p) in LIGHT_ROOMS], ids=name_of)
def test_the_door_opens_without_heavy_imports(path: Path) -> None:
    for line, module in imports(path, top_level=True):
        root = module.partition(".")[0]
        assert root in sys.stdlib_module_names | LIGHT_AT_THE_DOOR, (
            f"{name_of(path)}:{line}: import {root} in the command"
        )
        if root == "anyflow" and "." in module:
            room = module.split(".")[1]
            assert room in LIGHT_ROOMS, f"{name_of(path)}:{line}: {module}"
