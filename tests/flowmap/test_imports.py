"""The mathematics imports torch and the standard library, nothing else."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import anyflow.flowmap

ALLOWED = ("anyflow.flowmap", "anyflow.system.option")
FILES = sorted(Path(anyflow.flowmap.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_torch_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            root = name.split(".")[0]
            assert root == "torch" or root in sys.stdlib_module_names or name.startswith(ALLOWED), name
            assert not name.startswith("torch.distributed"), name
