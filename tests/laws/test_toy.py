"""A small network trained by the objective: its distance to the truth falls with the number of steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "toy_mixture.py"


def load_script():  # type: ignore[no-untyped-def]
    specification = importlib.util.spec_from_file_location("toy_mixture", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_distance_falls_with_steps() -> None:
    """A learnt flow map is good at once and better with steps; flow matching alone needs the steps."""
    _, curves = load_script().run(num_updates=4000, seed=0)
    flow_map, matching, data = curves["flow map"], curves["flow matching"], curves["data"][1]
    few, some, many = ((flow_map[a] + flow_map[b]) / 2 for a, b in ((1, 2), (4, 8), (16, 32)))
    assert few > some > many
    assert flow_map[32] < 0.7 * flow_map[1]
    assert flow_map[32] < 3 * data
    assert flow_map[1] < 0.25 * matching[1] and flow_map[2] < 0.6 * matching[2]


def test_the_script_writes_its_plot_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_script().main(["--steps", "2", "--out", str(tmp_path / "toy")])
    assert "toy_mixture.png" in capsys.readouterr().out
    assert (tmp_path / "toy" / "toy_mixture.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "toy" / "toy_mixture.json").read_text())
    assert list(figures) == ["data", "flow map", "flow matching"]
    assert list(figures["flow map"]) == ["1", "2", "4", "8", "16", "32"]
