"""A run's folder belongs to one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow.errors import UserError
from anyflow.tracking.runs import RunFolder, open_run


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


def test_trainings_that_start_together_have_folders_of_their_own(tmp_path: Path) -> None:
    """Both chose -001: the second one went on with the first one's run, and wrote its recipe over it."""
    first, second = (open_run(tmp_path, "a", out=None, resume=None) for _ in range(2))
    assert [run.name for run in (first, second)] == ["a-001", "a-002"]
    (first.path / "recipe.yaml").touch()
    first.give_back()
    second.give_back()
    assert first.path.is_dir() and not second.path.exists(), "one that was never begun goes, another stays"


def test_a_folder_that_is_held_is_not_given_back(tmp_path: Path) -> None:
    """Another process is about to begin in it."""
    run = RunFolder(tmp_path / "run")
    with run.held():
        RunFolder(tmp_path / "run").give_back()
        assert run.path.is_dir()


def test_a_new_run_does_not_go_on_with_one_that_was_begun_meanwhile(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.recipe.touch()
    with pytest.raises(UserError, match="begun by another process meanwhile"):
        run.clear_leftovers(4, is_new=True, is_changed=False)
    run.clear_leftovers(4, is_new=False, is_changed=False)


@pytest.mark.parametrize(
    "checkpoint, is_changed, kept",
    [
        ("", False, ["before"]),
        ("step_00000002", False, ["step_00000002"]),
        ("step_00000004", False, ["after", "step_00000004"]),
        ("step_00000004", True, []),
    ],
)
def test_samples_are_gone_on_with_if_the_weights_are_the_same(
    checkpoint: str, is_changed: bool, kept: list[str], tmp_path: Path
) -> None:
    """A curve must not be of two networks: after a kill the same step may be reached with other weights."""
    run = RunFolder(tmp_path / "run")
    for label in ("before", "after", "step_00000002", "step_00000004"):
        run.samples_of(label).mkdir(parents=True)
    if checkpoint:
        (run.checkpoints / checkpoint).mkdir(parents=True)
        (run.checkpoints / checkpoint / "state.ckpt").touch()
        (run.checkpoints / "latest").write_text(checkpoint)
    run.clear_leftovers(4, is_new=False, is_changed=is_changed)
    assert sorted(path.name.removeprefix(".") for path in (run.path / "curves").iterdir()) == kept
