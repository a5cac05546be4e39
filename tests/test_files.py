"""Files are whole or absent, leftovers go, and what the machine refuses is one sentence that names the place."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anyflow.errors import UserError, explain
from anyflow.recipe import load_recipe, save_recipe
from anyflow.system import files
from anyflow.system.files import partial_folder, replacing, require_place, write_atomically
from anyflow.tracking.checkpoints import (
    SHARDS,
    clear_leftovers,
    damage,
    latest_checkpoint,
    readable,
    require_whole,
    write_sums,
)
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


def cut(place: Path) -> None:
    (place / "state.ckpt").write_bytes((place / "state.ckpt").read_bytes()[:300])


def empty(place: Path) -> None:
    (place / "state.ckpt").write_bytes(b"")


def missing(place: Path) -> None:
    (place / "state.ckpt").unlink()


def flip(place: Path, name: str = "state.ckpt") -> None:
    """One bit of a weight, which torch and safetensors read as if nothing were wrong."""
    content = bytearray((place / name).read_bytes())
    content[content.index(torch.ones(64).numpy().tobytes()) + 40] ^= 4
    (place / name).write_bytes(content)


def no_checkpoint(place: Path) -> None:
    torch.save([1, 2], place / "state.ckpt", _use_new_zipfile_serialization=False)


SHARD = "shard-00002-model-00001-of-00001.safetensors"


def lacks_a_shard(place: Path) -> None:
    (place / SHARD).unlink()


def lacks_a_shard_and_its_sum(place: Path) -> None:
    """torch would leave that part of each weight as it is."""
    (place / SHARD).unlink()
    (place / "shard-00002-of-00002.sha256").unlink()


def cut_shard(place: Path) -> None:
    (place / SHARD).write_bytes((place / SHARD).read_bytes()[:-40])


def flip_shard(place: Path) -> None:
    flip(place, SHARD)


def all_shards_are_gone(place: Path) -> None:
    for path in place.glob("shard-*"):
        path.unlink()


def is_of_before_sums(place: Path) -> None:
    """A checkpoint without sums, of which one shard is lacking."""
    save_state({"anyflow": {}}, place / "state.ckpt")
    for path in place.glob("*.sha256"):
        path.unlink()
    (place / "shard-00001-model-00001-of-00001.safetensors").unlink()


DAMAGES = [cut, empty, missing, flip, no_checkpoint]
SHARDED_DAMAGES = [
    lacks_a_shard,
    lacks_a_shard_and_its_sum,
    cut_shard,
    flip_shard,
    all_shards_are_gone,
    is_of_before_sums,
    missing,
]


def sharded(place: Path) -> Path:
    """Two ranks' files beside the plain values."""
    for rank in range(2):
        weight = torch.ones(64) if rank else torch.zeros(64)
        save_file({"w": weight}, place / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors")
        write_sums(place, rank, 2)
    return place


@pytest.mark.parametrize(
    ("is_sharded", "spoil"), [*((False, d) for d in DAMAGES), *((True, d) for d in SHARDED_DAMAGES)]
)
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one(
    is_sharded: bool, spoil: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step_00000002", "step_00000004", "step_00000006", "step_00000008"):
        place = checkpoint(folder, name, {"anyflow": {}, "w": torch.ones(64), **({SHARDS: 2} if is_sharded else {})})
        if is_sharded:
            sharded(place)
        assert damage(place) == ""
    write_atomically(folder / "latest", "step_00000008")
    require_whole(folder)
    spoil(folder / "step_00000008")
    empty(folder / "step_00000006")
    sentence = r"step_00000008.*; step_00000004 is the newest whole checkpoint: go on from it by --resume auto --out "
    with pytest.raises(UserError, match=sentence) as caught:
        require_whole(folder)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value).rpartition("--out")[2]
    require_whole(folder, else_older=True)
    assert latest_checkpoint(folder) == folder / "step_00000004" / "state.ckpt"
    told = capsys.readouterr().err
    assert "put aside (step_00000008.damaged, step_00000006.damaged), and the run goes on from step_00000004" in told
    assert {path.name for path in folder.iterdir()} == {
        *("latest", "step_00000002", "step_00000004", "step_00000006.damaged", "step_00000008.damaged")
    }


def test_where_no_checkpoint_is_whole_nothing_is_touched(tmp_path: Path) -> None:
    for name in ("step_00000002", "step_00000004"):
        empty(checkpoint(tmp_path, name))
    with pytest.raises(UserError, match=r"step_00000004.*is empty, and no other checkpoint is whole: start a new run"):
        require_whole(tmp_path, else_older=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000004"]


def test_what_damages_a_checkpoint_while_it_is_read_is_told_too(tmp_path: Path) -> None:
    from anyflow.training.callbacks.sharded import read_checkpoint

    checkpoint(tmp_path, "step_00000002")
    damaged = checkpoint(tmp_path, "step_00000004")
    with pytest.raises(UserError, match=r"cannot be read \(no run of anyflow has written it\)"):
        read_checkpoint(damaged / "state.ckpt")
    cut(damaged)
    with pytest.raises(UserError, match=r"step_00000004.*cut off or changed.*step_00000002 is the newest whole"):
        read_checkpoint(damaged / "state.ckpt")
    with pytest.raises(UserError, match="set it back"), readable(damaged / "state.ckpt"):
        raise UserError("set it back")


@pytest.mark.parametrize("pointer", [None, "", "\0\0", "step_00000009"])
def test_a_lost_pointer_loses_no_checkpoint(pointer: str | None, tmp_path: Path) -> None:
    checkpoint(tmp_path, "step_00000002")
    newest = checkpoint(tmp_path, "step_00000004")
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    assert latest_checkpoint(tmp_path) == newest / "state.ckpt"


def test_replacing_gives_the_name_at_the_end_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as partial:
        partial.write_text("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "x" and not partial.exists()
