"""The folder of a run's checkpoints: which one is newest and whole, and what killed writers have left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anyflow.errors import UserError, first_line
from anyflow.system.files import PARTIAL

STATE_FILE = "state.ckpt"
POINTER = "latest"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint's state file in a run's ``checkpoints`` folder, or None.

    Raises:
        UserError: The pointer names a checkpoint that is gone and no other is left.
    """
    pointer = folder / POINTER
    if not pointer.exists():
        return None
    named = folder / pointer.read_text().strip()
    for whole in (named, replaced(named), *reversed(finished(folder))):
        if (whole / STATE_FILE).exists():
            return whole / STATE_FILE
    raise UserError(f"{named} is missing though {pointer} names it; restore it or start again without --resume")


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
        own = path.parent
        others = [other.name for other in finished(own.parent) if other != own and (other / STATE_FILE).exists()]
        what = first_line(error)[:200]
        older = f"delete {own}, and the run goes on from {others[-1]}" if others else "no other is left: train anew"
        raise UserError(f"the checkpoint {own} cannot be read, it is damaged ({what}): {older}") from error


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


_ASIDE = ".replaced"


def replaced(final: Path) -> Path:
    """Where a checkpoint lies while another one of the same step takes its place."""
    return final.with_name(final.name + _ASIDE)


def finished(folder: Path) -> list[Path]:
    """The folders of whole checkpoints, the oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.suffix not in (PARTIAL, _ASIDE))
