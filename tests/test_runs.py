"""A run's folder belongs to one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow.errors import UserError
from anyflow.runs import RunFolder


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with (
        run.held(),
        pytest.raises(UserError, match=r"run is being trained by another process: stop that one first"),
        run.held(0.0),
    ):
        pass
    with run.held(0.0):
        assert (tmp_path / "run").is_dir()
