"""The folder of a run's checkpoints: which one is newest and whole, and what killed writers have left."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from anyflow.errors import UserError, first_line
from anyflow.system.files import PARTIAL, file_sha256, write_atomically

STATE_FILE = "state.ckpt"
POINTER = "latest"
SHARDS = "shards"
"""In the plain values of a sharded checkpoint: how many ranks have files beside them."""


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint's state file in a run's ``checkpoints`` folder, or None; see :func:`require_whole`.

    Raises:
        UserError: The pointer names a checkpoint that is gone and no other is left.
    """
    pointer = folder / POINTER
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.exists() else ""
    named = [place(folder / name) for place in (Path, replaced)] if name.startswith("step_") else []
    for newest in (*named, *reversed(finished(folder))):
        if newest.is_dir():
            return newest / STATE_FILE
    if name:
        raise UserError(
            f"{folder / name} is missing though {pointer} names it; restore it or start anew without --resume"
        )
    return None


def require_whole(folder: Path, *, else_older: bool = False) -> None:
    """That a run's newest checkpoint is whole, byte by byte.

    Args:
        folder: the run's ``checkpoints``; who lets go on from an older one holds the run.
        else_older: put damaged ones aside and go on from the newest whole one, which is told.

    Raises:
        UserError: it is damaged, and which older one is whole; or none is.
    """
    newest = latest_checkpoint(folder)
    if newest is None or not (fault := damage(newest.parent)):
        return
    older = [path for path in reversed(finished(folder)) if path != newest.parent]
    passed = [newest.parent]
    for path in older:
        if not damage(path):
            break
        passed.append(path)
    else:
        raise UserError(f"{fault}, and no other checkpoint is whole: start a new run, without --resume")
    if not else_older:
        raise UserError(
            f"{fault}; {path.name} is the newest whole checkpoint: go on from it by --resume auto --out {folder.parent}"
        )
    write_atomically(folder / POINTER, path.name)
    for broken in passed:
        aside = broken.with_name(broken.name + _DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        broken.rename(aside)
    put = ", ".join(f"{broken.name}{_DAMAGED}" for broken in passed)
    print(f"{fault}: it is put aside ({put}), and the run goes on from {path.name}", file=sys.stderr)


def damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint's folder, in words; empty if nothing is.

    Every byte is read. A ``state.ckpt`` is a zip, which has a sum for each part. Beside a sharded checkpoint's files
    lie their sums (:func:`write_sums`); those of older ones are looked at only from outside.
    """
    state = checkpoint / STATE_FILE
    if not state.is_file():
        return f"{state} is missing"
    try:
        with zipfile.ZipFile(state) as parts:
            if (broken := parts.testzip()) is not None:
                return f"{state} is damaged (in {broken})"
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return f"{state} is {f'cut off or changed ({first_line(error)})' if state.stat().st_size else 'empty'}"
    try:
        plain = torch.load(state, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds
        return f"{state} cannot be read ({first_line(error)[:100]})"
    ranks = plain.get(SHARDS, 0) if isinstance(plain, dict) else 0
    shards = sorted(checkpoint.glob("*.safetensors"))
    with ThreadPoolExecutor(8) as threads:
        return next(filter(None, [*_missing(checkpoint, shards, ranks), *threads.map(_fault, shards)]), "")


def write_sums(checkpoint: Path, rank: int, ranks: int) -> None:
    """Write the sums of a rank's own files beside them, as ``sha256sum --check`` reads them."""
    own = sorted(checkpoint.glob(f"shard-{rank + 1:05d}-*.safetensors"))
    sums = "".join(f"{file_sha256(path)}  {path.name}\n" for path in own)
    (checkpoint / f"shard-{rank + 1:05d}-of-{ranks:05d}.sha256").write_text(sums, encoding="utf-8")


def _missing(checkpoint: Path, shards: list[Path], ranks: int) -> Iterator[str]:
    """What of a sharded checkpoint is not there; of one that does not know its ranks, what lacks between others."""
    listed = sorted(checkpoint.glob("shard-*-of-*.sha256"))
    numbers = [int(path.name.split("-")[1]) for path in (listed or shards) if path.name.startswith("shard-")]
    for number in range(1, max([ranks, *numbers], default=0) + 1):
        if number not in numbers:
            yield f"{checkpoint} lacks the files of shard {number}"
    for path in listed:
        for line in filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")):
            if not (checkpoint / line.rpartition("  ")[2]).is_file():
                yield f"{checkpoint / line.rpartition('  ')[2]} is missing"


def _fault(shard: Path) -> str:
    sums = "".join(path.read_text(encoding="utf-8", errors="replace") for path in shard.parent.glob("*.sha256"))
    known = re.search(rf"^(\w+)  {re.escape(shard.name)}$", sums, re.MULTILINE)
    try:
        with safe_open(shard, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        return f"{shard} is {f'cut off or changed ({first_line(error)})' if shard.stat().st_size else 'empty'}"
    return f"{shard} is damaged (its bytes have changed)" if known and known[1] != file_sha256(shard) else ""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within the block a checkpoint is read: what is wrong with its files is reported, and which older one is whole.

    Raises:
        UserError: a file is cut off, or was changed.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        require_whole(path.parent.parent)
        raise UserError(f"the checkpoint {path.parent} cannot be read ({first_line(error)[:200]})") from error


def clear_leftovers(folder: Path) -> None:
    """Remove what killed runs have left of checkpoints in a folder that nobody writes in meanwhile."""
    for aside in folder.glob(f"step_*{_ASIDE}"):
        final = aside.with_name(aside.name.removesuffix(_ASIDE))
        if (final / STATE_FILE).exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)
    for partial in folder.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(partial)


_ASIDE, _DAMAGED = ".replaced", ".damaged"


def replaced(final: Path) -> Path:
    """Where a checkpoint lies while another one of the same step takes its place."""
    return final.with_name(final.name + _ASIDE)


def finished(folder: Path) -> list[Path]:
    """The folders of checkpoints that were written to their end, the oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.suffix not in (PARTIAL, _ASIDE, _DAMAGED))


def clear_damaged(folder: Path) -> None:
    """Remove what was put aside as damaged: a newer checkpoint is there."""
    for aside in folder.glob(f"step_*{_DAMAGED}"):
        shutil.rmtree(aside, ignore_errors=True)
