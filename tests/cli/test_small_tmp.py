"""What is large is written beside its place: the folder for temporary files may be small, and on another disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from shell import command, environment
from test_resume import training

from anyflow.data.stream import LONGEST_TMPDIR, check_sockets
from anyflow.errors import UserError

WATCH = """
import os, sys

place = os.path.realpath(os.environ["TMPDIR"])
log = os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def seen(event, arguments):
    if event in ("tempfile.mkstemp", "tempfile.mkdtemp"):
        path = arguments[0]
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = arguments[0]
    else:
        return
    if isinstance(path, (str, os.PathLike)) and os.path.realpath(path).startswith(place + os.sep):
        os.write(log, (os.path.relpath(os.path.realpath(path), place) + "\\n").encode())

sys.addaudithook(seen)
"""
"""Python's own sitecustomize: it notes what each process writes into the folder for temporary files."""

SMALL = re.compile(r"(anyflow-ranks-|pymp-|torch-).*|[a-z0-9_]{8}")
"""Reports of ranks, sockets of workers, ranks' meeting place; four bytes by which Python tries the folder."""


@pytest.mark.parametrize(
    "more",
    [
        ("model.lora.enabled=true", "model.lora.rank=4", "optimizer.name=adamw"),
        pytest.param(("hardware.devices=2", "hardware.strategy=fsdp", "optimizer.name=adamw"), marks=pytest.mark.slow),
    ],
)
def test_nothing_large_passes_through_the_folder_for_temporary_files(
    more: tuple[str, ...], small_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    folder = Path(tempfile.mkdtemp())  # whose name is short enough for sockets
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH)
    variables = environment() | {"TMPDIR": str(folder), "WATCHED": str(tmp_path / "log")}
    variables["PYTHONPATH"] = f"{tmp_path / 'site'}:{Path(__file__).resolve().parents[2]}"
    database = f"run.tracking_uri=sqlite:///{tmp_path}/mlflow.db"
    words = training(small_model, tmp_path / "run", *more, database, "stage.steps=2", "data.precompute=true")
    for call in (words, ["export", str(tmp_path / "run"), "--to", str(tmp_path / "export"), "--precision", "float32"]):
        done = subprocess.run(command(*call), env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "latest").exists() and (tmp_path / "export" / "vae").exists()
    written = set((tmp_path / "log").read_text().split())
    assert not {path for path in written if not SMALL.fullmatch(path)}
    assert not list(folder.glob("*.safetensors")) and not list(folder.glob("*.ckpt"))
    shutil.rmtree(folder)


def test_a_folder_too_long_for_sockets_is_refused() -> None:
    """Workers could send nothing, and the first batch would be waited for in silence."""
    check_sockets("/tmp/" + "x" * (LONGEST_TMPDIR - 5))
    with pytest.raises(UserError, match=r"TMPDIR=/tmp/x+ is too long .* data.num_workers=0"):
        check_sockets("/tmp/" + "x" * (LONGEST_TMPDIR - 4))
