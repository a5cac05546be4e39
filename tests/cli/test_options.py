"""Options of a command come out of a dataclass: same names, defaults, meanings and ranges."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from anyflow.cli.data import app as data
from anyflow.cli.options import with_options
from anyflow.data.importing.options import ImportOptions

SOME = ImportOptions(size=(96, 64), cameras=("top", "wrist"), keep_duplicates=True, scene_cuts=2.5, group_by="ride")
WORDS = ["--size", "96x64", "--cameras", "top, wrist", "--keep-duplicates", "--scene-cuts", "2.5", "--group-by", "ride"]


@pytest.mark.parametrize(("words", "expected"), [([], ImportOptions()), (WORDS, SOME)])
def test_a_command_is_given_the_dataclass(words: list[str], expected: ImportOptions) -> None:
    given: dict[str, Any] = {}

    @with_options
    def command(source: Path, options: ImportOptions, last: bool = False) -> None:
        given.update(source=source, options=options, last=last)

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, ["here", *words])
    assert result.exit_code == 0, result.output
    assert given == {"source": Path("here"), "options": expected, "last": False}


def test_every_option_of_the_import_is_in_its_help() -> None:
    told = " ".join(CliRunner().invoke(data, ["import", "--help"], env={"COLUMNS": "200"}).output.split())
    for field in dataclasses.fields(ImportOptions):
        assert f"--{field.name.replace('_', '-')}" in told
        assert field.metadata["help"] in told


def test_a_value_outside_of_its_range_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(data, ["import", str(tmp_path), "--to", str(tmp_path / "out"), "--heldout", "2"])
    assert result.exit_code == 2
    assert "--heldout" in result.output
