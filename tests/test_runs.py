"""A run's folder belongs to one process at a time."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from anyflow.errors import UserError
from anyflow.system.claims import CLAIMED, claim_numbered, give_up_claim
from anyflow.system.locks import locked
from anyflow.tracking.runs import RunFolder, open_run, taken_run


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


def test_a_new_run_does_not_go_on_with_one_that_was_begun_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two with one --out: the second finds the folder free, and waits for the first, which ends."""
    out, held = tmp_path / "run", RunFolder.held

    def begun(run: RunFolder, patience: float = 10.0) -> AbstractContextManager[None]:
        run.path.mkdir()
        run.recipe.write_text("theirs")
        return held(run, patience)

    monkeypatch.setattr(RunFolder, "held", begun)
    with (
        pytest.raises(UserError, match="begun by another process meanwhile"),
        taken_run(tmp_path, "a", out=out, resume=None),
    ):
        pass
    assert (out / "recipe.yaml").read_text() == "theirs"


def test_a_run_is_found_and_locked_in_one_act(tmp_path: Path) -> None:
    with taken_run(tmp_path, "a", out=None, resume=None) as first:
        with taken_run(tmp_path, "a", out=None, resume="auto") as second:
            assert [first.name, second.name] == ["a-001", "a-002"]
            first.recipe.touch()
            for run in (first, second):
                with pytest.raises(UserError, match="is being trained by another process"), run.held(0.0):
                    pass
        assert not second.path.exists(), "nothing was begun in it"
    assert first.recipe.exists()
    with taken_run(tmp_path, "a", out=None, resume="auto") as again:
        assert again.path == first.path


def test_a_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning expands it: the checkpoints of a run in ``~`` lay elsewhere than the run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_run(Path("~/runs"), "a", out=None, resume=None).path == tmp_path / "runs" / "a-001"
    assert open_run(Path("runs"), "a", out=Path("~/b"), resume=None).path == tmp_path / "b"
    (tmp_path / "runs" / "a-001" / "recipe.yaml").touch()
    for resume in ("a-001", "~/runs/a-001", "auto"):
        assert open_run(Path("~/runs"), "a", out=None, resume=resume).path == tmp_path / "runs" / "a-001"


def test_a_damaged_status_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "fin')
    with pytest.raises(UserError, match=r"status\.json is damaged .*: delete it"):
        _ = RunFolder(tmp_path).status


def test_a_disk_without_locks_lets_go_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names are taken by making folders, which every disk does for one process alone."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with taken_run(tmp_path, "a", out=None, resume=None) as one, taken_run(tmp_path, "a", out=None, resume=None) as two:
        assert [one.name, two.name] == ["a-001", "a-002"]
    told = capsys.readouterr().err
    assert told.count("its disk knows no file locks") == 2 and "start no other one in" in told


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    """Who waits for a folder that goes would else hold a file that nobody sees, and a third one another."""
    place = tmp_path / "lock"
    held = threading.Event()

    def wait() -> None:
        with locked(place, 10):
            assert place.exists()
            held.set()
            with pytest.raises(BlockingIOError), locked(place, 0):
                pass

    with locked(place):
        thread = threading.Thread(target=wait)
        thread.start()
        place.unlink()
    thread.join(20)
    assert held.is_set()


def test_all_ranks_mean_the_number_that_their_watcher_has_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation on several devices starts its own command again, once a rank."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv(CLAIMED, raising=False)
    (tmp_path / "driving").mkdir()
    mine = claim_numbered(tmp_path / "driving", Path.exists)
    assert mine.name == "driving-2"
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert claim_numbered(tmp_path / "driving", Path.exists) == mine
    monkeypatch.delenv(CLAIMED)  # ranks of torchrun: the first one writes
    assert claim_numbered(tmp_path / "games", Path.exists).name == "games"
    assert not (tmp_path / ".games.claim").exists()
    give_up_claim(mine)


def test_results_that_start_together_have_numbers_of_their_own(tmp_path: Path) -> None:
    """Two samplings chose one folder, and the second's results lay beside it with exit code 2."""
    first = tmp_path / "sample"

    def is_used(path: Path) -> bool:
        return path.exists()

    script = (
        "import sys, pathlib; from anyflow.system.claims import claim_numbered; "
        f"print(claim_numbered(pathlib.Path({str(first)!r}), pathlib.Path.exists).name, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline().strip() == "sample"
    assert claim_numbered(first, is_used).name == "sample-2"
    assert claim_numbered(first, is_used).name == "sample-3"
    other.kill()
    other.communicate()
    assert claim_numbered(first, is_used).name == "sample", "a killed process claims nothing"
    for name in ("sample", "sample-2", "sample-3"):
        give_up_claim(tmp_path / name)
    assert not list(tmp_path.iterdir())


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
    run.clear_leftovers(4, is_changed=is_changed)
    assert sorted(path.name.removeprefix(".") for path in (run.path / "curves").iterdir()) == kept
