"""One process at a time: folders that are made and held in one act, locks whose file goes with them, disks without."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anyflow.errors import UserError
from anyflow.system.locks import claimed, locked

WORKER = """
import os, shutil, sys, time
from pathlib import Path
from anyflow.system.locks import claimed, locked
home, rounds = Path(sys.argv[1]), int(sys.argv[2])
done = 0
while done < rounds:
    try:
        with {holding}:
            os.close(os.open(home / "inside", os.O_CREAT | os.O_EXCL))  # fails where another one is inside
            time.sleep(0.001)
            (home / "inside").unlink()
            {leaving}
            done += 1
    except BlockingIOError:
        time.sleep(0.001)
"""
KINDS = {
    "a folder that goes": ('claimed(home / "work")', 'shutil.rmtree(home / "work", ignore_errors=True)'),
    "a file that goes": ('locked(home / "lock", passing=True)', "pass"),
    "a file that stays": ('locked(home / "lock")', "pass"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_are_inside_at_once_though_the_lock_is_removed_each_time(kind: str, tmp_path: Path) -> None:
    """Who waits for a removed file and gets it would be inside with whoever makes a new one."""
    holding, leaving = KINDS[kind]
    code = WORKER.format(holding=holding, leaving=leaving)
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "60"]) for _ in range(3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= ({"lock"} if kind == "a file that stays" else {"work"})


def test_a_held_folder_is_refused_and_free_afterwards(tmp_path: Path) -> None:
    with claimed(tmp_path / "a/b"), pytest.raises(BlockingIOError), claimed(tmp_path / "a/b"):
        pass
    with claimed(tmp_path / "a/b"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_locks_is_one_sentence(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*words: Any) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refusing)
    for patience in (None, 0):
        with pytest.raises(UserError, match=r"work/lock: its disk knows no file locks"):
            (tmp_path / "work").mkdir(exist_ok=True)
            with locked(tmp_path / "work/lock", patience):
                pass
