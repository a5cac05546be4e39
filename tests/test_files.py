"""Files are whole or absent, leftovers go, and what the machine refuses is one sentence that names the place."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from anyflow.errors import UserError, explain
from anyflow.recipe import load_recipe, save_recipe
from anyflow.system import files
from anyflow.system.files import partial_folder, replacing, require_place, write_atomically
from anyflow.tracking.checkpoints import clear_leftovers, latest_checkpoint, readable
from anyflow.training.callbacks.checkpoints import save_state


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("file", "it is a file"),
        ("file/deeper/still", "file is a file"),
        ("long" * 100, "File name too long"),
        ("/proc/new/folder", "nothing can be written there"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence(place: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_place(tmp_path / "new" / "folder", "--out")
    with pytest.raises(UserError, match=why) as told:
        require_place(tmp_path / place, "run.out")
    assert str(told.value).startswith("run.out ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing may be left"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing in place loses the run's recipe when it is cut there."""
    recipe = load_recipe("finetune/driving")
    place = tmp_path / "recipe.yaml"
    save_recipe(recipe, place)
    whole = place.read_text()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_recipe(recipe, place)
    assert place.read_text() == whole and [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert caught.value.filename == str(place), "the system's error is given its name"


KILLED = """
import os, signal, sys
from pathlib import Path
from anyflow.system.files import partial_folder
with partial_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    if len(sys.argv) > 2:
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_export_left_goes_with_the_next_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    target = tmp_path / "models" / "new"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL and len(list(target.parent.iterdir())) == 2
    living = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target), "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert living.stdout is not None and living.stdin is not None
    assert living.stdout.readline() == b"ready\n"
    (own,) = target.parent.glob(".new.*.partial")
    with partial_folder(target) as folder:
        assert own.is_dir() and folder != own, "another process's own is left alone"
        folder.rename(target)
    living.stdin.close()
    living.wait()
    with pytest.raises(ValueError), partial_folder(target):
        raise ValueError
    assert [path.name for path in target.parent.iterdir()] == ["new"]


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may be larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_beyond_the_limit_of_files_is_one_sentence_with_its_path(tmp_path: Path) -> None:
    """torch's own writer says "unexpected pos 640 vs 598", and Lightning's writes elsewhere first."""
    place = tmp_path / "state.ckpt"
    with limited(1 << 18), pytest.raises(RuntimeError) as caught:
        save_state({"weight": torch.zeros(1 << 18)}, place)
    sentence = explain(caught.value)
    assert sentence is not None and "ulimit -f" in sentence and str(place) in sentence and "--resume auto" in sentence


def test_what_the_machine_refuses_is_explained_and_a_bug_is_not() -> None:
    for number, words in (
        (errno.ENOSPC, "the disk is full (x): free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission is denied"),
    ):
        assert words in str(explain(OSError(number, "whatever", "x")))
    assert "(runs/a)" in str(explain(RuntimeError("I/O error: No space left on device (os error 28)"), "runs/a"))
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "data.num_workers" in str(explain(killed))
    assert explain(ValueError("a bug")) is None and explain(FileNotFoundError(errno.ENOENT, "no", "x")) is None
    try:
        try:
            raise PermissionError(errno.EACCES, "no", "x")
        except PermissionError:
            raise KeyError("a bug in the handler") from None
    except KeyError as error:
        assert explain(error) is None, "a refusal that was dealt with is not the cause"


def checkpoint(folder: Path, name: str, content: object = None) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    save_state(content or {"step": name}, place / "state.ckpt")
    return place


def test_leftovers_of_killed_checkpoints_go_and_no_whole_one_is_lost(tmp_path: Path) -> None:
    """A kill while a checkpoint replaces one of the same step must not lose both, though it is the only one."""
    aside = checkpoint(tmp_path, "step_00000004.replaced")
    checkpoint(tmp_path, "step_00000006.partial")
    write_atomically(tmp_path / "latest", "step_00000004")
    assert latest_checkpoint(tmp_path) == aside / "state.ckpt"
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000004"]
    checkpoint(tmp_path, "step_00000004.replaced")
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000004"]


@pytest.mark.parametrize("size", [0, 300])
def test_a_damaged_checkpoint_is_named_and_the_whole_one_before_it(size: int, tmp_path: Path) -> None:
    from anyflow.training.callbacks.sharded import read_checkpoint

    checkpoint(tmp_path, "step_00000002")
    damaged = checkpoint(tmp_path, "step_00000004") / "state.ckpt"
    with open(damaged, "r+b") as file:
        file.truncate(size)
    write_atomically(tmp_path / "latest", "step_00000004")
    with pytest.raises(UserError, match=r"damaged.*delete .*step_00000004, and the run goes on from step_00000002"):
        read_checkpoint(damaged)
    with pytest.raises(UserError, match="set it back"), readable(damaged):
        raise UserError("set it back")


def test_replacing_gives_the_name_at_the_end_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as partial:
        partial.write_text("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "x" and not partial.exists()
