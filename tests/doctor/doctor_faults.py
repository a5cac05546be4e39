"""Items with every fault that a child can have, named as ``anyflow.doctor.items`` names its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from anyflow.errors import UserError


def well(found: Any, here: Any, folder: Path) -> None:
    found.note({"answer": 42.123456}, "deep")
    (folder / "left behind").write_text("x")
    found.note({"folder": str(folder)})


def raises(found: Any, here: Any, folder: Path) -> None:
    found.note({"before": 1})
    raise ValueError("two words\nand more")


def refuses(found: Any, here: Any, folder: Path) -> None:
    raise UserError("take another one")


def crashes(found: Any, here: Any, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def is_killed(found: Any, here: Any, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(found: Any, here: Any, folder: Path) -> None:
    os._exit(7)


def runs_out_of_memory(found: Any, here: Any, folder: Path) -> None:
    import torch

    torch.empty(1 << 60)


def hangs(found: Any, here: Any, folder: Path) -> None:
    """With a process of its own that would outlive it."""
    grandchild = subprocess.Popen(["sleep", "300"])
    found.note({"grandchild": grandchild.pid, "so_far": 3})
    time.sleep(300)
